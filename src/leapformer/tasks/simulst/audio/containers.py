"""Whether an audio file is whole, told from its container before it is decoded.

libsndfile takes most files that are cut off for shorter ones. Here what the header promises is held against what the
file has. Kinds of files that promise nothing are not read at all: nobody could tell whether they are whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal

# What libsndfile calls the kinds of files that are read; the length of HTK's it checks itself.
READABLE = (
    "WAV",
    "WAVEX",
    "RF64",
    "W64",
    "AIFF",
    "SVX",
    "AU",
    "CAF",
    "FLAC",
    "OGG",
    "MP3",
    "MPEG",
    "NIST",
    "VOC",
    "AVR",
    "HTK",
)

_UNKNOWN_SIZE = 0x7FFF_0000  # programs that write to a pipe put about 2 or 4 GiB where a wav file states its size
_GSM = 0x31  # the number of GSM 6.10 in a wav file
_MOST_CHUNKS = 10_000
_OGG_TAIL = 1 << 17  # two pages of the largest size
_W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
_NO_SAMPLES = "expected a chunk of samples, found the end of the file: it is cut off"


class CutOff(Exception):
    """What was expected and what was found, in words."""


def check_whole(raw: BinaryIO) -> None:
    """Look at a file that can seek, of a kind that is known here; others pass. Leaves it at its start.

    Raises:
        CutOff: the file is shorter than it says, or empty.
    """
    size = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    magic = raw.read(16)
    if size == 0:
        raise CutOff("expected an audio file, found an empty one")
    for begins, check in _CHECKS:
        if begins(magic):
            check(raw, size)
            break
    raw.seek(0)


def _expect(length: int, size: int, position: int) -> None:
    """So many bytes of samples from a place on."""
    if length < 0 or position + length > size:
        raise CutOff(f"expected {length:,} bytes of samples, found {max(size - position, 0):,}: the file is cut off")


# ---- chunks: a name, a length, and so many bytes


def _chunks(
    raw: BinaryIO,
    size: int,
    position: int,
    *,
    name: int = 4,
    length: int = 4,
    order: Literal["little", "big"] = "little",
    align: int = 2,
    whole: bool = False,
) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of each chunk.

    Arguments:
        position: of the first. name, length: their bytes. order: of the length's. align: of the next chunk's place.
        whole: the length counts name and length too.
    """
    for _ in range(_MOST_CHUNKS):
        if position + name + length > size:
            return
        raw.seek(position)
        header = raw.read(name + length)
        found = int.from_bytes(header[name:], order)
        position += len(header)
        content = found - len(header) if whole else found
        yield header[:name], position, content
        if content < 0:
            return
        position += content + -content % align
    raise CutOff(f"expected at most {_MOST_CHUNKS:,} chunks, found more")


def _check_riff(raw: BinaryIO, size: int, *, order: Literal["little", "big"] = "little") -> None:
    codec = 0
    for name, position, length in _chunks(raw, size, 12, order=order):
        if name == b"fmt ":
            raw.seek(position)
            codec = int.from_bytes(raw.read(2), order)
        elif name == b"data":
            if length < _UNKNOWN_SIZE:
                # libsndfile decodes the padding of an odd chunk too, as a block of its own.
                _expect(length + length % 2 if codec == _GSM else length, size, position)
            return
    raise CutOff(_NO_SAMPLES)


def _check_rifx(raw: BinaryIO, size: int) -> None:
    _check_riff(raw, size, order="big")


def _check_rf64(raw: BinaryIO, size: int) -> None:
    """The chunk ds64 has the size of the samples, of 8 bytes, behind that of the file (EBU Tech 3306)."""
    told: int | None = None
    for name, position, length in _chunks(raw, size, 12):
        if name == b"ds64":
            raw.seek(position + 8)
            told = int.from_bytes(raw.read(8), "little")
        elif name == b"data":
            length = told if length == 0xFFFF_FFFF else length
            if length is None:
                break
            return _expect(length, size, position)
    raise CutOff(_NO_SAMPLES)


def _check_w64(raw: BinaryIO, size: int) -> None:
    for name, position, length in _chunks(raw, size, 40, name=16, length=8, align=8, whole=True):
        if name == _W64_DATA:
            return _expect(length, size, position)
    raise CutOff(_NO_SAMPLES)


def _check_iff(raw: BinaryIO, size: int) -> None:
    for name, position, length in _chunks(raw, size, 12, order="big"):
        if name in (b"SSND", b"BODY"):
            return _expect(length, size, position)
    raise CutOff(_NO_SAMPLES)


def _check_caf(raw: BinaryIO, size: int) -> None:
    for name, position, length in _chunks(raw, size, 8, length=8, order="big", align=1):
        if name == b"data":
            if length != 0xFFFF_FFFF_FFFF_FFFF:  # -1: up to the end, of a recording that went on
                _expect(length, size, position)
            return
    raise CutOff(_NO_SAMPLES)


# ---- headers that say how much follows


def _check_au(raw: BinaryIO, size: int) -> None:
    raw.seek(0)
    header = raw.read(12)
    order: Literal["little", "big"] = "big" if header[:1] == b"." else "little"
    offset, length = (int.from_bytes(header[place : place + 4], order) for place in (4, 8))
    if len(header) < 12:
        raise CutOff(_NO_SAMPLES)
    if length != 0xFFFF_FFFF:  # unknown, of what was written to a pipe
        _expect(length, size, offset)


def _check_avr(raw: BinaryIO, size: int) -> None:
    raw.seek(0)
    header = raw.read(128)
    if len(header) < 128:
        raise CutOff(_NO_SAMPLES)
    channels = 2 if header[12:14] == b"\xff\xff" else 1
    _expect(int.from_bytes(header[26:30], "big") * int.from_bytes(header[14:16], "big") // 8 * channels, size, 128)


def _check_nist(raw: BinaryIO, size: int) -> None:
    """Lines of a name, a type and a value, in a header whose size stands in the second line."""
    raw.seek(0)
    header = raw.read(1 << 16)
    fields = {}
    for line in header.split(b"end_head")[0].split(b"\n")[2:]:
        name, _, value = line.partition(b" -")
        number = value.partition(b" ")[2].strip()
        if number.isdigit() and len(number) < 16:
            fields[name.strip()] = int(number)
    start, samples = header[8:16].strip(), fields.get(b"sample_count")
    if not start.isdigit() or samples is None:
        raise CutOff("expected a header with sample_count, found none")
    _expect(samples * fields.get(b"channel_count", 1) * fields.get(b"sample_n_bytes", 2), size, int(start))


def _check_voc(raw: BinaryIO, size: int) -> None:
    """Blocks of a type, a length of three bytes and so many bytes; the last has type 0 and no length.

    Some programs count it to the block of samples before it, where that is the only one.
    """
    raw.seek(20)
    position, blocks = int.from_bytes(raw.read(2), "little"), 0
    while position < size and blocks < _MOST_CHUNKS:
        raw.seek(position)
        block = raw.read(4)
        if block[:1] == b"\0":
            return
        length = int.from_bytes(block[1:], "little")
        _expect(length, size, position + 4)
        position, blocks = position + 4 + length, blocks + 1
    if blocks != 1:
        raise CutOff("expected a last block that ends the file, found none: the file is cut off")


def _check_flac(raw: BinaryIO, size: int) -> None:
    """The number of samples stands in 36 bits of the first block; reading finds out whether they are there."""
    raw.seek(0)
    header = raw.read(26)
    if len(header) < 26 or not int.from_bytes(header[21:26], "big") & 0xF_FFFF_FFFF:
        raise CutOff("expected a header with the number of samples, found none (convert it to a file, not to a pipe)")


def _check_ogg(raw: BinaryIO, size: int) -> None:
    """The last page must bear the mark of the end of a stream (RFC 3533, section 6)."""
    raw.seek(max(0, size - _OGG_TAIL))
    tail = raw.read()
    page = tail.rfind(b"OggS")
    # A page is a header of 27 bytes, a table of so many sizes as byte 26 says, and as many bytes as their sum.
    sizes = tail[page + 27 : page + 27 + tail[page + 26]] if 0 <= page < len(tail) - 26 else b""
    if not sizes or not tail[page + 5] & 4 or len(tail) < page + 27 + tail[page + 26] + sum(sizes):
        raise CutOff("expected a last ogg page that ends the stream, found none: the file is cut off")


# ---- mp3: frames, each with its own header


_BITRATES = {  # kbit/s by version (1, or 2 and 2.5) and layer
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44_100, 48_000, 32_000)


def _check_mp3(raw: BinaryIO, size: int) -> None:
    """The last frame must be whole. Where the first one says how many there are, reading finds out."""
    raw.seek(0)
    content = raw.read()
    position = _behind_tags(content)
    if any(name in content[position : position + 200] for name in (b"Xing", b"Info", b"VBRI")):
        return
    while (length := _frame_length(content[position : position + 4])) is not None:
        if position + length > size:
            raise CutOff(f"expected a last frame of {length:,} bytes, found {size - position:,}: the file is cut off")
        position += length


def _behind_tags(content: bytes) -> int:
    """The first byte behind the ID3v2 tags: ten bytes each, the last four with seven bits of the length."""
    position = 0
    while content[position : position + 3] == b"ID3" and position + 10 <= len(content):
        length = 0
        for byte in content[position + 6 : position + 10]:
            length = length << 7 | byte & 0x7F
        position += 10 + length
    return position


def _frame_length(header: bytes) -> int | None:
    """The bytes of an MPEG frame (ISO 11172-3, 2.4.1.3); None: it is none, or does not tell."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # version 3 is MPEG 1, 2 MPEG 2, 0 MPEG 2.5
    bits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    kbits = _BITRATES[1 if version == 3 else 2, layer][bits]
    hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    padding = header[2] >> 1 & 1
    if layer == 1:
        return (12_000 * kbits // hertz + padding) * 4
    samples = 72_000 if layer == 3 and version != 3 else 144_000
    return samples * kbits // hertz + padding


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda begin: begin.startswith(magics)


_Check = Callable[[BinaryIO, int], None]
_CHECKS: tuple[tuple[Callable[[bytes], bool], _Check], ...] = (
    (_starts(b"RIFF"), _check_riff),
    (_starts(b"RIFX"), _check_rifx),
    (_starts(b"RF64"), _check_rf64),
    (_starts(b"riff\x2e\x91\xcf\x11"), _check_w64),
    (_starts(b"FORM"), _check_iff),
    (_starts(b"caff"), _check_caf),
    (_starts(b".snd", b"dns."), _check_au),
    (_starts(b"2BIT"), _check_avr),
    (_starts(b"NIST_1A"), _check_nist),
    (_starts(b"Creative Voice F"), _check_voc),
    (_starts(b"fLaC"), _check_flac),
    (_starts(b"OggS"), _check_ogg),
    (lambda begin: begin[:3] == b"ID3" or _frame_length(begin[:4]) is not None, _check_mp3),
)
