"""Compressed files: read to their last byte or not at all, and never larger than the memory allows."""

from __future__ import annotations

import gzip
import lzma
import os

import pytest
import zstandard

from leapformer.errors import LeapformerError
from leapformer.files import expanding
from leapformer.files.expanding import NotWhole, expand, read_whole

COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
TEXT = os.urandom(2000).hex().encode()


@pytest.fixture(params=COMPRESS)
def suffix(request) -> str:
    return request.param


def test_one_stream_several_and_none(suffix):
    compress = COMPRESS[suffix]
    assert expand(compress(TEXT), suffix) == TEXT
    assert expand(compress(b"first ") + compress(b"") + compress(b"second"), suffix) == b"first second"
    assert expand(b"", suffix) == expand(compress(b""), suffix) == b""


def test_what_is_cut_off_damaged_or_has_something_behind_it(suffix):
    whole = COMPRESS[suffix](TEXT)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (
        whole[:-1],
        whole[:10],
        whole + whole[:-1],
        whole + b"garbage",
        whole + bytes(damaged),
        bytes(damaged),
    ):
        with pytest.raises(NotWhole) as caught:
            expand(content, suffix)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_zero_bytes_behind_a_stream():
    for suffix, zeros in ((".gz", 1), (".gz", 700), (".xz", 4), (".xz", 512)):
        stream = COMPRESS[suffix](TEXT)
        assert expand(stream + bytes(zeros), suffix) == TEXT
        assert expand(stream + bytes(zeros) + stream, suffix) == TEXT + TEXT
    with pytest.raises(NotWhole, match="3 zero bytes behind its last part"):
        expand(COMPRESS[".xz"](TEXT) + bytes(3), ".xz")
    with pytest.raises(NotWhole):
        expand(COMPRESS[".zst"](TEXT) + bytes(4), ".zst")


def test_a_bomb_is_left_before_it_takes_memory(suffix, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(expanding, "ALWAYS", 4 << 20)
    file = tmp_path / f"a.txt{suffix}"
    bomb = lzma.compress(bytes(64 << 20), preset=0) if suffix == ".xz" else COMPRESS[suffix](bytes(64 << 20))
    file.write_bytes(bomb)
    monkeypatch.setitem(expanding._OPENERS, suffix, _counted(expanding._OPENERS[suffix], made))
    with pytest.raises(LeapformerError, match=r"expected at most [\d,]+ bytes when decompressed"):
        read_whole(file)
    assert sum(made) < 40 << 20


def _counted(opener, made):
    class Counted(opener):
        def make(self, some):
            piece = super().make(some)
            made.append(len(piece))
            return piece

    return Counted


def test_text_of_any_size_within_the_memory(suffix, tmp_path, monkeypatch):
    """Beyond what any file may become, it is the share of the compressed size that counts."""
    monkeypatch.setattr(expanding, "ALWAYS", 100)
    assert expand(COMPRESS[suffix](TEXT), suffix) == TEXT
    monkeypatch.setattr(expanding, "free_memory", lambda: 2 * len(TEXT) - 2)
    with pytest.raises(OverflowError, match="expected at most 3,999 bytes"):
        expand(COMPRESS[suffix](TEXT), suffix)
    (tmp_path / "a.txt").write_bytes(TEXT)
    with pytest.raises(LeapformerError, match="expected at most 3,999 bytes, found more"):
        read_whole(tmp_path / "a.txt")
