"""``leapformer compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from leapformer.analysis.markdown import markdown_table
from leapformer.analysis.runs import load_run
from leapformer.analysis.tables import comparison
from leapformer.files.writing import regular_or_new

UNITS = "loss in nats a token; ppl perplexity; MiB peak memory; parameters in all, and those that LeaP adds"
LAGGING = "; LAAL lagging of the words behind the source; offline: the whole source read first"
WIDEST = 1000  # columns that a table may take


def compare_runs(folders: Sequence[Path], *, split: str, markdown: bool, output: Path | None) -> None:
    """Print one table over all runs, what the paired seeds say, and optionally write the page."""
    if output is not None:
        regular_or_new(output)
    runs = [load_run(folder) for folder in folders]
    result = comparison(runs, split=split)
    for columns, rows in ((result.columns, result.rows), (["run", *result.columns[1:]], result.runs)):
        if rows:
            typer.echo(markdown_table(columns, rows) + "\n") if markdown else print_table(columns, rows)
    typer.echo(UNITS + (LAGGING if any("LAAL" in column for column in result.columns) else ""))
    for line in result.notes:
        typer.echo(line)
    if output is not None:
        from leapformer.analysis.report import write_report

        typer.echo(f"Written to {write_report(output, runs, title='Comparison', split=split)}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text to the terminal, whole: lines that are longer than it is wide go on in the next, uncut."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    plain: Any = {"markup": False, "emoji": False, "highlight": False}  # a name such as "[/]" is no markup
    needed = Console(width=WIDEST, **plain).measure(table).maximum
    Console(width=max(Console().width, needed), **plain).print(table)
