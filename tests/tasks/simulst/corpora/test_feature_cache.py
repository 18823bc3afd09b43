"""Features of a split on disk: made in shards, by one process or several, through interrupts and beside another run."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("kaldi_native_fbank")

from leapformer.tasks.simulst.corpora import feature_cache
from leapformer.tasks.simulst.corpora.feature_cache import CachedFeatures
from leapformer.tasks.simulst.corpora.prepared import SpokenSplit
from tests.tasks.simulst.builders import write_speech


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """60 utterances."""
    folder = tmp_path_factory.mktemp("spoken")
    write_speech(folder)
    return SpokenSplit(folder, "train")


def cached(spoken, cache, **rest) -> CachedFeatures:
    return CachedFeatures(spoken, key="x", cache=cache, **rest)


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "_SHARD", 25)


def test_features_in_processes_are_the_same_and_told(spoken, tmp_path, monkeypatch, small_shards):
    told = []

    def watched(numbers, what):
        for number in numbers:
            told.append((number, len(numbers), what))
            yield number
        told.append(what)

    alone = cached(spoken, tmp_path / "a", progress=watched)
    assert told == [(0, 3, "features"), (1, 3, "features"), (2, 3, "features"), "features"]
    monkeypatch.setattr(feature_cache, "_MANY", 1)
    monkeypatch.setattr(feature_cache, "processors", lambda: 2)
    shared = cached(spoken, tmp_path / "b")
    assert alone.path.read_bytes() == shared.path.read_bytes()
    assert names(tmp_path / "b") == [shared.path.name, f"{shared.path.name}.sha256"]


def test_an_interrupt_of_features_loses_no_shard(spoken, tmp_path, monkeypatch, small_shards):
    first, made = feature_cache.compute_shard, []

    def interrupted(path, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        first(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_cache, "compute_shard", interrupted)
        cached(spoken, tmp_path)
    made.pop(0)
    monkeypatch.setattr(
        feature_cache, "compute_shard", lambda path, *rest: (made.append(path.name), first(path, *rest))
    )
    whole = cached(spoken, tmp_path)
    assert len(made) == 2 and made[1].startswith("00000050-00000060")
    expected = cached(spoken, tmp_path / "other")
    assert whole.path.read_bytes() == expected.path.read_bytes()


def test_another_run_may_be_done_with_the_features_first(spoken, tmp_path, monkeypatch, small_shards):
    first = feature_cache.compute_shard

    def overtaken(path, *rest):
        monkeypatch.setattr(feature_cache, "compute_shard", first)
        cached(spoken, tmp_path)  # makes the file, and takes the shards away
        first(path, *rest)

    monkeypatch.setattr(feature_cache, "compute_shard", overtaken)
    found = cached(spoken, tmp_path)
    assert len(found) == 60 and names(tmp_path) == [found.path.name, f"{found.path.name}.sha256"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "no sum", "sum"])
def test_damaged_features_are_computed_again(spoken, tmp_path, damage, caplog):
    first = cached(spoken, tmp_path)
    whole, beside = first.path.read_bytes(), first.path.with_name(f"{first.path.name}.sha256")
    np.testing.assert_array_equal(np.load(first.path), np.concatenate([each.numpy() for each in first]).astype("f2"))
    if damage == "flip":
        first.path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif damage == "no sum":
        beside.unlink()
    elif damage == "sum":
        beside.write_bytes(b"\xff" * 9)
    else:
        first.path.write_bytes({"cut": whole[:-7], "empty": b"", "other": b"\x93NUMPY words"}[damage])
    again = cached(spoken, tmp_path)
    assert again.path.read_bytes() == whole and beside.is_file()
    assert "its features are computed again" in caplog.text


def test_features_are_taken_from_the_cache(spoken, tmp_path, monkeypatch):
    first = cached(spoken, tmp_path)
    monkeypatch.setattr(feature_cache, "compute_shard", None)
    assert cached(spoken, tmp_path)[3].equal(first[3])
