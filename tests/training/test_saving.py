"""Saves are whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from leapformer.errors import LeapformerError
from leapformer.files.writing import is_disk_fault, recover, staged_folder, write_json, write_text
from leapformer.training.saving import check_archive, check_weights


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: what a full disk is to the program, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_staged_folder_replaces_the_old_one_when_it_is_whole(tmp_path):
    target = tmp_path / "model"
    for text in ("old", "new"):
        with staged_folder(target) as folder:
            (folder / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["python", "safetensors", "torch"])
def test_a_full_disk_leaves_the_old_content(tmp_path, kind):
    target = tmp_path / "model"
    with staged_folder(target) as folder:
        (folder / "file").write_text("old")
    weights = torch.zeros(10_000)
    with pytest.raises(LeapformerError, match="could not be saved .*; what was saved before is untouched"):
        with largest_file(2000), staged_folder(target) as folder:
            if kind == "python":
                (folder / "file").write_bytes(bytes(40_000))
            elif kind == "safetensors":
                save_file({"weights": weights}, folder / "file")
            else:
                torch.save(weights, folder / "file")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_errors_pass_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with staged_folder(tmp_path / "model"):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert not is_disk_fault(RuntimeError("shape")) and is_disk_fault(OSError(errno.ENOSPC, "full"))


def test_recovery_after_a_crash_between_the_two_renames(tmp_path):
    (tmp_path / ".replaced-model").mkdir()
    (tmp_path / ".saving-other").mkdir()
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_recovery_after_a_crash_behind_the_renames(tmp_path):
    (tmp_path / ".replaced-model").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "new").touch()
    recover(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "results.json"
    write_json(target, {"a": 1})
    with pytest.raises(LeapformerError, match="results.json: could not be written"):
        with largest_file(100):
            write_text(target, "x" * 1000)
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_cut_off_weights_and_archives_are_found(tmp_path):
    weights, archive = tmp_path / "model.safetensors", tmp_path / "optimizer.pt"
    save_file({"weights": torch.zeros(100)}, weights)
    torch.save({"weights": torch.zeros(100)}, archive)
    check_weights(weights)
    check_archive(archive)
    for path, check in ((weights, check_weights), (archive, check_archive)):
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(
            LeapformerError, match=rf"{path.name}: expected .* whole .*cut off|{path.name}: expected whole"
        ):
            check(path)
        path.unlink()
        with pytest.raises(LeapformerError, match="found no such file"):
            check(path)
