"""``leapformer compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from leapformer.analysis.runs import load_run
from leapformer.analysis.tables import Comparison, comparison, markdown_table

UNITS = "loss in nats a token; ppl perplexity; MiB peak memory; parameters in all, and those that LeaP adds"


def compare_runs(folders: Sequence[Path], *, split: str, markdown: bool, output: Path | None) -> None:
    """Print one table over all runs, what the paired seeds say, and optionally write the page."""
    runs = [load_run(folder) for folder in folders]
    result = comparison(runs, split=split)
    if markdown:
        typer.echo(markdown_table(result.columns, result.rows))
    else:
        print_table(result)
    typer.echo(UNITS)
    for line in result.notes:
        typer.echo(line)
    if output is not None:
        from leapformer.analysis.report import write_report

        typer.echo(f"Written to {write_report(output, runs, title='Comparison')}")


def print_table(result: Comparison) -> None:
    """Print a comparison to the terminal."""
    table = Table(*result.columns, box=None, pad_edge=False)
    for row in result.rows:
        table.add_row(*row)
    Console().print(table)
