"""``leapformer bench``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import MOST_THREADS, a_path, finite, use_threads
from leapformer.cli.printing import print_table
from leapformer.errors import LeapformerError
from leapformer.files.showing import shown

if TYPE_CHECKING:
    from leapformer.bench.benchmark import Benchmark
    from leapformer.bench.contenders import Contender
    from leapformer.bench.result import Result, Settings, Table

OUTPUT = Path("runs/bench")


@dataclass(frozen=True)
class Asked:
    """The options as they were given; None where a benchmark chooses for itself."""

    quick: bool = False
    lengths: str | None = None
    repeats: int | None = None
    threads: int = 1
    limit: float | None = None
    recipe: str | None = None
    output: Path = OUTPUT

    def settings(self) -> Settings:
        """What the benchmarks take. Raises LeapformerError for lengths that are none."""
        from leapformer.bench.benchmark import LIMIT, QUICK_LIMIT
        from leapformer.bench.result import Settings

        return Settings(
            output=self.output,
            quick=self.quick,
            lengths=parse_lengths(self.lengths),
            repeats=self.repeats or (3 if self.quick else 7),
            threads=self.threads,
            limit=self.limit or (QUICK_LIMIT if self.quick else LIMIT),
            recipe=self.recipe or Settings.recipe,
        )


@needs("plots", "leapformer.bench.benchmark", "leapformer.analysis.plots", "rich.progress")
def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[WHAT]", help="attention, decoding, training, overhead, processes, lra, streaming or all."
        ),
    ] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: about a minute for all.")] = False,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens, such as 512,4096; streaming: seconds. Default: each one's own.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Turns of the contenders; default: 7, quick: 3.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads of PyTorch.")] = 1,
    limit: Annotated[
        float | None,
        typer.Option(callback=finite, help="Seconds that one call may take; slower ones are listed as not run."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Whose model training measures; default: lm/wikitext2-small.")
    ] = None,
    output: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of JSON, tables and pictures.")
    ] = OUTPUT,
) -> None:
    """Measure speed and memory on this machine's processor, by ratios within one run."""
    run_bench(what, Asked(quick, lengths, repeats, threads, limit, recipe, output))


def run_bench(what: str, asked: Asked, others: Sequence[Contender] = ()) -> dict[str, Mapping[str, Any]]:
    """Measure, print the tables, and write JSON, Markdown and pictures; an interrupt keeps what was measured.

    `others` are timed beside the contenders that every installation has. Returns each benchmark's content.
    """
    from leapformer.bench.benchmark import NAMES, load_benchmark
    from leapformer.bench.result import Result, machine_line
    from leapformer.files.folders import check_output_folder

    chosen = NAMES if what == "all" else (what,)
    if what not in ("all", *NAMES):
        raise LeapformerError(f"bench: expected all, {', '.join(NAMES)}, found {shown(what)}")
    check_output_folder(asked.output)
    limit = asked.limit
    if limit is not None and not (limit > 0 and math.isfinite(limit)):
        raise LeapformerError(f"--limit: expected seconds above 0, found {limit:g}")
    if asked.recipe is not None and "training" not in chosen:
        raise LeapformerError(f"--recipe: only training has one, found it with {what}")
    settings = asked.settings()
    benchmarks = {name: load_benchmark(name) for name in chosen}
    for benchmark in benchmarks.values():
        benchmark.check(settings)
    use_threads(settings.threads)
    results: dict[str, Mapping[str, Any]] = {}
    for name, benchmark in benchmarks.items():
        own = settings if limit or settings.quick else replace(settings, limit=benchmark.limit)
        result = Result(name, own)
        results[name] = result.content
        finished = _measure(benchmark, own, result, others)
        _show(benchmark, result)
        if not finished:
            typer.echo(f"Interrupted; what was measured is in {result.path}")
            raise typer.Exit(130)
    typer.echo(machine_line(next(iter(results.values()))))
    typer.echo(f"Written to {settings.output}: JSON, Markdown tables and pictures (PNG)")
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
    from leapformer.bench.benchmark import Bench

    try:
        with _progress(result.content["benchmark"]) as say:
            benchmark.measure(Bench(settings, result, say, others))
    except KeyboardInterrupt:
        return False
    result.finish()
    return True


def _show(benchmark: Benchmark, result: Result) -> None:
    """Print and write the tables of a result and draw its pictures."""
    from leapformer.analysis.plots import figure_png
    from leapformer.bench.result import write_tables
    from leapformer.files.writing import write_bytes

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
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda text: progress.update(task, description=text)
