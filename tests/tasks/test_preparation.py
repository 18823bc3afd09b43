"""What every preparation shares: a kill at any moment leaves a folder with which the same command goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from leapformer.errors import LeapformerError
from leapformer.files.writing import STAGING_PREFIX
from leapformer.tasks.card import CARD, read_card
from leapformer.tasks.lra.preparation import prepare
from leapformer.tasks.preparation import PARTS


class Killed(BaseException):
    """Stands in for the end of the process."""


def listops(output: Path) -> dict:
    return prepare("listops", output, count=20, min_length=10, max_length=60, workers=1)


def speech(output: Path) -> dict:
    sf = pytest.importorskip("soundfile")
    from leapformer.tasks.simulst.corpora.preparing import prepare_corpus

    folder = output.parent / "corpus"
    folder.mkdir(exist_ok=True)
    sf.write(folder / "a.wav", [0.0] * 800, 16_000)
    (folder / "train.tsv").write_text("id\taudio\ttgt_text\na\ta.wav\tein Satz\n")
    return prepare_corpus("manifest", folder, output, source_language="en", target_language="de", workers=1)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("work", [listops, speech])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_kill_at_each_rename(work, when, tmp_path, monkeypatch):
    """Before a file has its name, and behind it; nothing is tidied, as after a SIGKILL."""
    work(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    replace, unlink = os.replace, Path.unlink
    for number in range(100):
        output, done, dead = tmp_path / f"run-{number}", [], []

        def killed(source, target, number=number, done=done, dead=dead):
            if len(done) == number:
                if when == "behind":
                    replace(source, target)
                dead.append(True)
                raise Killed
            done.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            # A process that is gone takes no staging file away.
            patch.setattr(Path, "unlink", lambda self, missing_ok=False, dead=dead: dead or unlink(self, missing_ok))
            try:
                work(output)
            except Killed:
                pass
            else:
                assert number > 4
                return
        work(output)
        assert content(output) == expected
    raise AssertionError("expected fewer renames")


@pytest.mark.parametrize("name", [f"{STAGING_PREFIX}{CARD}", f".replaced-{CARD}", f"{STAGING_PREFIX}train.safetensors"])
def test_what_a_kill_leaves_is_ours(name, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_text("{")
    card = listops(tmp_path / "x")
    assert read_card(tmp_path / "x") == card
    (tmp_path / "x" / name).write_text("{")
    (tmp_path / "x" / PARTS).mkdir()
    assert listops(tmp_path / "x") == card
    assert sorted(content(tmp_path / "x")) == [CARD, "test.safetensors", "train.safetensors", "validation.safetensors"]
    assert not (tmp_path / "x" / PARTS).exists()


@pytest.mark.parametrize("name", ["notes.txt", f"{STAGING_PREFIX}notes.txt", f"{STAGING_PREFIX}x-{CARD}"])
def test_what_is_not_ours_stays(name, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_text("mine")
    with pytest.raises(LeapformerError, match="expected an empty folder, found"):
        listops(tmp_path / "x")
    assert (tmp_path / "x" / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("count", 10**15, "--count: expected 1 to 10,000,000, found 1000000000000000"),
        ("count", 1 << 20_000, "--count: expected 1 to 10,000,000, found an integer of 20,001 bits"),
        ("count", -1, "--count: expected none, or 1 or more for a generator, found -1"),
        ("seed", -1, "--seed: expected 0 to 9,223,372,036,854,775,807, found -1"),
        ("seed", 10**30, "--seed: expected 0 to"),
        ("workers", 0, "--workers: expected 1 to 4,096, found 0"),
        ("workers", 10**9, "--workers: expected 1 to 4,096, found 1000000000"),
    ],
    ids=lambda value: (
        f"{value:.1e}"
        if isinstance(value, int) and value.bit_length() < 1000
        else str(value)[:20]
        if isinstance(value, str)
        else "huge"
    ),
)
def test_options_out_of_range(option, value, message, tmp_path):
    with pytest.raises(LeapformerError, match=message):
        prepare("listops", tmp_path / "x", **{option: value})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "file/x"])
def test_outputs_that_cannot_be(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LeapformerError) as caught:
        listops(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", "16", "vocab_size: .*valid integer, found '16'"),
        ("vocab_size", 10**9, "vocab_size: .*less than or equal to 257, found 1000000000"),
        ("max_length", -1, "max_length: .*greater than or equal to 1, found -1"),
        ("pad_id", 1, "pad_id: .*found 1"),
        ("two_documents", True, "train.safetensors: expected two_documents True as in card.json, found none"),
        ("num_classes", 3, r"train.safetensors: labels: expected values below 3 by card.json, found \d"),
        ("splits", {"train": 3}, "splits.train: .*found 3"),
        ("task", "music", "task: .*found 'music'"),
        ("symbols", [[["x"] * 10_000] * 100], "symbols.0: .*found "),
    ],
)
def test_cards_of_other_types(key, value, message, tmp_path):
    from leapformer.tasks.lra.dataset import load

    listops(tmp_path / "x")
    path = tmp_path / "x" / CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(LeapformerError, match=message) as caught:
        load("listops", tmp_path / "x", "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1' + "0" * 5_000 + "}", '{"format": NaN}', "\udcff"])
def test_cards_that_are_no_json(text, tmp_path):
    (tmp_path / CARD).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(LeapformerError) as caught:
        read_card(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
