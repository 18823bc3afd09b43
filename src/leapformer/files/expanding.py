"""Files as they are and compressed ones (.gz, .xz, .zst), read whole: to the last byte, and within the memory.

A compressed file is one or more streams with nothing else behind them: the standard libraries' own functions stop at
the end of the first, or pass over what they don't know. Zero bytes behind the last stream are allowed where the format
allows them: any number in gzip, a multiple of four in xz.

Bounds, looked at before the memory is taken: a file, decompressed, may have half of the memory that is free (the text
is made beside the bytes), and a compressed one at most `ALWAYS` or `RATIO` times its own size, whichever is more. Text
compresses to a tenth or a twentieth; what is beyond a hundredth holds nothing.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.memory import free_memory
from leapformer.files.reading import read_bytes
from leapformer.files.showing import cut

COMPRESSIONS = (".gz", ".xz", ".zst")
ALWAYS = 64 << 20  # bytes that any compressed file may become
RATIO = 100

_XZ_MEMORY = 512 << 20  # what a dictionary may take: eight times that of `xz -9`
_FED = {".gz": 1 << 16, ".xz": 1 << 16, ".zst": 1 << 10}  # bytes at a time; one of zst may become 32,768
_MADE = 1 << 20  # bytes at a time, of gzip and xz, which can be told so
_ZEROS = {".gz": 1, ".xz": 4, ".zst": 0}  # what the zero bytes behind a stream are a multiple of; 0: there are none


class NotWhole(Exception):
    """The content is no whole file of its kind; the reason in words."""


def largest_file() -> int:
    """Bytes of a file that may be read whole."""
    return free_memory() // 2


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file, decompressed by its last suffix.

    Raises:
        LeapformerError: it can't be read, is not whole, or larger than the bounds above.
    """
    path = Path(path)
    raw = read_bytes(path, largest=largest_file())
    if not raw or path.suffix not in COMPRESSIONS:
        return raw
    where = cut(path, 240)
    try:
        return expand(raw, path.suffix)
    except NotWhole as error:
        raise LeapformerError(f"{where} is not a whole {path.suffix} file: {error}") from None
    except OverflowError as error:
        raise LeapformerError(f"{where}: {error}") from None


def expand(raw: bytes, suffix: str) -> bytes:
    """The content of the bytes of a compressed file.

    Raises:
        NotWhole: they are cut off, damaged, or have something behind them.
        OverflowError: the content is larger than it may be.
        MissingExtra: zstandard is not installed.
    """
    most = min(max(ALWAYS, RATIO * len(raw)), largest_file())
    pieces: list[bytes] = []
    size = 0

    def take(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        if size > most:
            raise OverflowError(f"expected at most {most:,} bytes when decompressed (from {len(raw):,}), found more")
        pieces.append(piece)

    position = 0
    while position < len(raw):
        try:
            position = _skip_zeros(raw, _expand_stream(raw, position, suffix, take), suffix)
        except EOFError:
            raise NotWhole("it is cut off" if not position else "its last part is cut off") from None
        except (zlib.error, lzma.LZMAError, OSError) as error:
            where = f" behind byte {position:,}" if position else ""
            raise NotWhole(cut(error, 120) + where) from None
    return b"".join(pieces)


def _expand_stream(raw: bytes, position: int, suffix: str, take: Callable[[bytes], None]) -> int:
    """Give `take` the content of the stream that begins at a byte, and return the first byte behind it."""
    stream, fed = _OPENERS[suffix](), _FED[suffix]
    while not stream.eof:
        if position == len(raw):
            raise EOFError
        some = raw[position : position + fed]
        position += len(some)
        while True:
            take(stream.make(some))
            some = stream.left
            if stream.eof or not (some or stream.has_more):
                break
    return position - len(stream.unused)


def _skip_zeros(raw: bytes, position: int, suffix: str) -> int:
    """The first byte from a place on that is not the padding of a format."""
    unit, end = _ZEROS[suffix], position
    while unit and raw[end : end + 1] == b"\0":
        end += 1
    if unit and (end - position) % unit:
        raise NotWhole(f"{end - position} zero bytes behind its last part, which is no multiple of {unit}")
    return end


class _Stream:
    """What the three libraries have in common: `make` takes bytes and gives a piece of the content.

    Attributes:
        left: bytes that `make` wants to be given again, before others. has_more: it gives more without new bytes.
        eof: the stream has ended; `unused`: what it was given beyond its end.
    """

    _stream: Any

    @property
    def left(self) -> bytes:
        return b""

    @property
    def has_more(self) -> bool:
        return False

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused(self) -> bytes:
        return self._stream.unused_data


class _Gz(_Stream):
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    def make(self, some: bytes) -> bytes:
        return self._stream.decompress(some, _MADE)

    @property
    def left(self) -> bytes:
        return self._stream.unconsumed_tail


class _Xz(_Stream):
    def __init__(self) -> None:
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def make(self, some: bytes) -> bytes:
        return self._stream.decompress(some, _MADE)

    @property
    def has_more(self) -> bool:
        return not self._stream.needs_input


class _Zst(_Stream):
    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingExtra("lm", package="zstandard", purpose="reading .zst files") from None
        self._stream, self._error = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError

    def make(self, some: bytes) -> bytes:
        try:
            return self._stream.decompress(some)
        except self._error as error:
            raise OSError(str(error)) from None


_OPENERS: dict[str, Callable[[], Any]] = {".gz": _Gz, ".xz": _Xz, ".zst": _Zst}
