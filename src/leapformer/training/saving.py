"""Whether the files of a checkpoint or a saved model are whole: by their checksums, or by their form without them."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.checksums import SUMS, check_sums, write_sums
from leapformer.files.showing import cut

WEIGHTS = "model.safetensors"
_log = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Write the checksums of a folder that is complete."""
    write_sums(folder)


def check_checkpoint(folder: Path, *, archives: Sequence[str], others: Sequence[str]) -> None:
    """Check that a checkpoint is whole; one of an older version has no checksums, and is looked at by its form alone.

    Arguments:
        archives: names of the files of torch.save. others: of the files besides these and the weights.

    Raises:
        LeapformerError: a file is missing, cut off, or not what was written.
    """
    _check_form(folder / WEIGHTS)
    for name in archives:
        check_archive(folder / name)
    check_sums(folder, needed=(WEIGHTS, *archives, *others))


def check_weights(path: Path) -> None:
    """Check that the weights of a saved model are whole: by their header, their length and the checksum beside them.

    What lies there besides them, configuration and tokenizer, is text that may have been changed on purpose: where it
    is not what was saved, that is said in one line and no fault.

    Raises:
        LeapformerError: the file is missing, damaged, cut off or not of that format.
    """
    _check_form(path)
    check_sums(path.parent, needed=(path.name,), only=(path.name,))
    try:
        check_sums(path.parent, without=(path.name,))
    except LeapformerError as error:
        _log.warning("%s; if it was changed on purpose, remove %s", error, path.with_name(SUMS))


def _check_form(path: Path) -> None:
    """Check that a file is one of safetensors, and not cut off."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LeapformerError(f"{path}: expected the weights of a model, found no such file")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise LeapformerError(
            f"{path}: expected whole safetensors weights, found {path.stat().st_size:,} bytes "
            f"that are cut off or damaged ({cut(error)})"
        ) from error


def check_archive(path: Path) -> None:
    """Check that a file written by torch.save is whole.

    Raises:
        LeapformerError: the file is missing or cut off, or its parts are compressed, which torch.save never does.
    """
    if not path.is_file():
        raise LeapformerError(f"{path}: expected a part of a checkpoint, found no such file")
    if not zipfile.is_zipfile(path):
        raise LeapformerError(
            f"{path}: expected a whole file of torch.save, found {path.stat().st_size:,} bytes that are cut off"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise LeapformerError(f"{path}: expected a whole file of torch.save, found {cut(error)}") from None
    if not stored:
        raise LeapformerError(f"{path}: expected a file of torch.save, found one with compressed parts")
