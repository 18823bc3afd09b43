"""The command ``leapformer``: thin, and quick to start because everything heavy is imported where it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.showing import cut

LONGEST = 960  # characters of a line; messages cut values themselves, and this is for what was overlooked
# How PyTorch says that the memory is full, on the processor and on a GPU, in a RuntimeError.
MEMORY_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return its exit code.

    A fault of the user's input or of the machine prints one line and gives 2; an interrupt gives 130, and an output
    that nobody reads any more 141, as of a program that the system stops for it.
    """
    try:
        with _any_text_can_be_printed():
            code = _run(argv)
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _output_into_nothing()
        return 141
    except KeyboardInterrupt:
        return _told("interrupted", code=130)
    except LeapformerError as error:
        return _told(*(str(error).split("\n") if hasattr(error, "faults") else [str(error)]))
    except (OSError, UnicodeError, MemoryError, RuntimeError) as error:
        line = _line_of(error)
        if line is None:
            raise
        return _told(line)


def _run(argv: Sequence[str] | None) -> int:
    try:
        import typer  # noqa: F401
    except ImportError as error:
        raise MissingExtra("lm", package=error.name, purpose="the command leapformer") from error
    from leapformer.cli.app import run

    return run(argv)


def _told(*lines: str, code: int = 2) -> int:
    """Print a fault in one line, those of a recipe in one each. What would move the cursor is written as an escape."""
    told = [
        "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line[:LONGEST]) for line in lines
    ]
    try:
        sys.stderr.write("leapformer: " + "\n".join(told) + "\n")
    except BrokenPipeError:
        pass
    return code


def _line_of(error: Exception) -> str | None:
    """What an error of the machine is told as; None: a fault of the program, which keeps its traceback."""
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in MEMORY_SIGNS):
        return f"the memory of this machine does not suffice ({cut(error, 240) or 'it is full'})"
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{cut(os.fsdecode(error.filename), 240)}: "
        return f"{where}{error.strerror or error}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"expected text in UTF-8, found {cut(ascii(error.object), 80)}"
    return None


@contextmanager
def _any_text_can_be_printed() -> Iterator[None]:
    """Within the block, what the terminal's encoding lacks is written as an escape: in ASCII, and names that are no
    UTF-8."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    strict = [each for each in streams if getattr(each, "errors", None) in ("strict", "surrogateescape")]
    was = [each.errors for each in strict]
    for each in strict:
        each.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for each, errors in zip(strict, was, strict=True):
            each.reconfigure(errors=errors)


def _output_into_nothing() -> None:
    """Nobody reads: what is still to be written when Python ends goes nowhere, and no error is told of it."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no real file
        pass
