"""What the readers of corpora share: what they read, and tables and lines with a place for every fault."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut, shown
from leapformer.tasks.files import decode_line, read_raw_lines
from leapformer.tasks.preparation import BadRows
from leapformer.tasks.simulst.corpora.clips import Clip
from leapformer.tasks.simulst.corpora.prepared import Utterance

_NAMES = {"dev": "validation", "valid": "validation", "tst-common": "test"}

Splits = dict[str, list[Utterance]]


@dataclass
class Source:
    """What a reader reads.

    Arguments:
        folder: of the corpus, absolute.
        source, target: languages, as the corpus calls them.
        seed: of splits that are not the corpus's own.
        bad: bad rows.
        left_out: how many rows were left out on purpose, by the reason.
    """

    folder: Path
    source: str
    target: str
    seed: int
    bad: BadRows
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def pair(self) -> str:
        return f"{self.source}-{self.target}"


def utterance(id: str, text: str, translation: str, clip: Clip, *, speaker: str = "", where: str) -> Utterance:
    """An utterance with its texts trimmed.

    Raises:
        LeapformerError: there is no translation.
    """
    text, translation = text.strip(), translation.strip()
    if not translation:
        raise LeapformerError(f"data: {where}: expected a translation, found none")
    return Utterance({"id": id, "text": text, "translation": translation, "speaker": speaker}, clip)


def aligned_utterance(
    id: str, text: tuple[bytes, str], translation: tuple[bytes, str], clip: Clip, *, speaker: str
) -> Utterance:
    """An utterance whose texts are lines of files, as `aligned_lines` gives them."""
    return utterance(id, decode_line(*text), decode_line(*translation), clip, speaker=speaker, where=translation[1])


def split_name(name: str) -> str:
    """Our name of a corpus's split: dev is validation, tst-COMMON is test, and tst-HE test-he."""
    name = name.lower()
    return _NAMES.get(name) or re.sub(r"^tst\b", "test", name)


def first_folder(candidates: Sequence[Path], source: Source, what: str) -> Path:
    for folder in candidates:
        if folder.is_dir():
            return folder
    names = " or ".join(str(each.relative_to(source.folder)) for each in candidates)
    raise LeapformerError(f"--from {source.folder}: expected {what} with {names} in it, found no such folder")


def aligned_lines(path: Path, rows: int, beside: Path) -> list[tuple[bytes, str]]:
    """The lines of a file that belong to the rows of another one, each with its place."""
    lines = read_raw_lines(path)
    if len(lines) != rows:
        raise LeapformerError(f"data: {path}: expected {rows:,} lines, as {beside.name} has, found {len(lines):,}")
    return [(line, f"{path}:{row}") for row, line in enumerate(lines, start=1)]


def read_table(path: Path, columns: Sequence[str], bad: BadRows) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of a table with tabs between its columns and their names in the first row, each with its place.

    Quotes are not special. Rows with another number of columns are bad ones.

    Arguments:
        columns: that it must have.
    """
    lines = read_raw_lines(path)
    names = decode_line(lines[0], f"{path}:1").removeprefix("\ufeff").split("\t") if lines else []
    missing = [name for name in columns if name not in names]
    if missing:
        raise LeapformerError(
            f"data: {path}:1: expected the columns {', '.join(columns)}, found "
            f"{cut(', '.join(names)) or 'an empty file'}"
        )
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}:{number}"
        row = None
        with bad.guard():
            cells = decode_line(line, where).split("\t")
            if len(cells) != len(names):
                raise LeapformerError(f"data: {where}: expected {len(names)} columns, found {len(cells)}")
            row = dict(zip(names, cells, strict=True))
        if row is not None:
            yield row, where


def number_of(value: Any, what: str, where: str) -> float:
    """A finite number of seconds, from JSON-like values or text."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise LeapformerError(f"data: {where}: {what}: expected seconds, found {shown(value)}")
    return number
