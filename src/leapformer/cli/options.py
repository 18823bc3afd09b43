"""What the commands' options share: their types and ranges, and how an option is read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from leapformer.files.showing import shown

# No option asks for more than a machine can do, or than the libraries behind it take.
MOST_THREADS = 1024
MOST_SEED = 2**32 - 1
MOST = 10**9  # of steps, examples, sentences
MOST_TOKENS = 10**7  # of one text, and of k


def a_path(text: str | Path) -> Path:
    """What the user gave for a path; an empty text would be the folder that the command runs in."""
    if not str(text):
        raise typer.BadParameter("expected a path, found an empty text")
    return Path(text)


def a_text(text: str) -> str:
    """A text that was given in UTF-8."""
    if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
        raise typer.BadParameter(f"expected text in UTF-8, found {shown(text)}")
    return text


def finite(number: float | None) -> float | None:
    """A number that is one: "nan" passes every comparison with a smallest and a largest."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"expected a number, found {number}")
    return number


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads of PyTorch; default: PyTorch's own choice.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", parser=a_path, help="Folder of a run, such as runs/NAME.")]


def use_threads(threads: int | None) -> None:
    """Set PyTorch's CPU threads where the user asked for it."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def with_options(command: Callable[..., Any], added: Mapping[str, Any], *, behind: str) -> inspect.Signature:
    """The signature of a command whose `**options` are options that a table says; typer reads it from `__signature__`.

    Arguments:
        added: their annotations by name, as those of any option; each is None where it is not given.
        behind: the option that they follow.
    """
    own = inspect.signature(command, eval_str=True)
    kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    place = 1 + [each.name for each in kept].index(behind)
    new = [
        inspect.Parameter(name, kept[place - 1].kind, default=None, annotation=annotation)
        for name, annotation in added.items()
    ]
    return own.replace(parameters=[*kept[:place], *new, *kept[place:]])
