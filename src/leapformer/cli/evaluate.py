"""``leapformer evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from leapformer.cli.keeping import cache_of, keep
from leapformer.cli.train import use_threads
from leapformer.errors import LeapformerError
from leapformer.tasks.registry import load_recipe
from leapformer.training.callbacks import passing_bar
from leapformer.training.run import Run


def evaluate_run(folder: Path, *, split: str, context_window: int | None, threads: int | None) -> None:
    """Print the metrics of a split as lines of "name value" and keep them in results.json where the run is finished.

    Figures with a context window that is not the recipe's are kept beside the others, under a name that says so.
    """
    use_threads(threads)
    run = Run(folder)
    run.recipe()
    results = run.results() if run.finished else None  # before what takes long
    overrides = [] if context_window is None else [f"data.context_window={context_window}"]
    own, _ = load_recipe(run.recipe_path)
    recipe, task = load_recipe(run.recipe_path, overrides)
    model, tokenizer = task.open(run.model_path)
    with cache_of(run) as cache:
        data = task.prepare(recipe, cache=cache, tokenizer=tokenizer, progress=passing_bar)
        data.check_model(model)
        found = data.evaluate(model, split=split)
    for name, value in {**found["metrics"], **found.get("baselines", {})}.items():
        typer.echo(f"{name:28} {value:.5g}" if isinstance(value, float) else f"{name:28} {value}")
    if results is not None:
        name = split if recipe == own else f"{split}, context window {context_window}"
        results["splits"][name] = found["metrics"]
        if keep(lambda: run.write_results(results), what="the figures"):
            typer.echo(f"Written to {run.results_path}")


def evaluate_latency(
    folder: Path, *, split: str, k: str, batched: bool, limit: int | None, threads: int | None
) -> None:
    """Translate a split live with each k and offline; keep the logs, and the curve in results.json."""
    from leapformer.tasks.simulst.curves import FOLDER, evaluate_curve, parse_ks
    from leapformer.tasks.simulst.live import translate_live

    use_threads(threads)
    run = Run(folder)
    run.recipe()
    recipe, task = load_recipe(run.recipe_path)
    if task.name != "simulst":
        raise LeapformerError(f"{folder}: --k: expected a run of simultaneous translation, found task {task.name}")
    ks = parse_ks(k)
    results = run.results() if run.finished else None
    model, tokenizer = task.open(run.model_path)
    factors: dict[int | None, float | None] = {}

    def write(value: int | None) -> Any:
        if batched:
            return data.simulate(model, split=split, k=value, limit=limit)
        instances, factors[value] = translate_live(data, model, split=split, k=value, limit=limit)
        return instances

    kept: list[bool] = []

    def keep_log(write: Callable[[], None]) -> None:
        if all(kept):  # said once
            kept.append(keep(write, what="the logs"))

    with cache_of(run) as cache:
        data: Any = task.prepare(recipe, cache=cache, tokenizer=tokenizer, progress=passing_bar)
        data.check_model(model)
        points = evaluate_curve(
            run.path, split, ks, write=write, real_time_factor=factors.get, told=_tell_point, keep=keep_log
        )
    if all(kept):
        typer.echo(f"Written to {run.path / FOLDER / split}: the log of each k")
    if results is not None:
        results.setdefault("curves", {})[split] = points
        if keep(lambda: run.write_results(results), what="the curve"):
            typer.echo(f"Written to {run.results_path}: the curve")


def _tell_point(point: dict[str, Any]) -> None:
    """One line for a k."""
    name = "offline" if point["k"] is None else f"k = {point['k']}"
    shown = {key: value for key, value in point.items() if key not in ("k", "sentences")}
    typer.echo(f"{name:8} " + "  ".join(f"{key} {value:.4g}" for key, value in shown.items()))
