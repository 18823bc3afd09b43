"""Where the audio of an utterance is: a file, a cut of one, a part of an uncompressed zip, or bytes of an archive."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.tasks.simulst.audio import read_audio

_NUMPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Clip:
    """The audio of one utterance.

    Arguments:
        file: an audio file, or the bytes of one.
        where: what errors name: the row that asks for it, and the file.
        offset, duration: a cut in seconds; default: all of it.
        span: first byte and number of bytes of an audio file that lies within `file`.
    """

    file: Path | bytes
    where: str
    offset: float = 0.0
    duration: float | None = None
    span: tuple[int, int] | None = None


def read_clip(clip: Clip) -> np.ndarray:
    """The samples of a clip: int16 [N] at 16,000 Hz, mono; those of a 16-bit file of that rate are unchanged.

    Raises:
        LeapformerError: the file is missing, cut off, no audio, or the cut is not within it; see `audio.read_audio`.
        MissingExtra: soundfile or soxr is not installed.
    """
    source = clip.file
    if isinstance(source, Path) and clip.span is not None:
        source = _read_span(source, *clip.span, clip.where)
    if isinstance(source, bytes):
        if source.startswith(_NUMPY):
            raise LeapformerError(f"data: {clip.where}: expected audio, found an array of features (.npy)")
        source = io.BytesIO(source)
    samples = read_audio(source, offset=clip.offset, duration=clip.duration, name=f"data: {clip.where}")
    if not len(samples):
        raise LeapformerError(f"data: {clip.where}: expected at least one sample at 16,000 Hz, found none")
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)


def _read_span(path: Path, first: int, size: int, where: str) -> bytes:
    """Bytes of a file; nothing of a zip's own directory is read, so that no name in it is followed."""
    try:
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(size)
            length = file.seek(0, io.SEEK_END)
    except OSError as error:
        raise LeapformerError(f"data: {where}: expected an audio file, found {error.strerror or error}") from None
    if len(content) < size or not size:
        raise LeapformerError(
            f"data: {where}: expected {size:,} bytes from byte {first:,} on, found a file of {length:,} bytes"
        )
    return content


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a row of a corpus names, relative to a folder.

    Raises:
        LeapformerError: it is no name, or lies outside the folder.
    """
    base = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(base, name))
    if not name.strip() or "\0" in name or not path.startswith(os.path.join(base, "")):
        raise LeapformerError(f"data: {where}: expected the name of a file within {folder}, found {name!r}")
    return Path(path)


def read_archive(path: Path) -> dict[str, bytes]:
    """The files of a tar archive in memory, by their names; links, devices and folders are left out.

    Raises:
        LeapformerError: it cannot be read, or is not whole.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            return {member.name.removeprefix("./"): _content(archive, member) for member in archive if member.isreg()}
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        # The first line: a list of all kinds of archive follows.
        reason = str(getattr(error, "strerror", None) or error).split("\n")[0].rstrip(":")
        raise LeapformerError(f"data: {path}: expected a whole tar archive, found {reason}") from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise EOFError(f"{len(content):,} of {member.size:,} bytes of {member.name}")
    return content
