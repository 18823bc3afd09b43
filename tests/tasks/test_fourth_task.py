"""A task is one folder (tests/tasks/parity) and one line in the registry, and all commands know it; what tasks
declare.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from leapformer.analysis.report import render_report
from leapformer.analysis.runs import RunRecord, declarations, load_run
from leapformer.analysis.tables import comparison
from leapformer.cli import main
from leapformer.errors import LeapformerError
from leapformer.tasks import registry
from leapformer.training.loading import load_model
from leapformer.training.results import LOSS, TaskResults
from tests.tasks.parity.task import ParityModel

RECIPE = {
    "name": "parity",
    "task": "parity",
    "data": {"length": 8},
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "training": {
        "max_steps": 3,
        "batch_size": 4,
        "warmup_steps": 1,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 3,
        "device": "cpu",
    },
}


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.setitem(registry.TASKS, "parity", "tests.tasks.parity")


def test_a_fourth_task_is_trained_evaluated_compared_and_described(parity, tmp_path, capsys):
    recipe = tmp_path / "parity.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        assert main(["train", str(recipe), f"training.seed={seed}", "--output", str(folder)]) == 0
    said = capsys.readouterr().out
    results = json.loads((folders[0] / "results.json").read_text())
    right, loss = (results["splits"]["validation"][name] for name in ("right", "loss"))
    assert f"validation: right {100 * right:.1f}%, loss {loss:.4f} nats; " in said and " examples/s\n" in said
    assert results["task"] == "parity"
    assert type(load_model(folders[0] / "model", classes=registry.get_task("parity").model_classes)) is ParityModel
    assert main(["evaluate", str(folders[0])]) == 0
    assert f"right                        {right:.5g}" in capsys.readouterr().out
    assert main(["compare", *map(str, folders), "--markdown", "--output", str(tmp_path / "page.html")]) == 0
    assert "| model | seeds | right | loss | examples/s | MiB |" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "% right." in page and "examples per second" in page
    assert "bits per byte" not in page and "BLEU" not in page


def run(right: float, *, seed: int, attention: str = "leap") -> RunRecord:
    splits = {"validation": {"right": right, "loss": 1.0}}
    results = {"task": "parity", "attention": attention, "seed": seed, "splits": splits}
    return RunRecord(folder=Path(f"{attention}{seed}"), results=results)


def test_the_direction_of_a_declared_metric_counts(parity):
    runs = [run(0.5 + seed / 100, seed=seed) for seed in (0, 1, 2)]
    runs += [run(0.7 + seed / 90, seed=seed, attention="softmax") for seed in (0, 1, 2)]
    table = comparison(runs)
    assert [row[0] for row in table.rows] == ["softmax", "LeaPformer"]  # the higher the better
    (note,) = table.notes
    assert note.startswith("LeaPformer - softmax: -20.1 %") or note.startswith("softmax - LeaPformer: +20.1 %")
    assert note.endswith("softmax is better")
    assert "softmax with 70.0 % right." in render_report([runs[0], runs[3]], title="Parity")


@pytest.mark.parametrize(
    ("results", "task"),
    [
        ({"splits": {"validation": {"loss": 1.0, "bits_per_byte": 2.0}}, "tokens_per_second": 5.0}, "lm"),
        ({"splits": {"validation": {"accuracy": 0.5}}, "examples_per_second": 5.0}, "lra"),
        ({"splits": {"validation": {"accuracy": 0.5}}, "tokens_per_second": 5.0}, "lra-denoise"),
        ({"splits": {"validation": {"token_accuracy": 0.5}}}, "simulst"),
        ({"splits": {}, "source": "speech"}, "simulst"),
        ({"splits": {}, "source": "speech", "task": "lm"}, "lm"),  # what it says comes before what it looks like
        ({"splits": {}}, "lm"),
    ],
)
def test_results_of_an_older_version_name_no_task(results, task):
    assert registry.task_of(results) == task


def test_a_task_that_is_not_there_is_told_with_the_file(tmp_path):
    (tmp_path / "results.json").write_text('{"task": "pariti", "splits": {"validation": {"loss": 1.0}}}')
    with pytest.raises(LeapformerError, match=r"results\.json: task 'pariti': expected one of lm, lra, ") as caught:
        comparison([load_run(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", registry.TASKS)
def test_every_task_declares_its_results_once(name):
    task, declared = registry.get_task(name), registry.get_results(name)
    assert task.name == name and task.results is declared and isinstance(declared, TaskResults)
    assert LOSS in declared.columns


def test_declarations_are_in_the_order_of_the_registry():
    results = [{"splits": {}, "source": "text"}, {"splits": {}}, {"splits": {}, "source": "text"}]
    runs = [RunRecord(folder=Path("x"), results=content) for content in results]
    assert declarations(runs) == [registry.get_results("lm"), registry.get_results("simulst")]
