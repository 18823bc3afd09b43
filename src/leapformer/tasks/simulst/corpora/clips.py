"""Where the audio of an utterance is: a file, a cut of one, a part of an uncompressed zip, or bytes of an archive."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.files.expanding import COMPRESSIONS, NotWhole, expand, largest_file
from leapformer.files.reading import kind_of_file, read_bytes
from leapformer.files.showing import cut, shown
from leapformer.tasks.files import is_hidden
from leapformer.tasks.simulst.audio.reading import read_audio

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
        mode = os.stat(path)
        if not stat.S_ISREG(mode.st_mode):  # a pipe would wait for ever
            raise OSError(kind_of_file(mode.st_mode))
        if first + size > mode.st_size or not size:
            raise LeapformerError(
                f"data: {where}: expected {size:,} bytes from byte {first:,} on, found a file of {mode.st_size:,} bytes"
            )
        if size > (most := largest_file()):
            raise LeapformerError(
                f"data: {where}: expected at most {most:,} bytes, as the memory allows, found {size:,}"
            )
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(size)
    except (OSError, OverflowError) as error:
        raise LeapformerError(
            f"data: {where}: expected an audio file, found {getattr(error, 'strerror', None) or error}"
        ) from None
    if len(content) < size:
        raise LeapformerError(f"data: {where}: expected {size:,} bytes from byte {first:,} on, found {len(content):,}")
    return content


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a row of a corpus names, relative to a folder.

    Raises:
        LeapformerError: it is no name, or lies outside the folder.
    """
    base = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(base, name))
    if not name.strip() or "\0" in name or not path.startswith(os.path.join(base, "")):
        raise LeapformerError(
            f"data: {where}: expected the name of a file within {cut(folder, 160)}, found {shown(name)}"
        )
    return Path(path)


def read_archive(path: Path) -> dict[str, bytes]:
    """The files of a tar archive in memory, by their names; links, devices, folders and what is hidden are left out.

    The archive is decompressed first, within the bounds of `leapformer.files.expanding`, so that nothing in it can be
    larger than it is.

    Raises:
        LeapformerError: it cannot be read, or is not whole, or holds a sparse file.
    """
    content = read_bytes(path, largest=largest_file())
    try:
        if not content:
            raise EOFError("an empty file")
        content = expand(content, path.suffix) if path.suffix in COMPRESSIONS else content
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            files = dict(_members(archive, len(content)))
            end = content[archive.offset : archive.offset + tarfile.BLOCKSIZE]
        if end != bytes(tarfile.BLOCKSIZE):  # tarfile passes over what it does not know
            raise EOFError(f"no end of the archive at byte {archive.offset:,}")
        return files
    except (tarfile.TarError, NotWhole, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        reason = cut(str(error).split("\n")[0].rstrip(":"), 120)
        raise LeapformerError(f"data: {path}: expected a whole tar archive, found {reason}") from None


def _members(archive: tarfile.TarFile, size: int) -> Iterator[tuple[str, bytes]]:
    before = -1
    for member in archive:
        if not before < member.offset < size:  # a size below nothing leads back
            raise EOFError(f"a member at byte {member.offset:,}")
        before = member.offset
        name = member.name.removeprefix("./")
        if not member.isreg() or is_hidden(name):
            continue
        if member.issparse():
            raise EOFError(f"{shown(name)}, a sparse file")
        if not 0 <= member.size <= size - member.offset_data:
            raise EOFError(f"{size - member.offset_data:,} of {member.size:,} bytes of {shown(name)}")
        file = archive.extractfile(member)
        yield name, b"" if file is None else file.read()
