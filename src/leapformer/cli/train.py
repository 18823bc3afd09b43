"""``leapformer train``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import Overrides, Threads, a_path, use_threads


@needs("lm", "leapformer.training.train", "leapformer.tasks.registry")
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name from 'leapformer recipes', or a .yaml file.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=a_path, metavar="PATH", help="Folder of the run; default: runs/NAME after the recipe."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a recipe, or go on with an interrupted run of it."""
    from leapformer.files.folders import check_output_folder
    from leapformer.tasks.registry import describe, load_recipe
    from leapformer.training.train import train as train_run

    overrides = overrides or []
    use_threads(threads)
    resolved, task = load_recipe(recipe, overrides)
    folder = Path("runs") / default_name(resolved.name, overrides) if output is None else output
    check_output_folder(folder)
    outcome = train_run(resolved, task, folder, progress_bar=True)
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
