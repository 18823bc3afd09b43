"""Text: the sentiment of IMDb reviews, read byte by byte (Maas et al. 2011; Tay et al. 2021).

An id is byte + 1, 0 is padding; documents are cut at 4,000 bytes. The literature validates on the test set; here a
tenth of the training set, drawn with the seed, is held out for that, and the test set stays untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.expanding import COMPRESSIONS
from leapformer.files.reading import read_bytes
from leapformer.files.showing import shown
from leapformer.tasks.files import list_files, parse_json_row, read_lines, row_text
from leapformer.tasks.lra.harness import convert_pickles, has_pickles
from leapformer.tasks.lra.preparation import Description, Job, hold_out

CONVERTER = GENERATOR = "text reader 1"
OPTIONS = {"max_length": 4000}

BYTE_VOCABULARY = 257  # padding and 256 bytes
BYTE_SHIFT = 1
CLASSES = ("neg", "pos")  # the label is the place


def prepare(job: Job) -> Description:
    """Convert the raw folders, rows of JSON, or an older harness's pickles."""
    assert job.source is not None
    limit = check_limit(job)
    if has_pickles(job.source, "text"):
        return convert_pickles(job, "text", byte_description(limit, CONVERTER, num_classes=2))
    train = list(_read_split(job, job.source, "train"))
    kept, held = hold_out(len(train), job)
    for split, numbers in (("train", kept), ("validation", held)):
        with job.writer(split) as writer:
            for number in numbers:
                writer.add(train[number][0][:limit], train[number][1])
    with job.writer("test") as writer:
        for document, label in _read_split(job, job.source, "test"):
            writer.add(document[:limit], label)
    return byte_description(limit, CONVERTER, num_classes=2)


def check_limit(job: Job) -> int:
    """The bytes at which documents are cut."""
    limit = job.options["max_length"]
    if limit < 1:
        raise LeapformerError(f"--max-length: expected 1 or more, found {limit}")
    return limit


def byte_description(limit: int, maker: str, *, num_classes: int) -> Description:
    """Documents stored as bytes, and read as ids from 1 to 256."""
    return Description(BYTE_VOCABULARY, num_classes, limit, maker, pad_id=0, shift=BYTE_SHIFT)


def _read_split(job: Job, source: Path, split: str) -> Iterator[tuple[bytes, int]]:
    """Bytes and label of each document of "train" or "test", in the order of the source."""
    for folder in (source, source / "aclImdb"):
        if (folder / split).is_dir():
            yield from _read_folders(job, folder / split)
            return
    files = [source / f"{split}.jsonl{suffix}" for suffix in ("", *COMPRESSIONS)]
    for file in files:
        if file.is_file():
            yield from _read_rows(job, file)
            return
    raise LeapformerError(
        f"--from {source}: expected the folders {split}/pos and {split}/neg, or {split}.jsonl "
        f"(or with {', '.join(COMPRESSIONS)}), found neither"
    )


def _read_folders(job: Job, folder: Path) -> Iterator[tuple[bytes, int]]:
    for label, name in enumerate(CLASSES):
        if not (folder / name).is_dir():
            raise LeapformerError(f"{folder}: expected the folders pos and neg, found no {name}")
        files = list_files(folder / name, "*.txt")
        files.sort(key=lambda file: (len(file.stem.split("_")[0]), file.name))
        if not files:
            raise LeapformerError(f"{folder / name}: expected .txt files, found none")
        for number, file in enumerate(files, start=1):
            with job.bad.guard():
                yield _read_document(file), label
            if number % 1000 == 0 or number == len(files):
                job.progress(number, len(files), f"{folder.name}/{name}")


def _read_document(file: Path) -> bytes:
    document = read_bytes(file)
    if not document:
        raise LeapformerError(f"{file}: expected text, found an empty file")
    return document


def _read_rows(job: Job, file: Path) -> Iterator[tuple[bytes, int]]:
    for line, where in read_lines(file):
        with job.bad.guard():
            content = parse_json_row(line, where)
            label = content.get("label")
            if isinstance(label, bool | list | dict) or label not in (0, 1):
                raise LeapformerError(f"{where}: expected the label 0 (negative) or 1 (positive), found {shown(label)}")
            text = row_text(content, "text", where)
            if not text:
                raise LeapformerError(f"{where}: expected text, found none")
            yield text.encode(), int(label)
