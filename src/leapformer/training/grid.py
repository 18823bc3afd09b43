"""A grid of trainings: which overrides of a recipe each of its cells has.

A cell is one experiment, trained with several seeds. Cells are the product of axes, each of which changes one key or a
few keys together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut, shown
from leapformer.training.recipes import TrainingSection

MOST_CELLS = 10_000
CLOSING = {"[": "]", "{": "}", "(": ")"}
SEED, STEPS = "training.seed", "training.max_steps"


class GridError(LeapformerError):
    """Something is wrong with runs of a grid. With several faults, each stands on a line of its own after the first."""

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        lines = f" {faults[0]}" if len(faults) == 1 else "".join(f"\n  {fault}" for fault in faults)
        super().__init__(f"{what}:{lines}")


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid.

    Attributes:
        name: what tables call it.
        overrides: "key=value" each, on top of those that all cells have.
    """

    name: str
    overrides: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        return [override.partition("=")[0] for override in self.overrides]

    def folder(self, seed: int) -> str:
        """The name of its run's folder, of letters that any file system and any shell takes."""
        plain = re.sub(r"[^\w=.,+-]+", "_", f"{self.name}-seed{seed}")
        return f"_{plain}" if plain.startswith((".", "-")) else plain


def parse_axis(text: str) -> list[Cell]:
    """The cells of "key=a,b,c"; a comma within brackets or quotes belongs to its value.

    Raises:
        LeapformerError: there is no key, or no value.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    found = [value.strip() for value in split_outside(values, ",")]
    if not equals or not key or not all(found):
        raise LeapformerError(f"--vary: expected key=value,value, found {shown(text)}")
    return [Cell(f"{key}={value}", (f"{key}={value}",)) for value in found]


def parse_bundle(text: str) -> Cell:
    """The cell of "name: key=value key=value"; a space within brackets or quotes belongs to its value.

    Raises:
        LeapformerError: there is no name, or something else than keys with values behind it.
    """
    name, colon, rest = text.partition(":")
    name = " ".join(name.split())
    overrides = tuple(part for part in split_outside(rest, " \t\n") if part)
    if not colon or not name or not name.isprintable() or any(part.find("=") < 1 for part in overrides):
        raise LeapformerError(f"--cell: expected 'name: key=value key=value', found {shown(text)}")
    return Cell(name, overrides)


def split_outside(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that stand outside of brackets and quotes, empty ones too.

    Brackets that don't match are letters like any others from there on.
    """
    parts, begin = [], 0
    for place in _outside(text):
        if text[place] in separators:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def _outside(text: str) -> Iterator[int]:
    """The places outside of brackets and of quotes that begin a value."""
    closing: list[str] = []
    for place, letter in enumerate(text):
        if closing and letter == closing[-1]:
            closing.pop()
        elif closing and closing[-1] in "'\"":
            continue
        elif letter in CLOSING:
            closing.append(CLOSING[letter])
        elif letter in "'\"" and (place == 0 or not text[place - 1].isalnum()):  # an apostrophe is none
            closing.append(letter)
        elif not closing:
            yield place


def expand(varied: Sequence[str], bundles: Sequence[str]) -> list[Cell]:
    """The cells of all combinations: those of `--cell` outermost, the last `--vary` fastest.

    Arguments:
        varied: "key=a,b,c" each.
        bundles: "name: key=value key=value" each; together they are one axis.

    Raises:
        GridError: lists every fault of the options.
    """
    named: list[Any] = []
    axes: list[Any] = []
    faults: list[str] = []
    for texts, parse, parsed in ((bundles, parse_bundle, named), (varied, parse_axis, axes)):
        for text in texts:
            try:
                parsed.append(parse(text))
            except LeapformerError as error:
                faults.append(str(error))
    axes = [named, *axes] if named else axes
    if not axes and not faults:
        faults.append("expected at least one --vary or --cell, found none")
    if not faults:
        faults += _clashes(axes)
    if faults:
        raise GridError("ablate", faults)
    return [
        Cell(",".join(part.name for part in parts), tuple(each for part in parts for each in part.overrides))
        for parts in product(*axes)
    ]


def _clashes(axes: Sequence[Sequence[Cell]]) -> Iterator[str]:
    """Faults of axes that don't go together."""
    cells = 1
    for axis in axes:
        cells *= len(axis)
    if cells > MOST_CELLS:
        yield f"expected at most {MOST_CELLS:,} cells, found {cells:,}"
    for axis in axes:
        for name, count in Counter(cell.name for cell in axis).items():
            if count > 1:
                yield f"{cut(name)}: expected each value and each name once, found it {count} times"
        for cell in axis:
            for key, count in Counter(cell.keys).items():
                if count > 1:
                    yield f"{cut(cell.name)}: {cut(key)}: expected each key once, found it {count} times"
    seen: list[str] = []
    for axis in axes:
        own = list(dict.fromkeys(key for cell in axis for key in cell.keys))
        for key in own:
            if any(same_key(key, other) for other in seen):
                yield f"{cut(key)}: expected in one --vary, or in the --cell options, found in two places"
        seen += own


def same_key(a: str, b: str) -> bool:
    """Whether two keys of overrides may mean the same: "seed" and "training.seed"."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def shortened(section: TrainingSection, steps: int) -> list[str]:
    """Overrides for a training of so many steps: in a shorter one, warm-up and intervals shrink in proportion."""
    share = min(1.0, steps / section.max_steps)
    intervals = {key: max(1, round(getattr(section, key) * share)) for key in ("log_every", "eval_every", "save_every")}
    changes = {"max_steps": steps, "warmup_steps": int(section.warmup_steps * share), **intervals}
    return [f"training.{key}={value}" for key, value in changes.items()]
