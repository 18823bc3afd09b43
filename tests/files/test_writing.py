"""Writing: the old or the new content, and nothing but regular files."""

from __future__ import annotations

import json
import math
import os
import stat

import pytest

from leapformer.errors import LeapformerError
from leapformer.files.writing import json_text, recover, staged_file, staged_folder, write_json, write_text


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), staged_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "x"


def test_what_is_no_file_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = os.stat("/dev/full")
    for path, found in (
        (tmp_path / "pipe", "found a pipe"),
        (tmp_path, "found a folder"),
        ("/dev/full", "found a device"),
        ("/", "a folder"),
        ("a\0b", "zero byte"),
        ("x" * 5000, "File name too long"),
        (tmp_path / "pipe" / "x", "Not a directory"),
    ):
        with pytest.raises(LeapformerError) as caught:
            write_text(path, "x")
        assert found in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert os.stat("/dev/full") == before and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_json_that_is_written_is_json(tmp_path):
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, True)}], "d": None}
    assert json.loads(json_text(value)) == {"a": None, "b": [1.5, None, {"c": [None, True]}], "d": None}
    write_json(tmp_path / "a.json", value)
    assert "NaN" not in (tmp_path / "a.json").read_text()


def test_a_folder_is_replaced_when_it_is_whole(tmp_path):
    target = tmp_path / "model"
    with staged_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), staged_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1" and names(tmp_path) == ["model"]
    (tmp_path / ".saving-model").mkdir()
    target.rename(tmp_path / ".replaced-model")
    recover(tmp_path)
    assert (target / "a").read_text() == "1" and names(tmp_path) == ["model"]
