"""Commands that look at a run which others own, or that lies on storage that can't be written: they work, keep less."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut
from leapformer.training.run import Run


@contextmanager
def cache_of(run: Run) -> Iterator[Path]:
    """Where data is prepared: the cache beside the run, or, where that can't be written, a folder that goes when the
    block ends, with links to what the cache holds already."""
    if can_write(run.cache_path):
        yield run.cache_path
        return
    with TemporaryDirectory(prefix="leapformer-") as folder:
        for entry in run.cache_path.iterdir() if run.cache_path.is_dir() else ():
            Path(folder, entry.name).symlink_to(entry.absolute())
        yield Path(folder)


def can_write(folder: Path) -> bool:
    """Whether files can be written into a folder, or into one made there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return os.access(there, os.W_OK | os.X_OK)


def keep(write: Callable[[], object], *, what: str) -> bool:
    """Write something that has been shown already; where that can't be done, say so in one line.

    Arguments:
        what: what is not kept then, such as "the figures".
    """
    try:
        write()
    except (LeapformerError, OSError) as error:
        typer.echo(f"{what[:1].upper()}{what[1:]} could not be kept: {cut(error, 400)}")
        return False
    return True
