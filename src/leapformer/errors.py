"""Errors that are meant for the user: one line that says what, where, what was expected and what was found."""

from __future__ import annotations


class LeapformerError(Exception):
    """A fault of the input or of the machine, not of the program.

    The message is one line. The command prints it without a traceback and exits with code 2.
    """


class MissingExtra(LeapformerError):
    """A package that belongs to an optional part of leapformer is not installed.

    Arguments:
        extra: name of the extra that brings it, such as "lm".
        package: name of the package that could not be imported, if known.
        purpose: what needs it, such as "leapformer train".
    """

    def __init__(self, extra: str, *, package: str | None = None, purpose: str | None = None) -> None:
        self.extra = extra
        self.package = package
        what = purpose or "this part of leapformer"
        needs = f"the package {package!r}" if package else f"the extra {extra!r}"
        super().__init__(f"{what} needs {needs}, which is not installed: pip install 'leapformer[{extra}]'")
