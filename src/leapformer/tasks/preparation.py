"""What every preparation of data shares: bad rows, progress, and shards that are made in processes.

An interrupted preparation leaves a folder without card.json, which nothing takes for whole: files get their names when
they are complete, and the card is written last. Shards are kept in `.parts` until then, so that the same command goes
on where it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.showing import cut, shown
from leapformer.files.writing import is_staging_of, remove
from leapformer.tasks.card import CARD, read_card

PARTS = ".parts"
MOST_EXAMPLES = (
    10_000_000  # for training: fifty times the largest set of Long-Range Arena, and what a laptop's disk holds
)
MOST_WORKERS = 4_096


class Progress(Protocol):
    """What a preparation tells of itself."""

    def __call__(self, done: int, total: int | None, what: str) -> None: ...


def silent(done: int, total: int | None, what: str) -> None:
    """A progress that nobody watches."""


@dataclass
class BadRows:
    """What to do with a bad row: stop at the first, or count and list it and go on.

    Arguments:
        skip: go on.
    """

    skip: bool = False
    found: list[str] = field(default_factory=list)

    def report(self, message: str) -> None:
        """Note a bad row.

        Raises:
            LeapformerError: bad rows are not to be skipped.
        """
        if not self.skip:
            raise LeapformerError(message)
        self.found.append(message)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Notes the LeapformerError that ends the block, if bad rows are to be skipped. A missing package is no bad
        row.
        """
        try:
            yield
        except MissingExtra:
            raise
        except LeapformerError as error:
            self.report(str(error))


def processors() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_there(output: Path, made: Mapping[str, Any], ours: Collection[str]) -> bool:
    """Whether a folder is complete already.

    Arguments:
        made: what the data depend on, as the card keeps it under "made".
        ours: names of the files that an interrupted preparation may have left there, besides `.parts`.

    Raises:
        LeapformerError: it holds data that were made otherwise, or files that are not ours.
    """
    try:
        there = os.stat(output)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LeapformerError(f"--output {cut(output, 240)}: expected a folder, found {reason}") from None
    if not stat.S_ISDIR(there.st_mode):
        raise LeapformerError(f"--output {output}: expected a folder, found a file")
    if (output / CARD).is_file():
        found = read_card(output).get("made", {})
        for key, value in made.items():
            if found.get(key) != as_json(value):
                raise LeapformerError(
                    f"--output {output}: holds data with {key} {cut(found.get(key))}, expected {cut(value)}; "
                    "choose another --output"
                )
        _tidy(output, ours)
        return True
    others = [file.name for file in output.iterdir() if file.name != PARTS and not _is_ours(file.name, ours)]
    if others:
        raise LeapformerError(
            f"--output {output}: expected an empty folder, found {min(others)}; choose another --output"
        )
    return False


def _is_ours(name: str, ours: Collection[str]) -> bool:
    """Whether a preparation makes a file of this name, or a kill in the middle of one leaves it."""
    return name in ours or any(is_staging_of(name, each) for each in (*ours, CARD))


def _tidy(output: Path, ours: Collection[str]) -> None:
    """Take away what a kill behind the card, or while it was written again, left in a folder that is complete."""
    for file in list(output.iterdir()):
        if file.name == PARTS or (file.name not in ours and _is_ours(file.name, ours)):
            with suppress(OSError):  # of a folder that can only be read
                remove(file)


def check_range(option: str, value: int | None, lowest: int, highest: int) -> None:
    """A number that an option gives; none passes.

    Raises:
        LeapformerError: it is out of range.
    """
    if value is not None and not lowest <= value <= highest:
        raise LeapformerError(f"--{option}: expected {lowest:,} to {highest:,}, found {shown(value)}")


def check_general(*, seed: int, count: int | None, workers: int | None) -> None:
    """The options that every preparation has.

    Raises:
        LeapformerError: one is out of range.
    """
    check_range("seed", seed, 0, 2**63 - 1)
    if count is not None and count < 1:
        raise LeapformerError(f"--count: expected 1 or more, found {shown(count)}")
    check_range("count", count, 1, MOST_EXAMPLES)
    check_range("workers", workers, 1, MOST_WORKERS)


def as_json(value: Any) -> Any:
    """As JSON gives it back, so that it can be compared with what a card says."""
    return json.loads(json.dumps(value))


# ---- shards


def parts_key(*identity: Any) -> str:
    """A short name of what makes a shard what it is: shards of another seed or option are not taken up."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def make_shards(
    make: Callable[..., None],
    paths: Sequence[Path],
    arguments: Sequence[tuple],
    *,
    workers: int,
    progress: Progress,
    is_whole: Callable[[Path], bool],
) -> None:
    """Call `make(path, *arguments)` for each shard that is not there yet, in processes.

    Arguments:
        make: writes a shard through a temporary file and a rename; a function of a module, so that it can be sent to
            another process.
        paths, arguments: one for each shard.
        workers: how many processes; 1: this one alone.
        is_whole: tells of a path whether the shard is there.

    Raises:
        LeapformerError: what `make` raises, or a process ended otherwise.
    """
    missing = [number for number, path in enumerate(paths) if not is_whole(path)]
    done = len(paths) - len(missing)
    progress(done, len(paths), "shards")
    if workers == 1 or len(missing) < 2:
        for number in missing:
            make(paths[number], *arguments[number])
            done += 1
            progress(done, len(paths), "shards")
        return
    _make_in_processes(make, [(paths[number], *arguments[number]) for number in missing], workers, progress, done)


def _make_in_processes(
    make: Callable[..., None], calls: Sequence[tuple], workers: int, progress: Progress, done: int
) -> None:
    """Each process has its own calls; however this ends, none of them is left."""
    # "spawn": a fork of a process in which torch has started its threads may hang.
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_make_all, args=(make, calls[first::workers], errors), daemon=True)
        for first in range(min(workers, len(calls)))
    ]
    try:
        for process in processes:
            process.start()
        running = processes
        while running:
            wait([process.sentinel for process in running], timeout=0.5)
            # Looked at before the exit codes: one that ends in between is waited for once more, and its code seen then.
            running = [process for process in running if process.is_alive()]
            progress(done + sum(call[0].is_file() for call in calls), done + len(calls), "shards")
            for code in filter(None, (process.exitcode for process in processes)):
                told = None if errors.empty() else errors.get()
                raise LeapformerError(told or f"a process of the preparation ended with code {code}")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _make_all(make: Callable[..., None], calls: Sequence[tuple], errors: Any) -> None:
    # Ctrl-C reaches every process of the terminal; the first one alone decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    try:
        for call in calls:
            if parent is None or not parent.is_alive():
                return
            make(*call)
    except (LeapformerError, OSError) as error:
        errors.put(str(error))
        sys.exit(1)
