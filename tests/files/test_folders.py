"""What may lie in a folder that somebody handed over, and where one may be made."""

from __future__ import annotations

import os

import pytest

from leapformer.errors import LeapformerError
from leapformer.files.folders import check_output_folder, check_own_files


def test_files_folders_and_links_that_stay_inside(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "a").write_text("1")
    (run / "best").symlink_to("model")
    (run / "dangling").symlink_to("nothing")
    check_own_files(run)
    (tmp_path / "link").symlink_to(run)
    check_own_files(tmp_path / "link")
    check_own_files(tmp_path / "not-there")


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "/dev/zero", "..", "model/../../outside", "../run-2"])
def test_a_link_that_leads_out_is_refused(tmp_path, target):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").symlink_to(target if target.startswith("/") else "../" + target)
    (tmp_path / "outside").write_text("secret")
    with pytest.raises(LeapformerError, match="expected no link that leads out of .*run, found one"):
        check_own_files(tmp_path / "run")


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(LeapformerError, match=r"metrics\.jsonl: expected a file, found a pipe"):
        check_own_files(tmp_path)


def test_where_a_folder_may_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "new" / "newer", "relative"):
        check_output_folder(path)
    for path, found in (
        (tmp_path / "file", "found a file"), (tmp_path / "file" / "x", f"found a file at {tmp_path / 'file'}"),
        ("/dev/full", "found a device"), ("x" * 5000, "File name too long"), ("a\0b", "a zero byte"),
    ):  # fmt: skip
        with pytest.raises(LeapformerError, match="--output .*expected a folder") as caught:
            check_output_folder(path)
        assert found in str(caught.value) and len(str(caught.value)) < 400
