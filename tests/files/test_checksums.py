"""Checksums beside files."""

from __future__ import annotations

import pytest

from leapformer.errors import LeapformerError
from leapformer.files.checksums import SUMS, check_sum, check_sums, write_sum, write_sums


def test_one_bit_of_a_folder_is_noticed(tmp_path):
    assert not check_sums(tmp_path)
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / name).write_bytes(b"content of " + name.encode())
    write_sums(tmp_path)
    assert check_sums(tmp_path)
    (tmp_path / "below" / "b").write_bytes(b"Content of below/b")
    with pytest.raises(
        LeapformerError, match=r"below/b: this file is damaged: expected the checksum \w{12}\.\.\., found"
    ):
        check_sums(tmp_path)
    (tmp_path / "below" / "b").unlink()
    with pytest.raises(LeapformerError, match="expected a file with the checksum"):
        check_sums(tmp_path)


@pytest.mark.parametrize("line", ["x", "0" * 64 + "  ../a", "0" * 64 + "  /etc/passwd", "0" * 63 + "  a", "\0"])
def test_a_list_that_is_none(tmp_path, line):
    (tmp_path / SUMS).write_text(line + "\n")
    with pytest.raises(LeapformerError, match=f"{SUMS}:1: expected"):
        check_sums(tmp_path)


def test_one_file(tmp_path):
    path = tmp_path / "features.bin"
    path.write_bytes(b"1")
    assert not check_sum(path)
    write_sum(path)
    assert check_sum(path)
    path.write_bytes(b"2")
    with pytest.raises(LeapformerError, match="features.bin: this file is damaged"):
        check_sum(path)
