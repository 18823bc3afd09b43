"""Writing that leaves either the old or the new content on disk, never half of it, and nothing but regular files.

A file is written beside its target under a name that begins with `STAGING_PREFIX`, and renamed when it is whole.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from leapformer.errors import LeapformerError
from leapformer.files.reading import kind_of_file
from leapformer.files.showing import cut, shown

STAGING_PREFIX = ".saving-"
REPLACED_PREFIX = ".replaced-"
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
# What torch.save says, in place of the system's reason, of a file that could not be written whole.
TORCH_WRITE_FAULTS = ("file write failed", "iostream error", "unexpected pos")


@contextmanager
def staged_file(target: str | os.PathLike[str], *, shared: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write into, which takes the place of `target` when the block ends without an error.

    A link is followed, and stays. Whatever else lies at `target` than a regular file is left alone.

    Arguments:
        shared: other processes may write the same file at the same time; each then has a staging file of its own, and
            the last one wins. What a kill leaves behind is then not taken away by the next.

    Raises:
        LeapformerError: `target` is a folder, a pipe or a device, or can't be written; what was there before still is.
    """
    path = regular_or_new(target)
    own = f"{os.getpid()}-" if shared else ""
    staging = path.with_name(f"{STAGING_PREFIX}{own}{path.name}")
    try:
        staging.unlink(missing_ok=True)
        with staging.open("xb") as file:  # "x": through no link that somebody put there
            yield file
        os.replace(staging, path)
    except BaseException as error:
        _unlink_quietly(staging)
        if isinstance(error, OSError):
            raise LeapformerError(f"{cut(path, 240)}: could not be written ({disk_reason(error)})") from error
        raise


def write_bytes(target: str | os.PathLike[str], content: bytes, *, shared: bool = False) -> None:
    """Write a file through `staged_file`."""
    with staged_file(target, shared=shared) as file:
        file.write(content)


def write_text(target: str | os.PathLike[str], text: str, *, shared: bool = False) -> None:
    """Write a file of UTF-8 through `staged_file`."""
    write_bytes(target, text.encode("utf-8"), shared=shared)


def write_json(target: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON through `staged_file`; see `json_text`."""
    write_text(target, json_text(content, indent=2) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: NaN and infinity, which JSON doesn't have, become null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def make_folder(path: Path) -> None:
    """A folder with those around it, or nothing where it is there.

    Raises:
        LeapformerError: something else lies in the way, or the disk can't be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LeapformerError(f"{cut(path, 240)}: no folder could be made ({error.strerror or error})") from None
    except ValueError:  # a zero byte in the name
        raise LeapformerError(f"{shown(os.fspath(path))}: expected a folder's name, found a zero byte in it") from None


def is_staging_of(name: str, target: str) -> bool:
    """Whether this is the name of what a kill may have left while `target` was written or replaced."""
    return (
        re.fullmatch(rf"({re.escape(STAGING_PREFIX)}([0-9]+-)?|{re.escape(REPLACED_PREFIX)}){re.escape(target)}", name)
        is not None
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return value


def regular_or_new(target: str | os.PathLike[str]) -> Path:
    """Where a file may be put: a path at which there is a regular file or nothing, links followed."""
    try:
        path = Path(os.path.realpath(target)) if os.path.islink(target) else Path(target)
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise LeapformerError(f"{cut(os.fspath(target), 240)}: could not be written ({error.strerror})") from None
    except ValueError:  # a zero byte in the name
        raise LeapformerError(f"{shown(os.fspath(target))}: expected a file's name, found a zero byte in it") from None
    if mode is not None and not stat.S_ISREG(mode):
        raise LeapformerError(
            f"{cut(os.fspath(target), 240)}: expected a file or a name that is free, found {kind_of_file(mode)}"
        )
    if not path.name:
        raise LeapformerError(f"{cut(os.fspath(target), 240)!r}: expected a file's name, found none")
    return path


def _unlink_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # what went wrong before is what is told


# ---- folders


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes its place when the block ends without an error.

    Raises:
        LeapformerError: the disk is full or can't be written; what was at `target` before is still there.
    """
    staging = target.parent / f"{STAGING_PREFIX}{target.name}"
    replaced = target.parent / f"{REPLACED_PREFIX}{target.name}"
    try:
        remove(staging)
        staging.mkdir(parents=True)
        yield staging
        remove(replaced)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
    except Exception as error:
        remove(staging)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if is_disk_fault(error):
            raise LeapformerError(
                f"{target}: could not be saved ({disk_reason(error)}); what was saved before is untouched"
            ) from error
        raise
    remove(replaced)


def recover(folder: Path) -> None:
    """Tidy a folder after a crash in the middle of a save: finish or undo what this module left behind."""
    for leftover in folder.glob(f"{REPLACED_PREFIX}*"):
        target = folder / leftover.name.removeprefix(REPLACED_PREFIX)
        if target.exists():
            remove(leftover)
        else:
            leftover.rename(target)
    for leftover in folder.glob(f"{STAGING_PREFIX}*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder with all in it, or a file or link, or nothing; a link to a folder is removed, not the folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- reasons


def is_disk_fault(error: BaseException) -> bool:
    """Whether an error says that the disk is full or refuses writes; torch and safetensors wrap what they raise."""
    if isinstance(error, OSError):
        return error.errno in DISK_FAULTS
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code is not None:
        return int(code.group(1)) in DISK_FAULTS
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_WRITE_FAULTS)


def disk_reason(error: BaseException) -> str:
    """The system's reason in an error that `is_disk_fault` knows, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if any(sign in text for sign in TORCH_WRITE_FAULTS):
        return "a file could not be written whole; is the disk full?"
    return " ".join(str(text).split())
