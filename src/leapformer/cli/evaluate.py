"""``leapformer evaluate``."""

from __future__ import annotations

from pathlib import Path

import typer

from leapformer.cli.train import use_threads
from leapformer.tasks.registry import load_recipe
from leapformer.training.callbacks import evaluation_bar
from leapformer.training.loading import load_model
from leapformer.training.run import Run


def evaluate_run(folder: Path, *, split: str, context_window: int | None, threads: int | None) -> None:
    """Print the metrics of a split as lines of "name value" and keep them in results.json where the run is finished.

    Figures with a context window that is not the recipe's are kept beside the others, under a name that says so.
    """
    use_threads(threads)
    run = Run(folder)
    run.recipe()
    model = load_model(run.model_path)
    overrides = [] if context_window is None else [f"data.context_window={context_window}"]
    own, _ = load_recipe(run.recipe_path)
    recipe, task = load_recipe(run.recipe_path, overrides)
    data = task.prepare(recipe, cache=run.cache_path, tokenizer=task.load_tokenizer(run.model_path))
    data.progress = evaluation_bar
    found = data.evaluate(model, split=split)
    for name, value in {**found["metrics"], **found.get("baselines", {})}.items():
        typer.echo(f"{name:28} {value:.5g}" if isinstance(value, float) else f"{name:28} {value}")
    if run.finished:
        results = run.results()
        name = split if recipe == own else f"{split}, context window {context_window}"
        results["splits"][name] = found["metrics"]
        run.write_results(results)
        typer.echo(f"Written to {run.results_path}")
