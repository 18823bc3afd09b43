"""What a measurement is: rows whose fields have names, and the form that they have in a JSON file.

Every benchmark's rows are dataclasses, written with `to_json` and read back with `rows_of`. A field that is None by
default is left out of the file while it is None, and a field that a file of an earlier version lacks has its default.
"""

from __future__ import annotations

import dataclasses
import statistics
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown

KEY = "key"  # in a field's metadata: its name in the file, where Python does not allow that name

RowType = TypeVar("RowType")


@dataclass(frozen=True)
class Spread:
    """Median, 20 % and 80 % marks of `n` values; the marks are measured values, not between two of them."""

    median: float
    p20: float
    p80: float
    n: int = 1

    def times(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(factor * self.median, factor * self.p20, factor * self.p80, self.n)

    def at(self, x: float) -> tuple[float, float, float, float]:
        """A point of a picture: (x, median, p20, p80)."""
        return x, self.median, self.p20, self.p80


def spread(values: Sequence[float]) -> Spread:
    """What a row keeps of measured values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: of the processor, summed over the process's threads, and of the clock on the wall."""

    cpu_ms: Spread
    wall_ms: Spread

    def by(self, clock: str) -> Spread:
        """Those of the clock "cpu" or "wall"."""
        return {"cpu": self.cpu_ms, "wall": self.wall_ms}[clock]


@dataclass(frozen=True, kw_only=True)
class Raced:
    """A row of contenders that took turns.

    Attributes:
        contenders: times of each that ran.
        not_run: why each of the others did not.
    """

    contenders: dict[str, Times] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Compared(Raced):
    """A row of contenders and their ratios, turn by turn.

    Attributes:
        speed_over: how many times as fast as the first name the second is.
    """

    speed_over: dict[str, dict[str, Spread]] = field(default_factory=dict)

    def speed(self, name: str, *, over: str) -> Spread | None:
        """How many times as fast as `over` a contender is; None where one of them did not run."""
        return self.speed_over.get(over, {}).get(name)


_LAST = {each.name for each in dataclasses.fields(Compared)}  # in a file; what a row is about comes first


def names_of(rows: Iterable[Raced]) -> list[str]:
    """Whatever ran or was to run in any of the rows, in the order of the first mention."""
    return list(dict.fromkeys(name for row in rows for name in (*row.contenders, *row.not_run)))


def not_run_notes(rows: Iterable[tuple[str, Mapping[str, str]]]) -> tuple[str, ...]:
    """A line for each contender that did not run, out of (where, reasons)."""
    return tuple(f"Not run at {at}: {name} ({reason})." for at, not_run in rows for name, reason in not_run.items())


def to_json(value: Any) -> Any:
    """A row, or a part of one, as a JSON file has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {}
        for each in sorted(dataclasses.fields(value), key=lambda each: each.name in _LAST):
            content = getattr(value, each.name)
            if content is not None or each.default is not None:
                found[_key(each)] = to_json(content)
        return found
    if isinstance(value, Mapping):
        return {key: to_json(content) for key, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(content) for content in value]
    return value


def rows_of(content: Mapping[str, Any], section: str, kind: type[RowType]) -> list[RowType]:
    """The rows in a list of a result's content; none where it has no such list.

    Raises:
        LeapformerError: a row lacks what rows of this kind have.
    """
    found = []
    for number, row in enumerate(content.get(section, [])):
        try:
            found.append(from_json(kind, row))
        except (AttributeError, TypeError) as error:
            message = f"{section}, row {number}: expected a {kind.__name__}, found {shown(row)} ({error})"
            raise LeapformerError(message) from error
    return found


def from_json(kind: Any, value: Any) -> Any:
    """A value of an annotated type out of what `to_json` gives for it."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**{name: from_json(hint, value[key]) for name, key, hint in _fields(kind) if key in value})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return {key: from_json(arguments[1], content) for key, content in value.items()}
    if origin is list:
        return [from_json(arguments[0], content) for content in value]
    if origin is types.UnionType:  # of one type and None
        return None if value is None else from_json(arguments[0], value)
    return value


@cache
def _fields(kind: type) -> list[tuple[str, str, Any]]:
    """Name, key in a file and type of each field."""
    hints = typing.get_type_hints(kind)
    return [(each.name, _key(each), hints[each.name]) for each in dataclasses.fields(kind)]


def _key(each: dataclasses.Field) -> str:
    return each.metadata.get(KEY, each.name)
