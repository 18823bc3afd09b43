"""The lock on a folder: one process at a time, none left behind, and none in the way where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys

import pytest

from leapformer.errors import LeapformerError
from leapformer.files.locking import LOCK, check_free, locked

HOLD = """
import sys, time
from pathlib import Path
from leapformer.files.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_lock_names_its_holder_and_goes_with_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        message = f"{tmp_path}: process {other.pid} on {platform.node()} is at work in this folder"
        for attempt in (lambda: check_free(tmp_path), lambda: locked(tmp_path).__enter__()):
            with pytest.raises(LeapformerError) as caught:
                attempt()
            assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
        other.kill()
    assert (tmp_path / LOCK).is_file()  # as a kill leaves it
    check_free(tmp_path)
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {platform.node()}"
    assert list(tmp_path.iterdir()) == []


def test_looking_writes_nothing(tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_has_just_removed_is_taken_again(tmp_path, monkeypatch):
    """Between opening and locking, the holder before removes the file: a lock on it would keep nobody out."""
    flock = fcntl.flock
    removed = []

    def slow(file, how):
        if not removed:
            removed.append(file)
            (tmp_path / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with locked(tmp_path):
        monkeypatch.undo()
        with pytest.raises(LeapformerError, match="is at work in this folder"):
            check_free(tmp_path)


def test_links_are_not_followed(tmp_path):
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LeapformerError, match="could not be written"):
        with locked(tmp_path):
            pass
    assert not (tmp_path / "elsewhere").exists()
