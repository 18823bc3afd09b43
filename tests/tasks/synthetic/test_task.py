"""Synthetic tasks as a task of the training: runs, results, tables, and one line for every wrong setting."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from leapformer.cli import main
from leapformer.errors import LeapformerError
from leapformer.models import LeapformerForCausalLM
from leapformer.models.loss import IGNORE_INDEX
from leapformer.tasks.registry import load_recipe
from leapformer.tasks.synthetic import task as task_module
from leapformer.tasks.synthetic.data import chance
from leapformer.tasks.synthetic.kinds import KINDS
from leapformer.training import train as train_module
from leapformer.training.recipes import RecipeError, recipe_names
from leapformer.training.run import Run
from leapformer.training.train import train
from leapformer.training.trainer import LeapformerTrainer

EVALUATED = 16  # in place of 512
NAMES = [name for name in recipe_names() if name.startswith("synthetic/")]
SMALL = (
    "hidden_size=16", "num_hidden_layers=1", "max_steps=4", "batch_size=4", "warmup_steps=1", "log_every=1",
    "eval_every=2", "save_every=3", "eval_tokens=100", "device=cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _few_are_evaluated(monkeypatch):
    monkeypatch.setattr(task_module, "EVALUATED", EVALUATED)


def prepared(name: str = "synthetic/parity", *overrides: str):
    recipe, task = load_recipe(name, [*SMALL, *overrides])
    return task.prepare(recipe, cache=Path("unused"))


class RightOrWrong(torch.nn.Module):
    """Knows the answers, and says another one at every fourth place."""

    device = torch.device("cpu")

    def __init__(self, data, length: int) -> None:
        super().__init__()
        self.vocab_size = data.kind.vocab_size
        batch = data.split("test", length=length).batch(range(EVALUATED))
        self.known = {
            tuple(ids): labels for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"], strict=True)
        }

    def forward(self, ids, use_cache):
        answers = torch.stack([self.known[tuple(row)] for row in ids.tolist()])[:, 1:].clamp(min=0)
        answers[:, ::4] = (answers[:, ::4] + 1) % self.vocab_size
        logits = torch.nn.functional.one_hot(answers, self.vocab_size) * 2.0
        return type("Output", (), {"logits": torch.nn.functional.pad(logits, (0, 0, 0, 1))})


# ---- recipes


def test_there_is_a_recipe_of_every_kind():
    assert {load_recipe(name)[0].data.kind for name in NAMES} == set(KINDS) and len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["leap", "cosformer", "softmax"])
def test_recipes_take_the_lengths_that_they_evaluate(name, attention):
    recipe, _ = load_recipe(name, [f"attention={attention}"])
    assert recipe.model["max_position_embeddings"] == recipe.data.lengths[-1] + 1
    assert recipe.data.evaluate_at == [1, 2, 4]


WRONG = [
    (["length=0"], "data.length: expected greater than or equal to 1, found 0"),
    (["length=forty"], "data.length: expected a valid integer, unable to parse string as an integer, found 'forty'"),
    (["kind=pariti"], "data.kind: expected one of recall, copy-at, selective-copy, parity, addition, majority, "
     "brackets, found 'pariti'"),
    (["evaluate_at=[0]"], "data.evaluate_at: expected greater than or equal to 1, found 0"),
    (["evaluate_at=[]"], "data.evaluate_at: expected rising multiples, the first one 1, found []"),
    (["evaluate_at=[2, 4]"], "data.evaluate_at: expected rising multiples, the first one 1, found [2, 4]"),
    (["evaluate_at=[1, 4, 2]"], "data.evaluate_at: expected rising multiples, the first one 1, found [1, 4, 2]"),
    (["evaluate_at=[1, 8]", "attention=cosformer"], "data.evaluate_at: expected at most "
     "model.max_position_embeddings=161 tokens, found 321 (data.length=40 times 8, and one that closes a sequence); "
     "cosFormer's proportion is"),
    (["pairs=3"], "data.pairs: expected none, as kind parity has no such setting, found 3"),
    (["kind=brackets", "depth=0"], "data.depth: expected greater than or equal to 1, found 0"),
    (["kind=recall", "pairs=11"], "data.length: expected at least 44, four places for each of data.pairs=11, found 40"),
    (["kind=recall", "pairs=4", "vocabulary=7"], "data.vocabulary: expected at least 8, two for each of "
     "data.pairs=4, found 7"),
    (["kind=selective-copy", "marked=21"], "data.length: expected at least 42, two places for each of data.marked=21, "
     "found 40"),
    (["kind=selective-copy", "vocabulary=1"], "data.vocabulary: expected greater than or equal to 2, found 1"),
    (["kind=copy-at", "questions=20"], "data.length: expected at least 61, a text before data.questions=20 of "
     "data.digits=3, found 40"),
    (["kind=copy-at", "questions=4", "digits=2"], "data.digits: expected enough for the longest text of 152 "
     "symbols, found 2 of data.base=10"),
    (["hidden_size=15"], "model.hidden_size: expected "),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), WRONG)
def test_a_wrong_setting_is_one_line(overrides, said, capsys, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe("synthetic/parity", overrides)
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith(said)
    assert main(["train", "synthetic/parity", *overrides, "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"leapformer: recipe synthetic/parity: {caught.value.faults[0]}\n"


def test_a_resolved_recipe_has_the_settings_of_its_kind_written_out():
    data = load_recipe("synthetic/parity", ["kind=brackets"])[0].to_dict()["data"]
    assert data["depth"] == 8 and data["length"] == 40 and data["pairs"] is None


# ---- measuring


def test_loss_and_accuracy_against_answers_that_are_known():
    data = prepared("synthetic/parity", "eval_batch_tokens=1000")
    found = data.measure(RightOrWrong(data, 40), data.split("test", length=40), range(EVALUATED))
    assert found["accuracy"] == 0.75  # places 0, 4, ... of 40 are wrong
    total = torch.tensor([2.0, 0.0, 0.0])
    losses = -torch.log_softmax(total.double(), 0)
    assert found["loss"] == pytest.approx(float(0.75 * losses[0] + 0.25 * losses[1]), rel=1e-6)  # float32 sums
    assert found["accuracy_error"] == pytest.approx((0.75 * 0.25 / (40 * EVALUATED)) ** 0.5)


def test_the_loss_is_that_of_the_model_itself():
    data = prepared("synthetic/recall-64")
    torch.manual_seed(0)
    model = data.build_model().eval()
    dataset = data.split("validation", length=64)
    with torch.no_grad():
        own = model(**dataset.batch(range(EVALUATED))).loss
    assert data.measure(model, dataset, range(EVALUATED))["loss"] == pytest.approx(float(own), rel=1e-5)
    assert data.count_targets(dataset.batch(range(3))) == 3 * 8


def test_what_is_seen_in_training_depends_on_its_seed_and_validation_does_not():
    one, other = prepared("synthetic/parity", "seed=1"), prepared("synthetic/parity", "seed=2")
    assert len(one.train_dataset) == 4 * 4
    assert not torch.equal(one.train_dataset[0]["input_ids"], other.train_dataset[0]["input_ids"])
    for split, same in (("train", False), ("validation", True), ("test", True)):
        ids = [data.split(split, length=40).batch(range(9))["input_ids"] for data in (one, other)]
        assert torch.equal(*ids) == same
    assert torch.equal(one.split("train", length=40)[0]["input_ids"], one.train_dataset[0]["input_ids"])


def test_a_split_that_is_not_there():
    data = prepared()
    with pytest.raises(LeapformerError, match=r"^split 'dev': expected one of train, validation, test$"):
        data.evaluate(data.build_model(), split="dev")


def test_a_model_of_other_data_is_refused():
    other = prepared("synthetic/addition").build_model()
    with pytest.raises(LeapformerError, match="expected a model of vocab_size=3, as the data has it, found 6"):
        prepared().check_model(other)
    short = prepared("synthetic/parity", "evaluate_at=[1]", "max_position_embeddings=41", "attention=cosformer")
    with pytest.raises(LeapformerError, match="expected at most model.max_position_embeddings=41 tokens, found 161"):
        prepared().check_model(short.build_model())


# ---- runs


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(name, tmp_path):
    outcome = train(*load_recipe(name, [*SMALL, "max_steps=1", "evaluate_at=[1]"]), tmp_path / "run")
    assert outcome.results is not None and outcome.results["tokens"] > 0
    metrics = outcome.results["splits"]["validation"]
    assert metrics["loss"] > 0 and 0 <= metrics["accuracy"] <= 1 and 0 < metrics["chance"] < 1


def test_train_evaluate_compare(tmp_path, capsys):
    folders = [tmp_path / attention for attention in ("leap", "softmax")]
    for folder in folders:
        overrides = [f"attention={folder.name}", *SMALL]
        assert main(["train", "synthetic/majority", *overrides, "--output", str(folder)]) == 0
    said = capsys.readouterr().out
    results = json.loads((folders[0] / "results.json").read_text())
    metrics = results["splits"]["validation"]
    told = ", ".join(f"{metrics[f'accuracy{times}']:.1%} at {tokens} tokens" for times, tokens in
                     (("", 40), ("_at_2", 80), ("_at_4", 160)))  # fmt: skip
    assert f"validation: accuracy {told} (chance {metrics['chance']:.1%}), loss {metrics['loss']:.4f} nats; " in said
    assert (results["task"], results["kind"], results["length"]) == ("synthetic", "majority", 40)
    assert results["tokens"] == 4 * 4 * 40 and metrics["examples"] == EVALUATED
    assert {
        f"{name}{at}" for name in ("loss", "accuracy", "accuracy_error", "chance") for at in ("", "_at_2", "_at_4")
    } | {"examples"} == set(metrics)
    assert main(["evaluate", str(folders[0]), "--split", "test"]) == 0
    printed = capsys.readouterr().out
    test = json.loads((folders[0] / "results.json").read_text())["splits"]["test"]
    assert test.keys() == metrics.keys() and test["loss"] != metrics["loss"]
    assert f"accuracy_at_4                {test['accuracy_at_4']:.5g}" in printed
    assert main(["evaluate", str(folders[0])]) == 0
    assert json.loads((folders[0] / "results.json").read_text())["splits"]["validation"] == pytest.approx(metrics)
    capsys.readouterr()
    assert main(["compare", *map(str, folders), "--markdown", "--output", str(tmp_path / "page.html")]) == 0
    table = capsys.readouterr().out
    assert "| model | seeds | accuracy | at twice | at four times | chance | loss | tokens/s | MiB |" in table
    assert table.count("\n| LeaPformer (gated) | 0 | ") == 1 and "majority" not in table
    page = (tmp_path / "page.html").read_text()
    assert "an accuracy of" in page and "at four times" in page and "bits per byte" not in page
    assert type(LeapformerForCausalLM.from_pretrained(folders[0] / "model")) is LeapformerForCausalLM


def test_an_interrupted_run_sees_the_same_sequences(tmp_path, monkeypatch):
    class PressesCtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    recipe, task = load_recipe("synthetic/selective-copy", [*SMALL, "evaluate_at=[1]"])
    train(recipe, task, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            train_module,
            "LeapformerTrainer",
            lambda callbacks, **rest: LeapformerTrainer(callbacks=[*callbacks, PressesCtrlC()], **rest),
        )
        assert train(recipe, task, tmp_path / "parts").results is None
    assert train(recipe, task, tmp_path / "parts").results is not None
    last = [load_file(Run(tmp_path / name).checkpoints()[-1] / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())
    assert yaml.safe_load((tmp_path / "parts" / "recipe.yaml").read_text()) == recipe.to_dict()


def test_batches_of_the_training_are_labelled_where_something_is_asked():
    data = prepared("synthetic/copy-at")
    batch = data.collator([data.train_dataset[index] for index in range(4)])
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 65)
    assert ((batch["labels"] != IGNORE_INDEX).sum(1) == 12).all()


def test_the_documentation_has_the_chance_of_every_recipe(monkeypatch):
    monkeypatch.undo()  # all 512
    page = (Path(__file__).parents[3] / "docs" / "synthetic.md").read_text(encoding="utf-8")
    for name in NAMES:
        recipe, task = load_recipe(name)
        data = task.prepare(recipe, cache=Path("unused"))
        found = [f"{100 * chance(data.split('validation', length=length)):.1f}" for length in recipe.data.lengths]
        assert f"| `{name}` | {', '.join(found)} |" in page
