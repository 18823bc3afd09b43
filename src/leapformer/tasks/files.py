"""Files that several tasks read: text and rows of JSON, compressed or not. Every fault is one line with file and
row.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.expanding import COMPRESSIONS, read_whole
from leapformer.files.reading import kind_of_file, parse_json
from leapformer.files.showing import cut, shown

LONGEST_LINE = 64 << 20  # bytes of a line of a table


def inner_suffix(path: Path) -> str:
    """The suffix below the compression's: .txt of both a.txt and a.txt.xz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def bare_name(path: Path) -> str:
    """The name without the suffixes: a of both a.txt and a.txt.xz."""
    return Path(path.stem).stem if path.suffix in COMPRESSIONS else path.stem


def is_hidden(name: str) -> bool:
    """Whether a name, perhaps with folders before it, is one that people don't see.

    Such files lie in most folders that passed a Mac (`.DS_Store`, `._NAME` beside NAME, `__MACOSX` in a zip) or a
    version control, and are no data, whatever their suffix.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def list_files(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern in a folder, in order of the names, without what is hidden there."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, decompressed by its last suffix; see `leapformer.files.expanding`.

    Raises:
        LeapformerError: it cannot be read, is not whole, or is larger than the memory allows.
    """
    try:
        os.stat(path)
        return read_whole(path)
    except MissingExtra:
        raise
    except OSError as error:
        raise LeapformerError(f"data: cannot read {cut(path, 240)}: {error.strerror or error}") from None
    except LeapformerError as error:
        raise LeapformerError(f"data: {error}") from None


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file, decompressed by its last suffix, line ends untouched.

    Raises LeapformerError with the file, and the offset (in the decompressed bytes) of the first byte that is not
    UTF-8.
    """
    path = Path(path)
    raw = read_bytes(path)
    if not raw:
        raise LeapformerError(f"data: {path} is empty")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = " of the decompressed text" if path.suffix in COMPRESSIONS else ""
        raise LeapformerError(
            f"data: {path}: expected UTF-8, found byte 0x{raw[error.start]:02x} at offset {error.start}{where}"
        ) from None


def read_raw_lines(path: str | Path) -> list[bytes]:
    """The lines of a file before they are decoded (see `decode_line`), so that a bad byte has a row; none if it is
    empty.

    Raises:
        LeapformerError: as `read_bytes`.
    """
    lines = read_bytes(path).split(b"\n")
    return lines if lines[-1] else lines[:-1]


def iterate_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that is too large to hold, each with its end.

    Raises:
        LeapformerError: it can't be read, is no regular file, or has a line of more than `LONGEST_LINE` bytes.
    """
    where = cut(path, 240)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would wait for ever
            raise LeapformerError(f"{where}: expected a file, found {kind_of_file(mode)}")
        with open(path, "rb") as file:
            row = 0
            while line := file.readline(LONGEST_LINE + 1):
                row += 1
                if len(line) > LONGEST_LINE:
                    raise LeapformerError(
                        f"{where}:{row}: expected at most {LONGEST_LINE:,} bytes in a line, found more"
                    )
                yield line
    except OSError as error:
        raise LeapformerError(f"{where}: cannot be read: {error.strerror or error}") from None


def decode_line(raw: bytes, where: str) -> str:
    """A line as text, without the end of a Windows line.

    Raises:
        LeapformerError: it is not UTF-8, or holds a zero byte.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LeapformerError(
            f"data: {where}: expected UTF-8, found byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None
    if "\0" in text:
        raise LeapformerError(f"data: {where}: expected text, found a zero byte")
    return text.removesuffix("\r")


def read_json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a .jsonl file, each with its place, "FILE:ROW"; empty lines are passed over.

    Raises:
        LeapformerError: as `read_text`, or a row is not a JSON object.
    """
    for line, where in read_lines(path):
        yield parse_json_row(line, where), where


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not empty, each with its place, "FILE:ROW"."""
    for row, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield line, f"{path}:{row}"


def parse_json_row(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        LeapformerError: it is something else.
    """
    value = parse_json(line, where=f"data: {where}", expected="a JSON object", numbers="any", surrogates=True)
    if not isinstance(value, dict):
        raise LeapformerError(f"data: {where}: expected a JSON object, found {type(value).__name__} {shown(value)}")
    return value


def row_text(content: dict[str, Any], text_field: str, where: str) -> str:
    """The text under a key of a JSON row.

    Raises:
        LeapformerError: there is none, or no UTF-8 file could hold it.
    """
    text = content.get(text_field)
    if not isinstance(text, str):
        keys = cut(", ".join(sorted(content))) or "none"
        found = f"keys {keys}" if text is None else type(text).__name__
        raise LeapformerError(f"data: {where}: expected text under {text_field!r}, found {found}")
    return _encodable(text, where)


def _encodable(text: str, where: str) -> str:
    """JSON can spell half of a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LeapformerError(
            f"data: {where}: expected text, found a lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}"
        ) from None
    return text
