"""The processed data of older research harnesses: pickled lists of {"input_ids_0", ["input_ids_1"], "label"}.

Files are named lra-TASK.SPLIT.pickle, or TASK.SPLIT.pickle, with the splits train, dev and test. Their ids are kept;
zeros at the end are padding, except in pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut, shown
from leapformer.tasks.files import list_files
from leapformer.tasks.lra.preparation import Description, Job
from leapformer.tasks.lra.unpickling import read_pickle

SPLIT_NAMES = {"train": ("train",), "validation": ("dev", "validation", "val"), "test": ("test",)}


def has_pickles(folder: Path, task: str) -> bool:
    """Whether the training split of a task lies there as a pickle."""
    return folder.is_dir() and _find(folder, task, "train") is not None


def _find(folder: Path, task: str, split: str) -> Path | None:
    """lra-pathfinder32-curv_contour_length_14.train.pickle is one of pathfinder's."""
    for name in SPLIT_NAMES[split]:
        for start in (f"lra-{task}", task):
            found = list_files(folder, f"{start}*.{name}.pickle")
            if found:
                return found[0]
    return None


def convert_pickles(job: Job, task: str, description: Description, *, own_symbols: bool = False) -> Description:
    """Convert the three files, and return the description of what was found.

    Arguments:
        description: of the task's own data; its vocabulary and classes bound the ids and labels.
        own_symbols: the harness numbered its symbols itself, so that the vocabulary is what occurs.
    """
    assert job.source is not None
    padded = description.pad_id is not None
    two_documents = task == "retrieval"
    longest, highest = 0, 0
    for split in SPLIT_NAMES:
        path = _find(job.source, task, split)
        if path is None:
            raise LeapformerError(f"{job.source}: expected lra-{task}.{SPLIT_NAMES[split][0]}.pickle, found none")
        with job.writer(split, two_documents=two_documents) as writer:
            for documents, label in _read(path, job, two_documents, description):
                if padded:
                    documents = [document[: np.flatnonzero(document)[-1] + 1] for document in documents]
                longest = max(longest, *map(len, documents))
                highest = max(highest, *(int(document.max()) for document in documents))
                # Byte tasks store the byte, which is what reading shifts up again.
                stored = [(document - description.shift).astype(np.uint8).tobytes() for document in documents]
                if two_documents:
                    writer.add_pair(writer.add_document(stored[0]), writer.add_document(stored[1]), label)
                else:
                    writer.add(stored[0], label)
        job.progress(1, 1, path.name)
    vocab_size = highest + 1 if own_symbols else description.vocab_size
    return replace(description, vocab_size=vocab_size, max_length=longest, symbols=())


def _read(path: Path, job: Job, two_documents: bool, description: Description) -> Iterator[tuple[list[Any], int]]:
    rows = read_pickle(path)
    if not isinstance(rows, list):
        raise LeapformerError(f"{path}: expected a list of examples, found {type(rows).__name__}")
    names = ["input_ids_0", "input_ids_1"] if two_documents else ["input_ids_0"]
    for number, row in enumerate(rows):
        with job.bad.guard():
            where = f"{path}:{number}"
            if not isinstance(row, dict) or not {*names, "label"} <= row.keys():
                raise LeapformerError(f"{where}: expected {', '.join(names)} and label, found {_keys(row)}")
            documents = [_ids(row[name], f"{where}: {name}", description) for name in names]
            yield documents, check_label(row["label"], description.num_classes, where)


def _keys(row: Any) -> str:
    return (
        cut(", ".join(key if isinstance(key, str) else shown(key) for key in list(row)[:8]))
        if isinstance(row, dict)
        else type(row).__name__
    )


def _ids(value: Any, where: str, description: Description) -> np.ndarray:
    # Of other lists numpy would make an array of all that they hold, again for every place where it stands.
    flat = isinstance(value, np.ndarray) or (isinstance(value, list) and {type(each) for each in value} == {int})
    try:
        ids = np.asarray(value if flat else [])
    except OverflowError:
        ids = np.zeros(0)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise LeapformerError(f"{where}: expected a list of whole numbers, found something else")
    if ids.min() < 0 or ids.max() >= description.vocab_size:
        raise LeapformerError(
            f"{where}: expected ids 0 to {description.vocab_size - 1}, found {ids.min()} to {ids.max()}"
        )
    if description.pad_id is not None:
        if not ids.any():
            raise LeapformerError(f"{where}: expected a document, found padding alone")
        if not ids[: np.flatnonzero(ids)[-1]].all():
            raise LeapformerError(f"{where}: expected zeros as padding at the end alone, found one before")
    return ids.astype(np.int64)


def check_label(value: Any, num_classes: int, where: str) -> int:
    """A label as a number.

    Raises:
        LeapformerError: it is none, or out of range.
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
        raise LeapformerError(f"{where}: expected a label 0 to {num_classes - 1}, found {shown(value)!r}")
    return value
