"""Reading run folders back."""

import pytest

from leapformer.analysis.runs import ATTENTION_NAMES, distinct_labels, load_run
from leapformer.errors import LeapformerError
from leapformer.nn import KINDS
from leapformer.training.run import Run
from tests.analysis.builders import curve_point, write_run, write_translation_run


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
        ("softmax/softmax/leap", "paper", "softmax, cross LeaPformer"),
        ("softmax/leap/leap", "gated", "LeaPformer, encoder softmax (gated)"),
        ("leap/cosformer/leap", "paper", "LeaPformer, decoder cosFormer"),
        ("leap/linear/softmax", "paper", "LeaPformer/linear/softmax"),
        ("leap/leap/leap", "paper", "LeaPformer"),
    ],
)
def test_label(tmp_path, attention, variant, label):
    assert load_run(write_run(tmp_path, "run", attention=attention, variant=variant)).label == label


def test_equal_labels_are_told_apart(tmp_path):
    changes = [{"seed": 0}, {"seed": 1}, {"seed": 1, "name": "again"}]
    runs = [load_run(write_run(tmp_path / str(place), "leap", **change)) for place, change in enumerate(changes)]
    assert distinct_labels(runs) == [
        "LeaPformer seed 0",
        "LeaPformer seed 1 [leap]",
        "LeaPformer seed 1 [again]",
    ]


def test_a_convolution_that_all_have_tells_none_from_another(tmp_path):
    def labels(**widths: int) -> list[str]:
        folders = [write_run(tmp_path / str(widths), kind, conv_width=width) for kind, width in widths.items()]
        return distinct_labels([load_run(folder) for folder in folders])

    assert labels(leap=4, softmax=4) == ["LeaPformer", "softmax"]
    assert labels(leap=4, softmax=0) == ["LeaPformer + convolution 4", "softmax"]
    assert labels(leap=4, softmax=3) == ["LeaPformer + convolution 4", "softmax + convolution 3"]
    assert labels(leap=4) == ["LeaPformer + convolution 4"]


def test_scores_by_k_are_from_the_curve_or_else_from_the_evaluation_after_training(tmp_path):
    points = [curve_point(None, 40.0, 4000), curve_point(3, 30.0, 2000), curve_point(1, 20.0, 1000)]
    trained = {"loss": 1.0, "k": 5, "BLEU": 33.0, "LAAL": 2500.0}
    run = load_run(write_translation_run(tmp_path, "a", points=points, splits={"validation": trained}))
    assert [point["k"] for point in run.latency_curve()] == [1, 3, None]
    assert [run.scores_at(k).get("BLEU") for k in (1, 3, 5, 7, None)] == [20.0, 30.0, 33.0, None, 40.0]
    assert run.latency_curve("test") == [] and run.scores_at(1, "test") == {}
    points.append(curve_point(5, 34.0, 2600))
    run = load_run(write_translation_run(tmp_path, "b", points=points, splits={"validation": trained}))
    assert run.scores_at(5)["BLEU"] == 34.0
    # A transcription has no k, and another kind of run nothing.
    run = load_run(write_translation_run(tmp_path, "c", splits={"validation": {"loss": 1.0, "chrF": 70.0}}))
    assert run.scores_at(None) == run.scores_at(5) == load_run(write_run(tmp_path, "leap")).scores_at(5) == {}


def test_unfinished_run(tmp_path):
    with pytest.raises(LeapformerError, match=r"expected a finished run with results\.json, found none"):
        load_run(tmp_path)


def test_a_damaged_row_of_metrics_costs_that_row_alone(tmp_path):
    folder = write_run(tmp_path, "leap")
    rows = [
        b'{"step": 1, "loss": 2.0}',
        b'{"step": ',
        b'{"step": "2", "loss": 2.0}',
        b"[3]",
        b'{"loss": 1.0}',
        b"\xff\xfe",
        b'{"step": 4, "note": "\xff"}',
        b'{"step": 5, "loss": NaN}',
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b"",
        b'{"step": 6, "loss": 1.5}',
        b'{"step": 7, "lo',
    ]
    folder.joinpath("metrics.jsonl").write_bytes(b"\n".join(rows))
    expected = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": None}, {"step": 6, "loss": 1.5}]
    assert load_run(folder).events == Run(folder).metrics() == expected
    assert load_run(folder).curve("loss") == ([1.0, 6.0], [2.0, 1.5])


def test_damaged_results_are_one_line(tmp_path):
    folder = write_run(tmp_path, "leap")
    folder.joinpath("results.json").write_text("[]")
    with pytest.raises(LeapformerError, match=r"results\.json: expected a JSON object, found list"):
        load_run(folder)


def test_every_attention_has_a_name_that_readers_know():
    assert set(ATTENTION_NAMES) == set(KINDS)
