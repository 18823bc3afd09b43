"""Checksums beside files, as `sha256sum -c` reads them: one file SHA256SUMS for a folder, or FILE.sha256 for one.

They tell that a file is damaged, not who wrote it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.reading import read_text
from leapformer.files.showing import cut
from leapformer.files.writing import write_text

SUMS = "SHA256SUMS"
SUFFIX = ".sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\0]+)")


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write the checksums of all regular files in a folder and below, in order of their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    write_text(folder / SUMS, "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files))


def check_sums(
    folder: Path, *, needed: Iterable[str] = (), only: Collection[str] | None = None, without: Collection[str] = ()
) -> bool:
    """Check every file that the folder's SHA256SUMS names.

    Arguments:
        needed: names that must be among them: a SHA256SUMS that was cut off names too few.
        only: look at these alone. without: look at all but these.

    Returns:
        False where there is no such file: the folder was written by a version that made none.

    Raises:
        LeapformerError: a file is missing or is not what was written, or SHA256SUMS is none.
    """
    sums = folder / SUMS
    if not os.path.lexists(sums):
        return False
    named = set()
    for row, line in enumerate(read_text(sums).splitlines(), start=1):
        expected, name = _parse(line, f"{sums}:{row}")
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise LeapformerError(f"{sums}:{row}: expected the name of a file in this folder, found {cut(name)}")
        named.add(name)
        if name not in without and (only is None or name in only):
            _check(folder / name, expected)
    missing = next((name for name in needed if name not in named), None)
    if missing is not None:
        raise LeapformerError(f"{sums}: this file is damaged: expected a checksum of {missing}, found none")
    return True


def write_sum(path: Path, *, shared: bool = False) -> None:
    """Write the checksum of one file beside it; `shared` as in `staged_file`."""
    write_text(_beside(path), f"{sha256(path)}  {path.name}\n", shared=shared)


def is_sound(path: Path) -> bool:
    """Whether a file or folder that can be made again is there, with its checksums, and is what was written."""
    try:
        return check_sums(path) if path.is_dir() else check_sum(path)
    except (LeapformerError, OSError):
        return False


def check_sum(path: Path) -> bool:
    """Check one file against the checksum beside it; False where there is none.

    Raises:
        LeapformerError: the file is missing or is not what was written, or the checksum is none.
    """
    beside = _beside(path)
    if not os.path.lexists(beside):
        return False
    expected, _ = _parse(read_text(beside).rstrip("\n"), str(beside))
    _check(path, expected)
    return True


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _parse(line: str, where: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise LeapformerError(f"{where}: expected a checksum and a file's name, found something else")
    return match[1], match[2]


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        raise LeapformerError(f"{path}: expected a file with the checksum {expected[:12]}..., found none")
    found = sha256(path)
    if found != expected:
        raise LeapformerError(
            f"{path}: this file is damaged: expected the checksum {expected[:12]}..., found {found[:12]}..."
        )
