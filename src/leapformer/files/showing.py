"""Values in messages: one line, cut, and taken from the value's beginning, so that a bomb is never written out."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST = 80  # characters of a value in a message


def cut(text: object, longest: int = LONGEST) -> str:
    """A text on one line, and with "..." in its middle where it is longer than `longest` characters."""
    line = " ".join(str(text).split())
    if len(line) <= longest:
        return line
    tail = (longest - 3) // 3
    return f"{line[: longest - 3 - tail]}...{line[len(line) - tail :]}"


def shown(value: Any) -> str:
    """`repr` of a value in at most `LONGEST` characters; of a deep or large one only the beginning is looked at."""
    return cut(_Repr().repr(value))


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 3, 8, 8, 8, 8
        self.maxstring = self.maxlong = self.maxother = LONGEST + 2

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4096:  # the decimal digits of a huge integer take quadratic time, or are refused
            return f"an integer of {x.bit_length():,} bits"
        return super().repr_int(x, level)
