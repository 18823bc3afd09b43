"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDEST = 1000  # columns that a table may take


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text to the terminal, whole: lines that are longer than it is wide go on in the next, uncut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    plain: Any = {"markup": False, "emoji": False, "highlight": False}  # a name such as "[/]" is no markup
    needed = Console(width=WIDEST, **plain).measure(table).maximum
    Console(width=max(Console().width, needed), **plain).print(table)
