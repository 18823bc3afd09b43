"""What is imported only when a command runs, so that the command is quick to start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

from leapformer.errors import MissingExtra

Options = ParamSpec("Options")
Answer = TypeVar("Answer")


def needs(extra: str, *modules: str) -> Callable[[Callable[Options, Answer]], Callable[Options, Answer]]:
    """A command that imports these modules before it does anything, by `load`.

    Its functions import from them what they use, each for itself. Those that are used last are named here too, so that
    a missing package is told before an hour of work, and not behind it.
    """

    def decorate(command: Callable[Options, Answer]) -> Callable[Options, Answer]:
        @wraps(command)
        def loaded(*arguments: Options.args, **options: Options.kwargs) -> Answer:
            load(extra, *modules)
            return command(*arguments, **options)

        return loaded

    return decorate


def load(extra: str, *modules: str) -> None:
    """Import modules.

    Raises:
        MissingExtra: a package that they need is not installed; it is told by the extra that brings it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("leapformer"):
                raise
            raise MissingExtra(extra, package=error.name, purpose="this command") from error
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()  # our own bar is the one to look at
