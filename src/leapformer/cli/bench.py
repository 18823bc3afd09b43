"""``leapformer bench``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from leapformer.analysis.plots import figure_png
from leapformer.bench.benchmark import LIMIT, NAMES, QUICK_LIMIT, Bench, Benchmark, load_benchmark
from leapformer.bench.contenders import Contender
from leapformer.bench.result import Result, Settings, Table, machine_line, write_tables
from leapformer.cli.compare import print_table
from leapformer.cli.train import use_threads
from leapformer.errors import LeapformerError
from leapformer.files.folders import check_output_folder
from leapformer.files.showing import shown
from leapformer.files.writing import write_bytes


def run_bench(
    what: str,
    *,
    quick: bool,
    lengths: str | None,
    repeats: int | None,
    threads: int,
    limit: float | None,
    recipe: str | None,
    output: Path,
    others: Sequence[Contender] = (),
) -> dict[str, Mapping[str, Any]]:
    """Measure, print the tables, and write JSON, Markdown and pictures; an interrupt keeps what was measured.

    `others` are timed beside the contenders that every installation has. Returns each benchmark's content.
    """
    chosen = NAMES if what == "all" else (what,)
    if what not in ("all", *NAMES):
        raise LeapformerError(f"bench: expected all, {', '.join(NAMES)}, found {shown(what)}")
    check_output_folder(output)
    if limit is not None and not (limit > 0 and math.isfinite(limit)):
        raise LeapformerError(f"--limit: expected seconds above 0, found {limit:g}")
    if recipe is not None and "training" not in chosen:
        raise LeapformerError(f"--recipe: only training has one, found it with {what}")
    settings = Settings(
        output=output,
        quick=quick,
        lengths=parse_lengths(lengths),
        repeats=repeats or (3 if quick else 7),
        threads=threads,
        limit=limit or (QUICK_LIMIT if quick else LIMIT),
        recipe=recipe or Settings.recipe,
    )
    benchmarks = {name: load_benchmark(name) for name in chosen}
    for benchmark in benchmarks.values():
        benchmark.check(settings)
    use_threads(threads)
    results: dict[str, Mapping[str, Any]] = {}
    for name, benchmark in benchmarks.items():
        own = settings if limit or quick else replace(settings, limit=benchmark.limit)
        result = Result(name, own)
        results[name] = result.content
        finished = _measure(benchmark, own, result, others)
        _show(benchmark, result)
        if not finished:
            typer.echo(f"Interrupted; what was measured is in {result.path}")
            raise typer.Exit(130)
    typer.echo(machine_line(next(iter(results.values()))))
    typer.echo(f"Written to {output}: JSON, Markdown tables and pictures (PNG)")
    return results


def parse_lengths(text: str | None) -> tuple[int, ...] | None:
    """ "512,4096" as ascending numbers; None for None.

    Raises:
        LeapformerError: something else.
    """
    if text is None:
        return None
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    for part in parts:
        if not (re.fullmatch("[0-9]+", part) and part.strip("0")):
            raise LeapformerError(f"--lengths: expected whole numbers above 0 such as 512,4096, found {shown(text)}")
        if len(part) > 9:
            raise LeapformerError(f"--lengths: expected whole numbers up to 999,999,999, found {shown(part)}")
    return tuple(sorted({int(part) for part in parts}))


def _measure(benchmark: Benchmark, settings: Settings, result: Result, others: Sequence[Contender]) -> bool:
    """Run one benchmark under a progress line; False where the user interrupted it."""
    try:
        with _progress(result.content["benchmark"]) as say:
            benchmark.measure(Bench(settings, result, say, others))
    except KeyboardInterrupt:
        return False
    result.finish()
    return True


def _show(benchmark: Benchmark, result: Result) -> None:
    """Print and write the tables of a result and draw its pictures."""
    tables = [table for table in benchmark.tables(result.content) if table.rows]
    for table in tables:
        show_table(table)
    write_tables(result.path.with_suffix(".md"), result.content, tables)
    for title, figure in benchmark.pictures(result.content):
        write_bytes(result.path.parent / f"{title}.png", figure_png(figure))


def show_table(table: Table) -> None:
    """Title, cells without their marks of bold type, and notes."""
    typer.echo(f"\n{table.title}")
    print_table(table.columns, [[cell.replace("**", "") for cell in row] for row in table.rows])
    for note in table.notes:
        typer.echo(note)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None]]:
    """A line on the error stream that says what is measured and since when; nothing where nobody watches."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda text: progress.update(task, description=text)
