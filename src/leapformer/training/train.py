"""Train the model of a recipe from first to last: data, training, final evaluation, results."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from leapformer.training.arguments import choose_device, training_arguments
from leapformer.training.callbacks import MetricsFile, ProgressBar, Stop, interruptible
from leapformer.training.loading import load_model
from leapformer.training.recipes import Recipe
from leapformer.training.run import Run
from leapformer.training.task import Task
from leapformer.training.trainer import LeapformerTrainer


@dataclass(frozen=True)
class TrainingOutcome:
    """How a call of `train` ended. `results` is None where it was interrupted and can be resumed."""

    run: Run
    step: int
    results: dict[str, Any] | None


def train(recipe: Recipe, task: Task, output: str | Path, *, progress_bar: bool = False) -> TrainingOutcome:
    """Train a recipe into the folder `output`, or go on with the interrupted run that is there.

    The random generators of Python, numpy and torch are seeded with the recipe's seed.

    Arguments:
        recipe: validated, of the task's type.
        task: what the recipe's `task` names.
        output: folder of the run.
        progress_bar: show one on the error stream.

    Raises:
        LeapformerError: wrong data, a folder that holds something else, a damaged checkpoint, a full disk.
    """
    run = Run(output)
    run.check(recipe)
    data = task.prepare(recipe, cache=run.cache_path)
    checkpoint = run.start(recipe)
    section = recipe.training
    set_seed(section.seed)
    model = data.build_model()
    reset_peak_memory()
    stop = Stop()
    trainer: LeapformerTrainer

    def progress() -> tuple[int, float]:
        return trainer.tokens_seen, trainer.clock.seconds

    callbacks: list[Any] = [MetricsFile(run, progress), stop]
    if progress_bar:
        callbacks.append(ProgressBar(run.name, progress))
    trainer = LeapformerTrainer(
        model=model,
        data=data,
        section=section,
        run=run,
        args=training_arguments(section, checkpoints=run.checkpoints_path),
        callbacks=callbacks,
    )
    if checkpoint is not None:
        trainer.resume(checkpoint)
    with interruptible(stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if step < section.max_steps:
        return TrainingOutcome(run, step, None)
    results = _results(recipe, run, trainer)
    run.write_results(results)
    return TrainingOutcome(run, step, results)


def _results(recipe: Recipe, run: Run, trainer: LeapformerTrainer) -> dict[str, Any]:
    """What results.json holds, with the best model evaluated on the whole validation set."""
    peak_memory = peak_memory_mib()
    model = load_model(run.model_path).to(choose_device(recipe.training))
    evaluation = trainer.data.evaluate(model, split="validation")
    config = model.config
    seconds = trainer.clock.seconds
    return {
        "name": run.name,
        "recipe": recipe.name,
        "recipe_fingerprint": recipe.fingerprint,
        "attention": config.attention,
        "variant": config.variant,
        "conv_width": config.conv_width,
        "seed": recipe.training.seed,
        "parameters": model.num_parameters(),
        "parameters_leap": model.num_parameters_added_by_leap(),
        "steps": trainer.state.global_step,
        "tokens": trainer.tokens_seen,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(trainer.tokens_seen / max(seconds, 1e-9), 1),
        "peak_memory_mib": peak_memory,
        "splits": {"validation": evaluation.pop("metrics")},
        **evaluation,
        "machine": machine(),
        "versions": versions(),
        "git": git_revision(),
    }


def reset_peak_memory() -> None:
    """Let `peak_memory_mib` count from here on, where the system can do that (GPUs, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_mib() -> float:
    """The highest memory since `reset_peak_memory` in MiB: of the GPU's tensors, or else of the whole process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def machine() -> dict[str, Any]:
    """What the run ran on."""
    return {
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    packages = ("leapformer", "torch", "transformers", "accelerate", "tokenizers", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The commit of the source that ran, with "+changes" if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = _git("rev-parse", "--short=12", "HEAD", cwd=here)
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}+changes" if changed else revision


def _git(*arguments: str, cwd: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    """The model of the processor as Linux names it, or what Python knows."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
