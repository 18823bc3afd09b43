"""Long-Range Arena as a task of the training, and the command that fills the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from leapformer.analysis.lra import NAMES, Cell, overview, task_rows
from leapformer.analysis.plots import Point, pareto_front
from leapformer.analysis.runs import RunRecord
from leapformer.cli import main
from leapformer.errors import LeapformerError
from leapformer.models import LeapformerForSequenceClassification
from leapformer.tasks.lra.dataset import load
from leapformer.tasks.lra.preparation import prepare
from leapformer.tasks.registry import load_recipe
from leapformer.training.loading import load_model
from leapformer.training.recipes import RecipeError, recipe_names
from leapformer.training.run import Run
from leapformer.training.train import train

TINY = (
    "hidden_size=16", "intermediate_size=32", "classifier_hidden_size=8", "attention_features=8", "attention_block=16",
    "log_every=1", "eval_every=2", "save_every=2", "eval_tokens=600", "batch_size=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with ListOps and text in it, as `leapformer data prepare` leaves them."""
    folder = tmp_path_factory.mktemp("lra")
    prepare("listops", folder / "lra-listops-cpu", count=40, workers=1, min_length=20, max_length=60)
    rows = [
        json.dumps({"text": "good " * (n % 7 + 1) if n % 2 else "bad " * (n % 5 + 1), "label": n % 2})
        for n in range(40)
    ]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    prepare("text", folder / "lra-text", source=folder)
    return folder


def tiny(data, *overrides, name="lra/listops-cpu", folder="lra-listops-cpu"):
    return load_recipe(name, [f"data.path={data / folder}", *TINY, "max_steps=2", "warmup_steps=1", *overrides])


def test_a_whole_run(data, tmp_path):
    outcome = train(*tiny(data), tmp_path / "run")
    assert outcome.results is not None
    metrics = outcome.results["splits"]["validation"]
    assert 0 <= metrics["accuracy"] <= 1 and metrics["examples"] == 4
    labels = {
        split: load("listops", data / "lra-listops-cpu", split).labels.tolist() for split in ("train", "validation")
    }
    commonest = max(range(10), key=labels["train"].count)
    assert metrics["majority_accuracy"] == labels["validation"].count(commonest) / 4
    assert 0 <= metrics["root_operator_accuracy"] <= 1
    assert outcome.results["examples"] == 8 and outcome.results["examples_per_second"] > 0
    assert outcome.results["parameters_leap"] == 2 * 2 * (
        8 * 8 + 8 + 8 + 1
    )  # q and k of two layers, heads 8 wide, r = 8
    model = load_model(tmp_path / "run" / "model")
    assert isinstance(model, LeapformerForSequenceClassification) and model.config.num_labels == 10
    assert not (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_an_evaluation_of_a_whole_split_tells_its_progress(data, tmp_path):
    recipe, task = tiny(data, "eval_batch_tokens=120")  # two documents of 60 tokens
    told = []
    evaluation = task.prepare(
        recipe, cache=tmp_path, progress=lambda batches, what: told.append((len(batches), what)) or batches
    )
    model = evaluation.build_model()
    evaluation.quick_metrics(model)
    assert told == []
    evaluation.evaluate(model, split="test")
    assert told == [(2, "evaluating the test split")]


def test_evaluate_and_compare_commands(data, tmp_path, capsys):
    folders = [tmp_path / kind for kind in ("leap", "softmax")]
    for folder in folders:
        train(*tiny(data, f"attention={folder.name}"), folder)
    assert main(["evaluate", str(folders[0]), "--split", "test"]) == 0
    assert "root_operator_accuracy" in capsys.readouterr().out
    assert main(["compare", *map(str, folders), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| accuracy % |" in printed and "| examples/s |" in printed and "word ppl" not in printed


@pytest.mark.parametrize("attention", NAMES)
def test_every_mechanism_trains(data, tmp_path, attention):
    outcome = train(*tiny(data, f"attention={attention}", name="lra/text-cpu", folder="lra-text"), tmp_path / "run")
    assert outcome.results is not None and outcome.results["attention"] == attention
    assert outcome.results["splits"]["validation"]["loss"] > 0


@pytest.fixture(scope="module")
def all_data(data):
    """The other three tasks too: pairs in the release's form, pictures of noise in folders, and drawn curves."""
    (data / "aan" / "tsv_data").mkdir(parents=True)
    rows = [f"{n % 2}\tA{n}\tB{n}\t{'words ' * (n + 1)}\t{'others ' * (n + 2)}" for n in range(8)]
    for split in ("train", "eval", "test"):
        (data / "aan" / "tsv_data" / f"new_aan_pairs.{split}.tsv").write_text("\n".join(rows) + "\n")
    prepare("retrieval", data / "lra-retrieval", source=data / "aan")
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for name in range(10):
            (data / "pictures" / split / f"class{name}").mkdir(parents=True)
            for n in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / "pictures" / split / f"class{name}" / f"{n}.png")
    prepare("image", data / "lra-image", source=data / "pictures")
    prepare("pathfinder", data / "lra-pathfinder", count=16, workers=1)
    return data


@pytest.mark.parametrize("task", ("listops", "text", "retrieval", "image", "pathfinder"))
def test_every_task_trains(all_data, tmp_path, task):
    folder = "lra-listops-cpu" if task == "listops" else f"lra-{task}"
    outcome = train(*tiny(all_data, name=f"lra/{task}-cpu", folder=folder), tmp_path / "run")
    assert outcome.results is not None and outcome.results["examples"] == 8
    config = load_model(tmp_path / "run" / "model").config
    assert config.paired_inputs == (task == "retrieval")
    assert config.num_labels == (10 if task in ("listops", "image") else 2)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("lra/")])
def test_every_recipe_is_valid(name):
    recipe, task = load_recipe(name)
    assert task.name == "lra" and recipe.data.dataset in name  # type: ignore[attr-defined]


def test_documents_longer_than_the_model_are_told_before_training(data, tmp_path):
    with pytest.raises(LeapformerError, match=r"max_position_embeddings: expected at least the \d+ tokens"):
        train(*tiny(data, "max_position_embeddings=16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_recipe_keys_are_told():
    with pytest.raises(RecipeError, match=r"data\.dataset"):
        load_recipe("lra/text-cpu", ["data.dataset=images"])
    with pytest.raises(RecipeError, match="model.num_labels"):
        load_recipe("lra/text-cpu", ["model.num_labels=3"])


def lra(data, output, *arguments):
    options = [argument for override in TINY for argument in ("--set", override)]
    return main(["lra", "--size", "cpu", "--data", str(data), "--output", str(output), *options, *arguments])


def test_the_table_is_made_resumed_and_not_made_twice(data, tmp_path, capsys, monkeypatch):
    arguments = ("--tasks", "listops,text", "--attention", "leap,softmax", "--budget", "2")
    assert lra(data, tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    assert "| LeaPformer | 0 |" in printed and "not learned" in printed and "| 38.37 |" in printed
    page = (tmp_path / "lra.html").read_text()
    assert page.count("<svg") == 2 and "http-equiv" not in page and "src=" not in page
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(before) == 4 and all("test" in json.loads(path.read_text())["splits"] for path in before)
    assert lra(data, tmp_path, *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")} == before
    assert lra(data, tmp_path, *arguments[:-1], "3") == 2
    assert "another recipe" in capsys.readouterr().err


def test_only_the_table_of_what_is_finished(data, tmp_path, capsys):
    arguments = ("--tasks", "text", "--attention", "leap", "--budget", "2")
    assert lra(data, tmp_path, *arguments) == 0
    (tmp_path / "lra.md").unlink()
    assert lra(data, tmp_path, *arguments[:-3], "leap,softmax", "--only-table") == 0
    table = (tmp_path / "lra.md").read_text()
    assert "LeaPformer" in table and not (tmp_path / "text" / "softmax-seed0").exists()


def test_processes_of_a_launcher_share_the_runs(data, tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    assert lra(data, tmp_path, "--tasks", "text", "--attention", "leap,softmax,linear-relu", "--budget", "2") == 0
    assert [path.parent.name for path in tmp_path.rglob("results.json")] == ["softmax-seed0"]
    assert not (tmp_path / "lra.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "texts"), "--tasks: expected all or some of listops, text"),
        (("--attention", "leaf"), "--attention: expected all or some of softmax"),
        (("--size", "huge"), "--size: expected small, cpu, base"),
    ],
)
def test_wrong_options(data, tmp_path, capsys, arguments, message):
    assert lra(data, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def record(accuracy: float, *, seed: int = 0, examples: int = 10_000) -> RunRecord:
    split = {"accuracy": accuracy, "examples": examples, "majority_accuracy": 0.18, "root_operator_accuracy": 0.36}
    results = {
        "seed": seed,
        "splits": {"test": split},
        "parameters": 1000,
        "parameters_leap": 5,
        "examples_per_second": 7.0,
    }
    return RunRecord(folder=Run("x").path, results=results)


def test_what_is_learned_is_two_standard_errors_above_the_best_baseline():
    error = (0.36 * 0.64 / 10_000) ** 0.5
    assert not Cell("listops", "leap", [record(0.36 + 1.9 * error)]).learned
    assert Cell("listops", "leap", [record(0.36 + 2.1 * error)]).learned
    assert not Cell("listops", "leap", [record(0.37, seed=0), record(0.40, seed=1)]).learned  # seeds differ more
    assert Cell("listops", "leap", [record(0.40, seed=0), record(0.401, seed=1)]).learned


def test_tables():
    cells = [Cell("listops", "leap", [record(0.40), record(0.42, seed=1)]), Cell("listops", "softmax", [record(0.30)])]
    assert overview(cells)[1] == [["softmax", "not learned (30.00)", "-"], ["LeaPformer", "41.00 ± 1.41", "-"]]
    (first, *_), second = task_rows(cells, "listops")
    assert first == "LeaPformer" and second[2] == "not learned (30.00)" and second[5] == "38.37"


def test_pareto_front():
    points = [
        Point("slow and good", 1, 9),
        Point("fast and bad", 9, 1),
        Point("beaten", 2, 0.5),
        Point("same speed", 9, 0.9),
    ]
    assert [point.label for point in pareto_front(points)] == ["slow and good", "fast and bad"]
