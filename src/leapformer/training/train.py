"""Train the model of a recipe from first to last: data, training, final evaluation, results."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from leapformer.errors import LeapformerError
from leapformer.training import ranks
from leapformer.training.arguments import choose_device, training_arguments
from leapformer.training.callbacks import MetricsFile, ProgressBar, Stop, interruptible, passing_bar
from leapformer.training.loading import load_model
from leapformer.training.machine import git_revision, machine, peak_memory_mib, reset_peak_memory, versions
from leapformer.training.processes import helpers, process_count
from leapformer.training.recipes import Recipe
from leapformer.training.run import Run, checkpoint_step
from leapformer.training.task import Task, TaskData, untold
from leapformer.training.trainer import LeapformerTrainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOutcome:
    """How a call of `train` ended. `results` is None where it was interrupted and can be resumed.

    Attributes:
        signal: what interrupted it, such as signal.SIGINT; None if that was no signal.
    """

    run: Run
    step: int
    results: dict[str, Any] | None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """Of a command: 0, or where it was interrupted what shells give: 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.results is not None else 128 + (self.signal or signal.SIGINT)


def train(
    recipe: Recipe,
    task: Task,
    output: str | Path,
    *,
    progress_bar: bool = False,
    cache: Path | None = None,
) -> TrainingOutcome:
    """Train a recipe into the folder `output`, or go on with the interrupted run that is there.

    The random generators of Python, numpy and torch are seeded with the recipe's seed.

    Arguments:
        recipe: validated, of the task's type.
        task: what the recipe's `task` names.
        output: folder of the run.
        progress_bar: show one on the error stream.
        cache: where prepared data is kept; None: beside the run.

    Raises:
        LeapformerError: wrong data, a folder that holds something else or in which another training is at work, a
            damaged checkpoint, a full disk.
        TrainingDiverged: a loss, a gradient or a weight became no finite number; what was saved before is untouched.
    """
    run = Run(output)
    run.check_free()
    run.check(recipe)
    cache = run.cache_path if cache is None else cache
    arguments = training_arguments(recipe.training, checkpoints=run.checkpoints_path)
    assert arguments.device is not None  # asking for it is what makes the ranks of torchrun meet
    with ranks.first_before_others():
        data = task.prepare(recipe, cache=cache, progress=passing_bar if progress_bar else untold)
    with run.locked():
        return _train(recipe, task, run, data, arguments, cache=cache, progress_bar=progress_bar)


def _train(
    recipe: Recipe, task: Task, run: Run, data: TaskData, arguments: Any, *, cache: Path, progress_bar: bool
) -> TrainingOutcome:
    """Train in a folder that is ours alone."""
    with ranks.first_before_others():
        checkpoint = run.start(recipe)
    if ranks.is_first():
        _tell_of_divergence(run, checkpoint)
    before = task.pretraining(recipe)
    pretrained = None if before is None else _pretrain(*before, run, progress_bar, cache)
    if pretrained is not None and pretrained.results is None:
        return TrainingOutcome(run, 0, None, pretrained.signal)
    section = recipe.training
    set_seed(section.seed)
    model = data.build_model()
    if before is not None and pretrained is not None:
        data.take_over(model, load_model(pretrained.run.model_path, classes=before[1].model_classes))
    reset_peak_memory()
    stop = Stop()
    trainer: LeapformerTrainer

    def progress() -> tuple[int, float]:
        return trainer.targets_seen, trainer.clock.seconds

    callbacks: list[Any] = [MetricsFile(run, progress, data.unit), stop]
    if progress_bar:
        callbacks.append(ProgressBar(run.name, progress, data.unit))
    with helpers(model, section) as others:
        trainer = LeapformerTrainer(
            model=model,
            data=data,
            section=section,
            run=run,
            args=arguments,
            callbacks=callbacks,
            helpers=others,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
        if ranks.is_first():
            run.rewind(0 if checkpoint is None else checkpoint_step(checkpoint))
        with interruptible(stop), _closing(callbacks):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    ranks.meet()
    step = trainer.state.global_step
    if step < section.max_steps:
        return TrainingOutcome(run, step, None, stop.signal)
    results = _results(recipe, task, run, trainer)
    if pretrained is not None and pretrained.results is not None:
        results["pretraining"] = {
            key: pretrained.results[key] for key in ("recipe_fingerprint", "steps", "seconds", "splits")
        }
    if ranks.is_first():
        run.write_results(results)
    return TrainingOutcome(run, step, results)


def _tell_of_divergence(run: Run, checkpoint: Path | None) -> None:
    """A run that diverged may go on, but the same recipe does the same again on the same machine."""
    event = run.divergence()
    if event is not None:
        start = "step 1" if checkpoint is None else checkpoint.name
        _log.warning(
            "%s: this run diverged in step %s; it goes on from %s and will most likely do so again, as its recipe is "
            "the same; with another learning_rate, warmup_steps or clip it needs another --output",
            run.path,
            event["step"],
            start,
        )


@contextmanager
def _closing(callbacks: Sequence[Any]) -> Iterator[None]:
    """However the block ends, TensorBoard's file is whole and the bar's line is ended before anything else is said."""
    try:
        yield
    finally:
        for callback in callbacks:
            getattr(callback, "close", lambda: None)()


def _pretrain(recipe: Recipe, task: Task, run: Run, progress_bar: bool, cache: Path) -> TrainingOutcome:
    """The run that comes before this one, trained as far as it goes."""
    first = Run(run.pretraining_path)
    if first.finished:
        return TrainingOutcome(first, recipe.training.max_steps, first.results())
    return train(recipe, task, first.path, progress_bar=progress_bar, cache=cache)


def _results(recipe: Recipe, task: Task, run: Run, trainer: LeapformerTrainer) -> dict[str, Any]:
    """What results.json holds, with the best model evaluated on the whole validation set."""
    peak_memory = peak_memory_mib()
    if not run.model_path.is_dir():
        raise LeapformerError(
            f"{run.path}: there is no model/, as no evaluation gave a finite loss; the weights after step "
            f"{trainer.state.global_step} are in {run.checkpoints()[-1]}"
        )
    model = load_model(run.model_path, classes=task.model_classes).to(choose_device(recipe.training))
    evaluation = trainer.data.evaluate(model, split="validation")
    seconds, unit = trainer.clock.seconds, trainer.data.unit
    return {
        "name": run.name,
        "task": task.name,
        "recipe": recipe.name,
        "recipe_fingerprint": recipe.fingerprint,
        **trainer.data.describe_model(model),
        "seed": recipe.training.seed,
        "parameters": model.num_parameters(),
        "parameters_leap": model.num_parameters_added_by_leap(),
        "steps": trainer.state.global_step,
        unit: trainer.targets_seen,
        "seconds": round(seconds, 2),
        f"{unit}_per_second": round(trainer.targets_seen / max(seconds, 1e-9), 1),
        "peak_memory_mib": peak_memory,
        "splits": {"validation": evaluation.pop("metrics")},
        **evaluation,
        "processes": process_count(recipe.training),
        "machine": machine(),
        "versions": versions(),
        "git": git_revision(),
    }
