"""``leapformer train``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from leapformer.files.folders import check_output_folder
from leapformer.tasks.registry import describe, load_recipe
from leapformer.training.train import train


def train_recipe(recipe: str, overrides: Sequence[str], *, output: Path | None, threads: int | None) -> None:
    """Train to the end, or up to an interrupt, and say where everything lies."""
    use_threads(threads)
    resolved, task = load_recipe(recipe, overrides)
    folder = Path("runs") / default_name(resolved.name, overrides) if output is None else output
    check_output_folder(folder)
    outcome = train(resolved, task, folder, progress_bar=True)
    if outcome.results is None:
        command = shlex.join(["leapformer", "train", recipe, *overrides, "--output", str(folder)])
        typer.echo(f"Interrupted after step {outcome.step} of {resolved.training.max_steps}. To go on: {command}")
        raise typer.Exit(outcome.exit_code)
    typer.echo(f"validation: {describe(outcome.results)}")
    typer.echo(f"Written to {folder}: model/, metrics.jsonl, results.json, checkpoints/, tensorboard/")


def default_name(recipe: str, overrides: Sequence[str]) -> str:
    """The run's folder after its recipe and overrides, such as lm-pydocs-tiny-attention=leap."""
    parts = [recipe.replace("/", "-"), *(override.replace("/", "_") for override in overrides)]
    return "-".join(parts)


def use_threads(threads: int | None) -> None:
    """Set PyTorch's CPU threads where the user asked for it."""
    if threads is not None:
        torch.set_num_threads(threads)
