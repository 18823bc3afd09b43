"""Retrieval: does one paper cite the other? Two documents an example, byte by byte (AAN; Tay et al. 2021).

An id is byte + 1, 0 is padding; documents are cut at 4,000 bytes. A document that stands in several pairs is kept once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.expanding import COMPRESSIONS
from leapformer.tasks.files import iterate_lines, parse_json_row, read_lines, row_text
from leapformer.tasks.lra.harness import convert_pickles, has_pickles
from leapformer.tasks.lra.preparation import Description, Job
from leapformer.tasks.lra.text import byte_description, check_limit

CONVERTER = GENERATOR = "retrieval reader 1"
OPTIONS = {"max_length": 4000}

RELEASE_NAMES = {"train": "train", "validation": "eval", "test": "test"}
PAIR_NAMES = {"train": "train", "validation": "dev", "test": "test"}
LABELS = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}

Pairs = Iterator[tuple[bytes, bytes, int]]


def prepare(job: Job) -> Description:
    """Convert the release's rows, pairs of papers, or an older harness's pickles."""
    assert job.source is not None
    limit = check_limit(job)
    description = byte_description(limit, CONVERTER, num_classes=2)
    if has_pickles(job.source, "retrieval"):
        return convert_pickles(job, "retrieval", description)
    papers = _find_papers(job.source)
    documents = _read_papers(job, papers) if papers else {}
    for split in RELEASE_NAMES:
        pairs = _read_pairs(job, split, documents) if papers else _read_release(job, split)
        with job.writer(split, two_documents=True) as writer:
            numbers: dict[bytes, int] = {}
            for first, second, label in pairs:
                places = []
                for document in (first[:limit], second[:limit]):
                    key = hashlib.sha256(document).digest()
                    if key not in numbers:
                        numbers[key] = writer.add_document(document)
                    places.append(numbers[key])
                writer.add_pair(places[0], places[1], label)
    return description


def _check_label(value: bytes, where: str) -> int:
    if value not in LABELS:
        raise LeapformerError(f"{where}: expected the label 0 or 1, found {value.decode(errors='replace')[:40]!r}")
    return LABELS[value]


# ---- the release: label, id1, id2, text1, text2


def _read_release(job: Job, split: str) -> Pairs:
    assert job.source is not None
    name = f"new_aan_pairs.{RELEASE_NAMES[split]}.tsv"
    candidates = [folder / name for folder in (job.source, job.source / "tsv_data")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise LeapformerError(
            f"--from {job.source}: expected tsv_data/{name}, or pairs.{PAIR_NAMES[split]}.tsv and papers.jsonl, found "
            "none"
        )
    size, position = path.stat().st_size, 0
    for row, line in enumerate(iterate_lines(path), start=1):
        position += len(line)
        with job.bad.guard():
            yield _parse_row(line.rstrip(b"\r\n"), f"{path}:{row}")
        if row % 1000 == 0 or position == size:
            job.progress(position, size, path.name)


def _parse_row(line: bytes, where: str) -> tuple[bytes, bytes, int]:
    """No quoting: a quotation mark is a character like the others."""
    columns = line.split(b"\t")
    if len(columns) != 5:
        raise LeapformerError(f"{where}: expected 5 columns, label, id1, id2, text1, text2, found {len(columns)}")
    label, _, _, first, second = columns
    if not first or not second:
        raise LeapformerError(f"{where}: expected two texts, found an empty one")
    return first, second, _check_label(label, where)


# ---- pairs of ids, and the papers in a file of their own


def _find_papers(folder: Path) -> Path | None:
    candidates = [folder / f"papers.jsonl{suffix}" for suffix in ("", *COMPRESSIONS)]
    return next((path for path in candidates if path.is_file()), None)


def _read_papers(job: Job, path: Path) -> dict[bytes, bytes]:
    papers: dict[bytes, bytes] = {}
    for line, where in read_lines(path):
        with job.bad.guard():
            content = parse_json_row(line, where)
            identity = row_text(content, "id", where).encode()
            text = row_text(content, "text", where).encode()
            if not text:
                raise LeapformerError(f"{where}: expected text, found none")
            if identity in papers:
                raise LeapformerError(f"{where}: expected each id once, found {identity.decode()!r:.40} again")
            papers[identity] = text
    return papers


def _read_pairs(job: Job, split: str, papers: dict[bytes, bytes]) -> Pairs:
    assert job.source is not None
    path = job.source / f"pairs.{PAIR_NAMES[split]}.tsv"
    if not path.is_file():
        raise LeapformerError(f"{path}: expected rows of label, id, id, found no such file")
    for line, where in read_lines(path):
        with job.bad.guard():
            columns = line.rstrip("\r").encode().split(b"\t")
            if len(columns) != 3:
                raise LeapformerError(f"{where}: expected 3 columns, label, id, id, found {len(columns)}")
            label = _check_label(columns[0], where)
            for identity in columns[1:]:
                if identity not in papers:
                    raise LeapformerError(f"{where}: expected an id of papers.jsonl, found {identity.decode()!r:.40}")
            yield papers[columns[1]], papers[columns[2]], label
    job.progress(1, 1, path.name)
