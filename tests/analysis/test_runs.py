"""Reading run folders back."""

import pytest

from leapformer.analysis.runs import ATTENTION_NAMES, distinct_labels, load_run
from leapformer.errors import LeapformerError
from leapformer.nn import KINDS
from tests.analysis.builders import write_run


def test_reads_results_and_events(tmp_path):
    run = load_run(write_run(tmp_path, "leap", perplexity=310.0))
    assert run.name == "leap"
    assert run.split()["word_perplexity"] == 310.0
    assert run.split("test") == {}
    steps, losses = run.curve("eval_loss")
    assert steps == [80, 160, 240, 320, 400]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("attention", "variant", "label"),
    [
        ("leap", "paper", "LeaPformer"),
        ("leap", "gated", "LeaPformer (gated)"),
        (["leap", "softmax", "leap"], "paper", "LeaPformer+softmax"),
        ("cosformer", None, "cosFormer"),
    ],
)
def test_label(tmp_path, attention, variant, label):
    assert load_run(write_run(tmp_path, "run", attention=attention, variant=variant)).label == label


def test_equal_labels_are_told_apart(tmp_path):
    changes = [{"seed": 0}, {"seed": 1}, {"seed": 1, "name": "again"}]
    runs = [load_run(write_run(tmp_path / str(place), "leap", **change)) for place, change in enumerate(changes)]
    assert distinct_labels(runs) == [
        "LeaPformer seed 0", "LeaPformer seed 1 [leap]", "LeaPformer seed 1 [again]",
    ]  # fmt: skip


def test_unfinished_run(tmp_path):
    with pytest.raises(LeapformerError, match=r"expected a finished run with results\.json, found none"):
        load_run(tmp_path)


def test_damaged_files_are_named_with_their_line(tmp_path):
    folder = write_run(tmp_path, "leap")
    folder.joinpath("metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": \n')
    with pytest.raises(LeapformerError, match=r"metrics\.jsonl:2: expected JSON, found .* at column \d+"):
        load_run(folder)
    folder.joinpath("results.json").write_text("[]")
    with pytest.raises(LeapformerError, match=r"results\.json: expected a JSON object, found list"):
        load_run(folder)


def test_every_attention_has_a_name_that_readers_know():
    assert set(ATTENTION_NAMES) == set(KINDS)
