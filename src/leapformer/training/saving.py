"""Whether the files of a checkpoint are whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

from leapformer.errors import LeapformerError


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
