"""Shards that are made in processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapformer.errors import LeapformerError
from leapformer.tasks import preparation


def write_or_fail(path: Path, fails: bool) -> None:
    """Write a shard, or find a bad row in it."""
    if fails:
        raise LeapformerError("data: row 7 is bad")
    path.write_text("whole")


def test_a_process_that_fails_while_another_ends_is_told(tmp_path, monkeypatch):
    """Whoever ends first: here the look at the first comes when both are gone."""

    def wait_for_all(sentinels, timeout=None):
        return [] if all(preparation_wait([each], timeout=30) for each in sentinels) else None

    preparation_wait = preparation.wait
    monkeypatch.setattr(preparation, "wait", wait_for_all)
    paths = [tmp_path / "0", tmp_path / "1"]
    for fails in ((True, False), (False, True)):
        for path in paths:
            path.unlink(missing_ok=True)
        with pytest.raises(LeapformerError, match="^data: row 7 is bad$"):
            preparation.make_shards(
                write_or_fail,
                paths,
                [(each,) for each in fails],
                workers=2,
                progress=preparation.silent,
                is_whole=Path.is_file,
            )
