"""Whether the files of a checkpoint or a saved model are whole: by their checksums, and by their form where there are none."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.checksums import SUMS, check_sums, write_sums
from leapformer.files.showing import cut

WEIGHTS = "model.safetensors"
_log = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Write the checksums of a folder that is complete."""
    write_sums(folder)


def check_sealed(folder: Path, *, needed: tuple[str, ...] = ()) -> None:
    """Check every file of a folder that `seal` has closed; a folder without checksums is of an older version, and passes.

    Arguments:
        needed: names of files that must be among them, besides the weights.

    Raises:
        LeapformerError: a file is missing or is not what was written.
    """
    check_sums(folder, needed=(WEIGHTS, *needed))


def check_beside_weights(folder: Path) -> None:
    """Say in one line where what lies beside the weights of a saved model is not what was saved: configuration, tokenizer.

    `check_weights` refuses weights that are not; text may have been changed on purpose, and what it says is checked where
    it is read.
    """
    try:
        check_sealed(folder)
    except LeapformerError as error:
        _log.warning("%s; if you changed it yourself, remove %s", error, folder / SUMS)


def check_weights(path: Path) -> None:
    """Check that a safetensors file is whole: by the checksum beside it, its header and its length.

    Raises:
        LeapformerError: the file is missing, damaged, cut off or not of that format.
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
            f"that are cut off or damaged ({cut(error)})"
        ) from error
    check_sums(path.parent, needed=(path.name,), only=(path.name,))


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
