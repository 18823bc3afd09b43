"""Retrieval: the release's rows, pairs of papers, and documents that several pairs share."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from leapformer.tasks.lra.dataset import load
from leapformer.tasks.lra.preparation import prepare
from tests.tasks.lra.builders import fails

ROWS = ['1.0\tA\tB\tone "quoted\tsecond \xe9', '0\tA\tC\tone "quoted\tthird', "1\tB\tC\tsecond \xe9\tthird"]


def write_release(folder: Path, rows: list[str], *, inside: str = "tsv_data") -> Path:
    (folder / inside).mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (folder / inside / f"new_aan_pairs.{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def pairs(folder: Path, split: str) -> list[tuple[str, str, int]]:
    dataset = load("retrieval", folder, split)
    assert dataset.two_documents
    return [
        (
            bytes((item["input_ids"] - 1).tolist()).decode(),
            bytes((item["input_ids_1"] - 1).tolist()).decode(),
            item["label"],
        )
        for item in dataset
    ]


@pytest.mark.parametrize("inside", ["tsv_data", "."])
def test_the_release_is_read(tmp_path, inside):
    card = prepare("retrieval", tmp_path / "x", source=write_release(tmp_path / "release", ROWS, inside=inside))
    assert pairs(tmp_path / "x", "validation") == [
        ('one "quoted', "second \xe9", 1), ('one "quoted', "third", 0), ("second \xe9", "third", 1),
    ]  # fmt: skip
    facts = card["splits"]["train"]
    assert (facts["examples"], facts["documents"]) == (3, 3)
    assert (card["vocab_size"], card["num_classes"], card["max_length"]) == (257, 2, 4000)


def test_documents_are_cut(tmp_path):
    source = write_release(tmp_path / "release", [f"1\tA\tB\t{'x' * 5000}\t{'y' * 10}"])
    prepare("retrieval", tmp_path / "x", source=source)
    ((first, second, _),) = pairs(tmp_path / "x", "test")
    assert len(first) == 4000 and len(second) == 10


BAD = [
    ("1\tA\tB\tone", "expected 5 columns, label, id1, id2, text1, text2, found 4"),
    ("2\tA\tB\tone\ttwo", "expected the label 0 or 1, found '2'"),
    ("1\tA\tB\tone\t", "expected two texts, found an empty one"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named_or_skipped(tmp_path, row, message):
    source = write_release(tmp_path / "release", [ROWS[0], row])
    fails(rf"new_aan_pairs\.train\.tsv:2: {message}", "retrieval", tmp_path / "x", source=source)
    card = prepare("retrieval", tmp_path / "y", source=source, skip_bad=True)
    assert len(card["bad_rows"]) == 3 and card["splits"]["train"]["examples"] == 1


def write_papers(folder: Path, papers: list, rows: list[str]) -> Path:
    folder.mkdir()
    (folder / "papers.jsonl.xz").write_bytes(lzma.compress("\n".join(map(json.dumps, papers)).encode()))
    for split in ("train", "dev", "test"):
        (folder / f"pairs.{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


PAPERS = [{"id": "P1", "text": "first"}, {"id": "P2", "text": "second"}, {"id": "P3", "text": "third"}]


def test_pairs_of_papers(tmp_path):
    source = write_papers(tmp_path / "aan", PAPERS, ["1\tP1\tP2", "0\tP1\tP3"])
    card = prepare("retrieval", tmp_path / "x", source=source)
    assert pairs(tmp_path / "x", "test") == [("first", "second", 1), ("first", "third", 0)]
    assert card["splits"]["test"]["documents"] == 3


def test_bad_papers_and_pairs(tmp_path):
    source = write_papers(tmp_path / "aan", [*PAPERS, PAPERS[0], {"id": "P4"}, {"id": "P5", "text": ""}], ["1\tP1\tP2"])
    fails("papers.jsonl.xz:4: expected each id once, found 'P1' again", "retrieval", tmp_path / "x", source=source)
    rows = ["1\tP1\tP2", "1\tP1", "1\tP1\tP9", "x\tP1\tP2"]
    source = write_papers(tmp_path / "other", PAPERS, rows)
    fails("pairs.train.tsv:2: expected 3 columns", "retrieval", tmp_path / "x", source=source)
    card = prepare("retrieval", tmp_path / "y", source=source, skip_bad=True)
    assert [row.split(": ", 1)[1] for row in card["bad_rows"][:3]] == [
        "expected 3 columns, label, id, id, found 2",
        "expected an id of papers.jsonl, found 'P9'",
        "expected the label 0 or 1, found 'x'",
    ]
    for split in ("train", "dev", "test"):
        (source / f"pairs.{split}.tsv").write_text(rows[0])
    (source / "pairs.dev.tsv").unlink()
    fails("pairs.dev.tsv: expected rows of label, id, id", "retrieval", tmp_path / "z", source=source)


def test_other_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    fails("expected tsv_data/new_aan_pairs.train.tsv, or pairs.train.tsv and papers.jsonl", "retrieval", tmp_path / "x",
          source=tmp_path / "empty")  # fmt: skip
