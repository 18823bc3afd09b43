"""A loss, gradient or weight that is no number ends a training in one line, and nothing that was saved is lost."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from leapformer.cli import main
from leapformer.errors import LeapformerError
from leapformer.files.reading import parse_json, read_json_object
from leapformer.tasks.lm.task import LanguageModelData
from leapformer.training.loading import load_model
from leapformer.training.run import Run
from leapformer.training.train import train
from leapformer.training.trainer import LeapformerTrainer, TrainingDiverged

from .builders import tiny_recipe, write_recipe

# The first step's weights are beyond any loss in float32.
TOO_FAST = ["learning_rate=1e38", "clip=0", "warmup_steps=0", "max_steps=6"]


def rows(run: Run) -> list[dict]:
    return [parse_json(line, where="metrics") for line in run.metrics_path.read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [[], ["bf16=true", "accumulation=2"], ["optimizer=nesterov"], ["optimizer=muon"]],
    ids=["plain", "bf16", "nesterov", "muon"],
)
def test_training_stops_at_the_first_loss_that_is_no_number(tmp_path, changes):
    recipe, task = tiny_recipe(tmp_path, *TOO_FAST, *changes)
    with pytest.raises(TrainingDiverged) as caught:
        train(recipe, task, tmp_path / "run")
    message = str(caught.value)
    assert "training diverged in step 2 of 6: the loss is " in message and "smaller learning_rate" in message
    assert "at learning rate 1e+38" in message or "at learning rate 9" in message
    assert "\n" not in message and ("bf16=false" in message) == bool("bf16=true" in changes)
    *before, last = rows(Run(tmp_path / "run"))
    assert [row["step"] for row in before] == [1] and math.isfinite(before[0]["loss"])
    assert (last["step"], last["diverged"], last["loss"]) == (2, True, None) and last["learning_rate"] > 9e37


def with_bad_gradient(step: int, value: float):
    """training_step, with one value of the gradient replaced in a step."""
    original = LeapformerTrainer.training_step

    def training_step(trainer, model, inputs, num_items_in_batch=None):
        loss = original(trainer, model, inputs, num_items_in_batch)
        if trainer.state.global_step + 1 == step:
            next(trainer.model.parameters()).grad.view(-1)[0] = value
        return loss

    return training_step


@pytest.mark.parametrize("clip", ["1.0", "0"])
def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path, monkeypatch, caplog, clip):
    recipe, task = tiny_recipe(tmp_path, f"clip={clip}")
    with monkeypatch.context() as patch:
        patch.setattr(LeapformerTrainer, "training_step", with_bad_gradient(5, math.inf))
        with pytest.raises(
            TrainingDiverged, match="in step 5 of 8: the norm of the gradient is (inf|nan) at .*"
        ) as caught:
            train(recipe, task, tmp_path / "run")
    assert str(caught.value).endswith("checkpoint-3 and the best model (of step 4) are as before")
    run = Run(tmp_path / "run")
    assert rows(run)[-1]["grad_norm"] is None and math.isfinite(rows(run)[-1]["loss"])
    assert not list(run.path.rglob(".*"))
    model = load_model(run.model_path)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    # The same command goes on from the last checkpoint, and says what happened there.
    with caplog.at_level(logging.WARNING, logger="leapformer"):
        assert train(recipe, task, run.path).results is not None
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("leapformer")]
    assert "this run diverged in step 5; it goes on from checkpoint-3" in warning and "--output" in warning
    assert not any("diverged" in row for row in rows(run))
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 9))


def test_a_first_step_that_fails_points_to_the_data(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path)
    monkeypatch.setattr(LeapformerTrainer, "training_step", with_bad_gradient(1, math.nan))
    with pytest.raises(TrainingDiverged, match="in step 1 of 8: .* look at the data and the model$"):
        train(recipe, task, tmp_path / "run")


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    """They can overflow in the last step, which no loss comes after."""
    recipe, task = tiny_recipe(tmp_path, "max_steps=4", "save_every=3")
    original = LeapformerTrainer.evaluate

    def evaluate(trainer, *arguments, **rest):
        with torch.no_grad():
            next(trainer.model.parameters()).view(-1)[0] = math.nan
        return original(trainer, *arguments, **rest)

    monkeypatch.setattr(LeapformerTrainer, "evaluate", evaluate)
    with pytest.raises(TrainingDiverged, match="in step 4 of 4: a weight is nan .*; checkpoint-3 is as before$"):
        train(recipe, task, tmp_path / "run")
    assert [path.name for path in Run(tmp_path / "run").checkpoints()] == ["checkpoint-3"]
    assert not Run(tmp_path / "run").model_path.exists()


@pytest.mark.parametrize("values", [[math.nan, 5.0], [5.0, -math.inf]])
def test_the_best_model_is_never_that_of_a_loss_that_is_no_number(tmp_path, monkeypatch, values):
    recipe, task = tiny_recipe(tmp_path)
    given = iter(values)
    monkeypatch.setattr(LanguageModelData, "quick_metrics", lambda data, model: {"loss": next(given)})
    outcome = train(recipe, task, tmp_path / "run")
    assert outcome.results is not None
    state = read_json_object(outcome.run.checkpoints()[-1] / "trainer_state.json")
    assert (state["best_metric"], state["best_global_step"]) == (5.0, 4 * (1 + values.index(5.0)))
    assert [row["eval_loss"] for row in rows(outcome.run) if "eval_loss" in row] == [
        value if math.isfinite(value) else None for value in values
    ]


def test_a_run_without_a_best_model_says_why(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path)
    monkeypatch.setattr(LanguageModelData, "quick_metrics", lambda data, model: {"loss": math.nan})
    with pytest.raises(LeapformerError, match="no model/, as no evaluation gave a finite loss; the weights .*-8$"):
        train(recipe, task, tmp_path / "run")


def test_the_command_ends_with_one_line_and_code_2(tmp_path, capsys):
    assert main(["train", str(write_recipe(tmp_path)), *TOO_FAST, "--output", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"leapformer: {tmp_path / 'run'}: training diverged in step 2 of 6")


def test_results_with_a_loss_that_is_no_number_are_json(tmp_path):
    run = Run(tmp_path)
    run.write_results({"splits": {"validation": {"loss": math.nan}}, "curve": [math.inf, 1.0]})
    run.log({"step": 1, "loss": -math.inf})
    assert json.loads(run.results_path.read_text(), parse_constant=pytest.fail)["curve"] == [None, 1.0]
    assert rows(run) == [{"step": 1, "loss": None}]
