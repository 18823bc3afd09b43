"""``leapformer data``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from leapformer.errors import LeapformerError
from leapformer.tasks.lra.card import CARD, TASKS
from leapformer.tasks.lra.preparation import Progress, prepare

PREFIX = "lra-"
SHOWN_BAD_ROWS = 20


def prepare_data(name: str, *, output: Path, **arguments: Any) -> None:
    """Prepare a data set under a progress bar, and say what it holds."""
    names = [PREFIX + task for task in TASKS]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise LeapformerError(f"data prepare: expected one of {', '.join(names)}, found {name!r}{hint}")
    try:
        with _progress(name) as progress:
            card = prepare(name.removeprefix(PREFIX), output, progress=progress, **arguments)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; {output} is not complete. The same command goes on.")
        raise typer.Exit(130) from None
    bad = card["bad_rows"]
    for row in bad[:SHOWN_BAD_ROWS]:
        typer.echo(f"skipped: {row}", err=True)
    if bad:
        typer.echo(f"{len(bad):,} bad rows were skipped; {output / CARD} lists them", err=True)
    for split, facts in card["splits"].items():
        typer.echo(
            f"{split}: {facts['examples']:,} examples, {facts['shortest']:,} to {facts['longest']:,} tokens "
            f"(mean {facts['mean_length']:,.1f}), {facts['bytes'] / 1e6:,.1f} MB"
        )
    typer.echo(f"Written to {output}: {CARD} and a file for each split")


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """A bar on the error stream for each part of the work, drawn rarely where nobody watches."""
    bars: dict[str, tqdm] = {}

    def show(done: int, total: int | None, what: str) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = tqdm(
                total=total,
                desc=f"{name}: {what}",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30.0,
            )
        bars[what].total = total
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
