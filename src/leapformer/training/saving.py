"""Saving that leaves either the old or the new content on disk, never half of it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError

STAGING_PREFIX = ".saving-"
REPLACED_PREFIX = ".replaced-"
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
# What torch.save says, in place of the system's reason, of a file that could not be written whole.
TORCH_WRITE_FAULTS = ("file write failed", "iostream error", "unexpected pos")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes its place when the block ends without an error.

    Raises:
        LeapformerError: the disk is full or can't be written; what was at `target` before is still there.
    """
    staging = target.parent / f"{STAGING_PREFIX}{target.name}"
    replaced = target.parent / f"{REPLACED_PREFIX}{target.name}"
    try:
        _remove(staging)
        staging.mkdir(parents=True)
        yield staging
        _remove(replaced)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
    except Exception as error:
        _remove(staging)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if is_disk_fault(error):
            raise LeapformerError(
                f"{target}: could not be saved ({_reason(error)}); what was saved before is untouched"
            ) from error
        raise
    _remove(replaced)


def write_text(target: Path, text: str) -> None:
    """Write a file through a temporary one beside it and a rename."""
    staging = target.with_name(f"{STAGING_PREFIX}{target.name}")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, target)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise LeapformerError(f"{target}: could not be written ({_reason(error)})") from error


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, through a temporary file and a rename."""
    write_text(target, json.dumps(content, indent=2) + "\n")


def recover(folder: Path) -> None:
    """Tidy a folder after a crash in the middle of a save: finish or undo what `staged_folder` left behind."""
    for leftover in folder.glob(f"{REPLACED_PREFIX}*"):
        target = folder / leftover.name.removeprefix(REPLACED_PREFIX)
        if target.exists():
            _remove(leftover)
        else:
            leftover.rename(target)
    for leftover in folder.glob(f"{STAGING_PREFIX}*"):
        _remove(leftover)


def is_disk_fault(error: BaseException) -> bool:
    """Whether an error says that the disk is full or refuses writes, whoever raised it (torch and safetensors wrap it)."""
    if isinstance(error, OSError):
        return error.errno in DISK_FAULTS
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code is not None:
        return int(code.group(1)) in DISK_FAULTS
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_WRITE_FAULTS)


def check_weights(path: Path) -> None:
    """Check that a safetensors file is whole, by its header and its length.

    Raises:
        LeapformerError: the file is missing, cut off or not of that format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LeapformerError(f"{path}: expected the weights of a model, found no such file")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise LeapformerError(
            f"{path}: expected whole safetensors weights, found {path.stat().st_size:,} bytes "
            f"that are cut off or damaged ({error})"
        ) from error


def check_archive(path: Path) -> None:
    """Check that a file written by torch.save is whole.

    Raises:
        LeapformerError: the file is missing or cut off.
    """
    if not path.is_file():
        raise LeapformerError(f"{path}: expected a part of a checkpoint, found no such file")
    if not zipfile.is_zipfile(path):
        raise LeapformerError(
            f"{path}: expected a whole file of torch.save, found {path.stat().st_size:,} bytes that are cut off"
        )


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if any(sign in text for sign in TORCH_WRITE_FAULTS):
        return "a file could not be written whole; is the disk full?"
    return " ".join(str(text).split())


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
