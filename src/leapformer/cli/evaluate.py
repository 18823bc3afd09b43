"""``leapformer evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from leapformer.cli import policy_options
from leapformer.cli.late import load, needs
from leapformer.cli.options import MOST, MOST_TOKENS, RunFolder, Threads, use_threads
from leapformer.errors import LeapformerError
from leapformer.files.showing import shown
from leapformer.tasks.simulst.streaming.policy_registry import DEFAULT


@policy_options.takes_policies(several=True)
@needs("lm", "leapformer.tasks.registry", "leapformer.training.callbacks", "leapformer.training.run")
def evaluate(
    folder: RunFolder,
    split: Annotated[str, typer.Option(help="validation, test or train.")] = "validation",
    context_window: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_TOKENS,
            help="Tokens each block repeats of the one before it; default: what the recipe says.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Translation: quality and lagging with {policy_options.names()}, at each value of its option; "
            "--k alone: wait-k with each k, and offline.",
        ),
    ] = None,
    batched: Annotated[
        bool, typer.Option("--batched", help="With these: many sentences at a time, without computation-aware lagging.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="With these: only the first so many sentences.")
    ] = None,
    threads: Threads = None,
    **options: Any,
) -> None:
    """Evaluate a trained run on a whole split; results.json keeps the figures."""
    use_threads(threads)
    given = policy_options.given(options)
    if policy is None and not given:
        _evaluate_run(folder, split=split, context_window=context_window)
        return
    load("speech", "leapformer.tasks.simulst.scoring.live", "leapformer.tasks.simulst.scoring.evaluation")
    _evaluate_latency(folder, Asked(split, policy or DEFAULT, given, batched, limit))


def _evaluate_run(folder: Path, *, split: str, context_window: int | None) -> None:
    """Print the metrics of a split as lines of "name value" and keep them in results.json where the run is finished.

    Figures with a context window that is not the recipe's are kept beside the others, under a name that says so.
    """
    from leapformer.cli.keeping import cache_of, keep
    from leapformer.tasks.registry import load_recipe
    from leapformer.training.callbacks import passing_bar
    from leapformer.training.run import Run

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


@dataclass(frozen=True)
class Asked:
    """What is translated, with which policy and the options of it that were given, and how."""

    split: str
    policy: str
    options: Mapping[str, str]
    batched: bool
    limit: int | None


def _evaluate_latency(folder: Path, asked: Asked) -> None:
    """Translate a split with each value of a policy's option (wait-k: and offline); keep the logs, and the scores in
    results.json."""
    from leapformer.cli.keeping import cache_of, keep
    from leapformer.tasks.registry import load_recipe
    from leapformer.tasks.simulst.scoring.curves import FOLDER, evaluate_curve, keep_points, point_title
    from leapformer.tasks.simulst.scoring.evaluation import writing
    from leapformer.tasks.simulst.scoring.live import translate_batched, translate_live
    from leapformer.tasks.simulst.streaming.policy_registry import parse_line
    from leapformer.training.callbacks import passing_bar
    from leapformer.training.run import Run

    split, limit = asked.split, asked.limit
    run = Run(folder)
    run.recipe()
    recipe, task = load_recipe(run.recipe_path)
    if task.name != "simulst":
        option = f"--{next(iter(asked.options))}" if asked.options else f"--policy {shown(asked.policy)}"
        raise LeapformerError(f"{folder}: {option}: expected a run of simultaneous translation, found task {task.name}")
    line = parse_line(asked.policy, asked.options)
    results = run.results() if run.finished else None
    model, tokenizer = task.open(run.model_path)
    factors: dict[Any, float | None] = {}

    def write(value: Any) -> Any:
        if asked.batched and line.entry.is_trained:
            return data.simulate(model, split=split, k=value, limit=limit)
        told = writing(value) if line.entry.is_trained else f"writing, {point_title(line, value)}"
        how: dict[str, Any] = {"split": split, "policy": line.policy(value), "limit": limit, "told": told}
        if asked.batched:
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
