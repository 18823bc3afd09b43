"""``leapformer compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import a_path
from leapformer.cli.printing import print_table

UNITS = "loss in nats a token; ppl perplexity; MiB peak memory; parameters in all, and those that LeaP adds"
LAGGING = "; LAAL lagging of the words behind the source; offline: the whole source read first"


@needs("plots", "rich.table", "leapformer.analysis.runs", "leapformer.analysis.tables")
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", parser=a_path, help="Folders of finished runs.")],
    split: Annotated[str, typer.Option(help="The split whose figures are compared.")] = "validation",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(parser=a_path, metavar="PATH", help="Also write a self-contained HTML page to this file."),
    ] = None,
) -> None:
    """One table of quality, speed, memory and parameters; several seeds give a mean and a paired difference."""
    from leapformer.analysis.markdown import markdown_table
    from leapformer.analysis.runs import load_run
    from leapformer.analysis.tables import comparison
    from leapformer.files.writing import regular_or_new

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
