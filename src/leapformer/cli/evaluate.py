"""``leapformer evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from leapformer.cli.keeping import cache_of, keep
from leapformer.cli.train import use_threads
from leapformer.errors import LeapformerError
from leapformer.files.showing import shown
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
    folder: Path,
    *,
    split: str,
    policy: str,
    options: Mapping[str, str],
    batched: bool,
    limit: int | None,
    threads: int | None,
) -> None:
    """Translate a split with each value of a policy's option (wait-k: and offline); keep the logs, and the scores in
    results.json."""
    from leapformer.tasks.simulst.scoring.curves import FOLDER, evaluate_curve, keep_points, point_title
    from leapformer.tasks.simulst.scoring.evaluation import writing
    from leapformer.tasks.simulst.scoring.live import translate_batched, translate_live
    from leapformer.tasks.simulst.streaming.policy_registry import parse_line

    use_threads(threads)
    run = Run(folder)
    run.recipe()
    recipe, task = load_recipe(run.recipe_path)
    if task.name != "simulst":
        asked = f"--policy {shown(policy)}" if not options else f"--{next(iter(options))}"
        raise LeapformerError(f"{folder}: {asked}: expected a run of simultaneous translation, found task {task.name}")
    line = parse_line(policy, options)
    results = run.results() if run.finished else None
    model, tokenizer = task.open(run.model_path)
    factors: dict[Any, float | None] = {}

    def write(value: Any) -> Any:
        if batched and line.entry.is_trained:
            return data.simulate(model, split=split, k=value, limit=limit)
        told = writing(value) if line.entry.is_trained else f"writing, {point_title(line, value)}"
        how: dict[str, Any] = {"split": split, "policy": line.policy(value), "limit": limit, "told": told}
        if batched:
            return translate_batched(data, model, **how)
        instances, factors[value] = translate_live(data, model, **how)
        return instances

    kept: list[bool] = []

    def keep_log(write: Callable[[], None]) -> None:
        if all(kept):  # said once
            kept.append(keep(write, what="the logs"))

    def tell(point: dict[str, Any]) -> None:
        title = point_title(line, point.get(line.option))
        scores = {key: value for key, value in point.items() if key not in (line.option, "sentences")}
        typer.echo(f"{title:8} " + "  ".join(f"{key} {value:.4g}" for key, value in scores.items()))

    with cache_of(run) as cache:
        data: Any = task.prepare(recipe, cache=cache, tokenizer=tokenizer, progress=passing_bar)
        data.check_model(model)
        points = evaluate_curve(
            run.path, split, line.values, line=line, write=write, real_time_factor=factors.get, told=tell, keep=keep_log
        )
    if all(kept):
        each = f"the log of each {line.option}" if line.option else "the log"
        typer.echo(f"Written to {run.path / FOLDER / split}: {each}")
    if results is not None:
        keep_points(results, split, line, points)
        if keep(lambda: run.write_results(results), what="the curve"):
            typer.echo(f"Written to {run.results_path}: the curve")
