"""Text: raw folders and rows of JSON, as they are found, and one line for what is wrong with them."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from leapformer.tasks.lra.dataset import load
from leapformer.tasks.lra.preparation import prepare
from tests.tasks.lra.builders import fails

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def write_rows(folder: Path, rows: list[dict], *, suffix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        text = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / f"{split}.jsonl{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    return folder


def write_folders(root: Path, reviews: int) -> Path:
    for split in ("train", "test"):
        for kind in ("pos", "neg"):
            folder = root / "aclImdb" / split / kind
            folder.mkdir(parents=True)
            for number in range(reviews):
                (folder / f"{number}_7.txt").write_bytes(f"{split} {kind} {number} \xe9".encode("latin-1"))
        (root / "aclImdb" / split / "unsup").mkdir()
    return root


def texts(folder: Path, split: str) -> dict[str, int]:
    dataset = load("text", folder, split)
    return {bytes((item["input_ids"] - 1).tolist()).decode("latin-1"): item["label"] for item in dataset}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_rows_of_json(tmp_path, suffix):
    rows = [{"id": n, "label": n % 2, "rating": 7, "text": f"review {n}"} for n in range(20)]
    card = prepare("text", tmp_path / "x", source=write_rows(tmp_path / "imdb", rows, suffix=suffix))
    assert [card["splits"][split]["examples"] for split in ("train", "validation", "test")] == [18, 2, 20]
    expected = {f"review {n}": n % 2 for n in range(20)}
    assert texts(tmp_path / "x", "test") == expected
    assert {**texts(tmp_path / "x", "train"), **texts(tmp_path / "x", "validation")} == expected


def test_the_raw_folders_are_bytes_of_any_kind(tmp_path):
    source = write_folders(tmp_path / "raw", 12)
    prepare("text", tmp_path / "x", source=source)
    test = texts(tmp_path / "x", "test")
    assert test == {f"test {kind} {n} \xe9": int(kind == "pos") for kind in ("pos", "neg") for n in range(12)}
    # Negative ones come first, and numbers count as numbers.
    assert list(test)[:3] == ["test neg 0 \xe9", "test neg 1 \xe9", "test neg 2 \xe9"]
    assert len(texts(tmp_path / "x", "train")) == 22 and len(texts(tmp_path / "x", "validation")) == 2


def test_the_seed_draws_the_validation_set(tmp_path):
    rows = [{"label": 0, "text": str(n)} for n in range(100)]
    source = write_rows(tmp_path / "imdb", rows)
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare("text", tmp_path / name, source=source, seed=seed)
        drawn.append(texts(tmp_path / name, "validation").keys())
    assert drawn[0] == drawn[1] != drawn[2]


def test_documents_are_cut(tmp_path):
    source = write_rows(tmp_path / "imdb", [{"label": 1, "text": "x" * 5000}] * 10)
    prepare("text", tmp_path / "x", source=source)
    prepare("text", tmp_path / "y", source=source, max_length=7)
    assert len(load("text", tmp_path / "x", "test")[0]["input_ids"]) == 4000
    assert (
        len(load("text", tmp_path / "y", "test")[0]["input_ids"])
        == 7
        == load("text", tmp_path / "y", "test").max_length
    )
    fails("--max-length: expected 1 or more, found 0", "text", tmp_path / "z", source=source, max_length=0)


BAD = [
    ("{", "expected a JSON object"),
    ("[1]", "expected a JSON object, found list"),
    ('{"label": 2, "text": "x"}', r"expected the label 0 \(negative\) or 1 \(positive\), found 2"),
    ('{"label": true, "text": "x"}', "found True"),
    ('{"text": "x"}', "found None"),
    ('{"label": 1}', "expected text under 'text', found keys label"),
    ('{"label": 1, "text": ""}', "expected text, found none"),
    ('{"label": 1, "text": "\\ud800"}', "found a lone surrogate"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named_or_skipped(tmp_path, row, message):
    source = write_rows(tmp_path / "imdb", [{"label": 0, "text": "x"}] * 10)
    with (source / "train.jsonl").open("a") as file:
        file.write(row + "\n")
    fails(rf"train\.jsonl:11: .*{message}", "text", tmp_path / "x", source=source)
    card = prepare("text", tmp_path / "y", source=source, skip_bad=True)
    assert len(card["bad_rows"]) == 1 and "train.jsonl:11: " in card["bad_rows"][0]
    assert card["splits"]["train"]["examples"] + card["splits"]["validation"]["examples"] == 10


def test_folders_of_another_layout(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(
        "expected the folders train/pos and train/neg, or train.jsonl",
        "text",
        tmp_path / "x",
        source=tmp_path / "empty",
    )
    source = write_folders(tmp_path / "raw", 2)
    (source / "aclImdb" / "test" / "pos" / "1_7.txt").write_bytes(b"")
    fails("1_7.txt: expected text, found an empty file", "text", tmp_path / "x", source=source)
    for file in (source / "aclImdb" / "test" / "neg").iterdir():
        file.unlink()
    fails("neg: expected .txt files, found none", "text", tmp_path / "x", source=source)
    (source / "aclImdb" / "test" / "neg").rmdir()
    fails("expected the folders pos and neg, found no neg", "text", tmp_path / "x", source=source)
    fails("expected --from", "text", tmp_path / "x")


def test_hidden_files_are_no_reviews(tmp_path):
    source = write_folders(tmp_path / "imdb", 20)
    expected = prepare("text", tmp_path / "x", source=source)["splits"]
    (source / "aclImdb" / "train" / "pos" / "._0_9.txt").write_bytes(b"\0\5\x16\7")
    (source / "aclImdb" / "test" / "neg" / ".DS_Store.txt").write_bytes(b"x")
    assert prepare("text", tmp_path / "y", source=source)["splits"] == expected
