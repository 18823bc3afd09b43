"""Training from a recipe to results: order of the data, resuming, saving, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from leapformer.errors import LeapformerError
from leapformer.training import train as train_module
from leapformer.training.loading import load_model, load_tokenizer
from leapformer.training.machine import peak_memory_mib, reset_peak_memory
from leapformer.training.run import Run
from leapformer.training.train import train
from leapformer.training.trainer import LeapformerTrainer, PassSampler

from .builders import tiny_recipe, write_recipe
from .test_saving import largest_file


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = Run(run).last_checkpoint()
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in Run(run).metrics() if "loss" in event]


class PressesCtrlC(TrainerCallback):
    """Sends this process the signal of Ctrl-C, or another one, inside a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step = step
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Have the next trainings interrupted in step `step`."""
    monkeypatch.setattr(
        train_module,
        "LeapformerTrainer",
        lambda callbacks, **rest: LeapformerTrainer(callbacks=[*callbacks, PressesCtrlC(step, number)], **rest),
    )


def test_a_whole_run(tmp_path):
    recipe, task = tiny_recipe(tmp_path)
    outcome = train(recipe, task, tmp_path / "runs" / "a")
    run, results = outcome.run, outcome.results
    assert results is not None and results == json.loads(run.results_path.read_text())
    assert (results["attention"], results["seed"], results["steps"], outcome.step) == ("leap", 0, 8, 8)
    assert results["tokens"] == 8 * 4 * 15 and results["tokens_per_second"] > 0 and results["peak_memory_mib"] > 0
    assert results["parameters_leap"] > 0 and results["splits"]["validation"]["word_perplexity"] > 1
    assert set(results["baselines"]) == {"unigram_word_perplexity", "bigram_word_perplexity"}
    assert [event["step"] for event in run.metrics() if "eval_loss" in event] == [4, 8]
    assert [step for step, _ in losses(run.path)] == list(range(1, 9))
    assert yaml.safe_load(run.recipe_path.read_text()) == recipe.to_dict()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-6", "checkpoint-8"]
    assert any(run.tensorboard_path.iterdir())
    assert not list(run.path.rglob("*.bin")) and not list(run.path.rglob(".*"))
    assert load_tokenizer(run.model_path)("ab")["input_ids"] == [97, 98]
    with pytest.raises(LeapformerError, match="this run is finished; choose another --output"):
        train(recipe, task, run.path)


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """Ctrl-C in step 4 of 8, between two saves and two evaluations, with dropout."""
    recipe, task = tiny_recipe(tmp_path, "seed=1", "accumulation=2", "batch_size=3")
    train(recipe, task, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        outcome = train(recipe, task, tmp_path / "parts")
    assert outcome.results is None and outcome.step == 5 and signal.getsignal(signal.SIGINT) is handler
    assert Run(tmp_path / "parts").last_checkpoint() == tmp_path / "parts" / "checkpoints" / "checkpoint-5"
    torch.manual_seed(99)  # whatever ran in between
    outcome = train(recipe, task, tmp_path / "parts")
    assert outcome.results is not None
    whole, parts = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert outcome.results["tokens"] == 8 * 6 * 15
    best = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_run_killed_after_a_save_rewinds_its_metrics(tmp_path):
    recipe, task = tiny_recipe(tmp_path)
    train(recipe, task, tmp_path / "whole")
    run = Run(tmp_path / "whole")
    whole = last_weights(run.path)
    run.results_path.unlink()
    for checkpoint in run.checkpoints()[1:]:
        (checkpoint / "model.safetensors").unlink()
        for path in checkpoint.iterdir():
            path.unlink()
        checkpoint.rmdir()
    assert run.last_checkpoint() == run.checkpoints_path / "checkpoint-6"
    assert train(recipe, task, run.path).results is not None
    assert [step for step, _ in losses(run.path)] == list(range(1, 9))
    assert all(torch.equal(value, whole[name]) for name, value in last_weights(run.path).items())


def test_an_unfinished_run_of_another_recipe_is_refused(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        train(recipe, task, tmp_path / "run")
    other, _ = tiny_recipe(tmp_path, "learning_rate=0.5")
    with pytest.raises(LeapformerError, match="another recipe .training.learning_rate was 0.003, now 0.5."):
        train(other, task, tmp_path / "run")


def test_foreign_folders_and_files_are_refused(tmp_path):
    recipe, task = tiny_recipe(tmp_path)
    with pytest.raises(LeapformerError, match="expected an empty folder or an unfinished run"):
        train(recipe, task, tmp_path)
    with pytest.raises(LeapformerError, match="expected a folder for the run, found a file"):
        train(recipe, task, tmp_path / "text.txt")


def test_missing_data_writes_nothing(tmp_path):
    recipe, task = tiny_recipe(tmp_path, f"path={tmp_path}/nothing.txt")
    with pytest.raises(LeapformerError, match="nothing.txt"):
        train(recipe, task, tmp_path / "runs" / "a")
    assert not (tmp_path / "runs").exists()


def test_a_damaged_checkpoint_is_told_with_the_way_out(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        train(recipe, task, tmp_path / "run")
    for name in ("model.safetensors", "optimizer.pt"):
        path = tmp_path / "run" / "checkpoints" / "checkpoint-5" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(LeapformerError, match=f"{name}: .* cut off.* remove .*checkpoint-5 to resume from"):
            train(recipe, task, tmp_path / "run")
        path.write_bytes(whole)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path)
    save = LeapformerTrainer._save_checkpoint

    def full_from_the_second_on(trainer, *arguments):
        with largest_file(10_000 if trainer.state.global_step > 3 else 2**40):
            save(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LeapformerTrainer, "_save_checkpoint", full_from_the_second_on)
        with pytest.raises(LeapformerError, match="checkpoint-6: could not be saved .*; what was saved before is"):
            train(recipe, task, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.last_checkpoint() == run.checkpoints_path / "checkpoint-3"
    assert not list(run.checkpoints_path.glob(".*"))
    assert train(recipe, task, run.path).results is not None


def test_accumulation_is_the_same_as_a_larger_batch(tmp_path):
    weights = []
    for name, overrides in {"one": ["batch_size=4"], "two": ["batch_size=2", "accumulation=2"]}.items():
        recipe, task = tiny_recipe(tmp_path, "hidden_dropout=0.0", "max_steps=3", *overrides)
        train(recipe, task, tmp_path / name)
        weights.append(last_weights(tmp_path / name))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-5, rtol=1e-4)


def test_attention_within_documents_trains_packed(tmp_path):
    recipe, task = tiny_recipe(tmp_path, "across_documents=false", "max_steps=2", "gradient_checkpointing=true")
    assert train(recipe, task, tmp_path / "run").results is not None


def test_the_order_of_the_data_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = list(PassSampler(10, total=25, seed=5))
    torch.manual_seed(2)
    assert first == list(PassSampler(10, total=25, seed=5)) != list(PassSampler(10, total=25, seed=6))
    assert len(first) == 25 and sorted(first[:10]) == sorted(first[10:20]) == list(range(10))


def test_every_attention_sees_the_same_data(tmp_path):
    seen = {}
    for attention in ("leap", "softmax"):
        recipe, task = tiny_recipe(tmp_path, f"attention={attention}", "seed=4")
        data = task.prepare(recipe, cache=tmp_path / "cache")
        torch.manual_seed(hash(attention) % 1000)
        sampler = PassSampler(len(data.train_dataset), total=12, seed=recipe.training.seed)  # type: ignore[arg-type]
        seen[attention] = torch.stack([data.train_dataset[index]["input_ids"] for index in islice(sampler, 8)])
    assert torch.equal(seen["leap"], seen["softmax"])


def test_a_model_of_another_kind_or_shape_is_refused(tmp_path):
    recipe, task = tiny_recipe(tmp_path, "max_steps=1")
    folder = train(recipe, task, tmp_path / "run").run.model_path
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        (
            {"model_type": "gpt2"},
            "expected a model of type 'leapformer' or 'leapformer_translation', found 'gpt2'|expected model_type "
            "'leapformer'",
        ),
        ({"hidden_size": 32}, "checkpoint|weights"),
        ({"attention": "linear"}, "expected the weights"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(LeapformerError, match=message):
            load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert not load_model(folder).training
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(LeapformerError, match="model.safetensors: expected whole safetensors weights"):
        load_model(folder)


def test_peak_memory_counts_from_the_reset():
    """Several runs in one process, as in the demo, must not see the memory of those before."""
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("the system has no peak that can be reset")
    block = torch.ones(50_000_000)
    with_block = peak_memory_mib()
    del block
    reset_peak_memory()
    assert peak_memory_mib() < with_block - 100


# ---- stops, locks and rows


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_that_end_a_program_leave_a_checkpoint(tmp_path, monkeypatch, number, code):
    recipe, task = tiny_recipe(tmp_path)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    interrupt_at(monkeypatch, 4, number)
    outcome = train(recipe, task, tmp_path / "run")
    assert (outcome.results, outcome.step, outcome.signal, outcome.exit_code) == (None, 5, number, code)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert Run(tmp_path / "run").last_checkpoint() == tmp_path / "run" / "checkpoints" / "checkpoint-5"


def test_a_row_of_losses_averages_over_an_interruption(tmp_path, monkeypatch):
    """Rows end at steps 4 and 8; the run stops after step 6 and goes on."""
    recipe, task = tiny_recipe(tmp_path, "log_every=4", "save_every=100")
    train(recipe, task, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        train(recipe, task, tmp_path / "parts")
    assert train(recipe, task, tmp_path / "parts").results is not None
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    rows = [event for event in Run(tmp_path / "parts").metrics() if "loss" in event]
    assert [(row["step"], row["loss_steps"]) for row in rows] == [(4, 4), (8, 4)]


def test_a_row_after_an_older_checkpoint_says_that_it_averages_less(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path, "log_every=4", "save_every=100")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        run = train(recipe, task, tmp_path / "run").run
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None
    (checkpoint / "SHA256SUMS").unlink()
    (checkpoint / "progress.json").write_text('{"targets": 360, "seconds": 1.0}')
    assert train(recipe, task, run.path).results is not None
    rows = [event for event in run.metrics() if "loss" in event]
    assert [(row["step"], row["loss_steps"]) for row in rows] == [(4, 4), (8, 2)]


def test_rewinding_keeps_whole_rows_up_to_the_step_as_they_are(tmp_path):
    run = Run(tmp_path)
    rows = [
        b'{"step": 1, "loss": 5.5}\n',
        b'{"step": 2, "lo\x00ss": \xff}\n',
        b"[]\n",
        b'{"step": "2"}\n',
        b"[" * 5000 + b"\n",
    ]
    rows += [b'{"step": 2, "loss":   5.25}\n', b'{"step": 3, "loss": 5}\n', b'{"step": 2']
    run.metrics_path.write_bytes(b"".join(rows))
    run.rewind(2)
    assert run.metrics_path.read_bytes() == rows[0] + rows[5]
    Run(tmp_path / "none").rewind(2)
    assert not (tmp_path / "none").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_its_metrics_again(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path)

    def killed(trainer, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LeapformerTrainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, task, tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]
    train(recipe, task, tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))


def test_a_folder_is_of_one_training_at_a_time(tmp_path):
    recipe, task = tiny_recipe(tmp_path)
    run = Run(tmp_path / "run")
    with run.locked():
        with pytest.raises(
            LeapformerError, match=rf"{run.path}: process {os.getpid()} on .* is at work in this folder"
        ):
            train(recipe, task, run.path)
        assert [path.name for path in run.path.iterdir()] == [".lock"]
    run.path.rmdir()


def test_a_lock_that_is_taken_while_the_data_are_prepared_counts(tmp_path, monkeypatch):
    recipe, task = tiny_recipe(tmp_path)
    run, prepare = Run(tmp_path / "run"), type(task).prepare
    with ExitStack() as held:

        def prepare_and_lock(*arguments, **rest):
            held.enter_context(run.locked())
            return prepare(*arguments, **rest)

        monkeypatch.setattr(type(task), "prepare", prepare_and_lock)
        with pytest.raises(LeapformerError, match="is at work in this folder"):
            train(recipe, task, run.path)
    assert not run.recipe_path.exists()


def test_a_run_killed_in_its_first_moment_is_taken_up(tmp_path):
    """What is there before recipe.yaml has its name: the lock, and the recipe half written."""
    recipe, task = tiny_recipe(tmp_path, "max_steps=1")
    run = Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / ".lock").write_text("process 1 on a machine")
    (run.path / ".saving-recipe.yaml").write_text("name: ti")
    run.check(recipe)
    (run.path / "notes.txt").touch()
    with pytest.raises(LeapformerError, match="found other files"):
        run.check(recipe)
    (run.path / "notes.txt").unlink()
    assert train(recipe, task, run.path).results is not None
    assert not list(run.path.rglob(".*"))


def test_checkpoints_have_numbers(tmp_path):
    run = Run(tmp_path)
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-²",
        "checkpoint-",
        "checkpoint-1x",
        "checkpoint-" + "9" * 40,
    ):
        (run.checkpoints_path / name).mkdir(parents=True)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.slow
def test_ranks_share_a_run_and_its_checkpoints(tmp_path):
    """torchrun with two processes: one writes, both stop at the same step, and both find their random state again."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    write_recipe(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = sorted(done.stdout.splitlines())
    for rank in "01":
        whole, stopped, resumed, diverged = (line.split(": ", 1)[1] for line in told if line.startswith(f"rank {rank}"))
        assert (whole, stopped, resumed) == ("1 whole 8 True", "2 parts 4 False", "3 parts 8 True")
        assert "training diverged in step 2 of 8" in diverged
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "checkpoint-8" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [event["step"] for event in Run(tmp_path / "diverged").metrics()] == [1, 2]


# What each rank does; only the second one gets Ctrl-C.
RANKS = """
import os, sys
from pathlib import Path
from leapformer.errors import LeapformerError
from leapformer.tasks.registry import load_recipe
from leapformer.training import train as train_module
from leapformer.training.trainer import LeapformerTrainer
from tests.training.test_train import PressesCtrlC

folder, rank, presses = Path(sys.argv[1]), os.environ["RANK"], []
train_module.LeapformerTrainer = lambda callbacks, **rest: LeapformerTrainer(callbacks=[*callbacks, *presses], **rest)

def run(number, name, *changes):
    recipe, task = load_recipe(folder / "tiny.yaml", changes)
    try:
        outcome = train_module.train(recipe, task, folder / name)
        print(f"rank {rank}: {number} {name} {outcome.step} {outcome.results is not None}", flush=True)
    except LeapformerError as error:
        print(f"rank {rank}: {number} {error}", flush=True)

run(1, "whole")
presses += [PressesCtrlC(3)] if rank == "1" else []
run(2, "parts")
presses.clear()
run(3, "parts")
run(4, "diverged", "learning_rate=1e38", "clip=0", "warmup_steps=0")
"""
