"""Preparing the data of a task: from a source or a generator to a folder that `dataset.load` reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from leapformer import __version__
from leapformer.errors import LeapformerError
from leapformer.files.checksums import sha256
from leapformer.files.showing import cut, shown
from leapformer.files.writing import make_folder, write_json
from leapformer.tasks import preparation as shared
from leapformer.tasks.card import CARD, FORMAT, SPLITS, read_card
from leapformer.tasks.lra import TASKS
from leapformer.tasks.lra.storage import SplitWriter, read_arrays
from leapformer.tasks.preparation import PARTS, BadRows, Progress, is_there, processors, silent

GENERATED = ("listops", "pathfinder")
VALIDATION_SHARE = 0.1  # of the training examples, where a source has no validation split of its own


@dataclass(frozen=True)
class Description:
    """What a model has to know of the data, and what made them.

    Arguments:
        vocab_size, num_classes, max_length: see `dataset.LraDataset`.
        pad_id: 0, or None where every id is data.
        shift: what reading adds to the stored tokens.
        maker: the part that made them, with its version; a new version may make other data of the same seed.
        symbols: names of the ids, where there are any.
        notes: further facts for the card.
    """

    vocab_size: int
    num_classes: int
    max_length: int
    maker: str
    pad_id: int | None = 0
    shift: int = 0
    symbols: Sequence[str] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """One preparation, as a task's module sees it.

    Arguments:
        output: the folder to fill.
        source: what to read; None generates.
        seed: of everything that is drawn.
        workers: processes of a generator.
        count: training examples of a generator; None: as many as the release has.
        options: the task's own.
        bad: bad rows.
        progress: called now and then.
    """

    output: Path
    source: Path | None
    seed: int
    workers: int
    count: int | None
    options: dict[str, Any]
    bad: BadRows
    progress: Progress

    def writer(self, split: str, *, two_documents: bool = False) -> SplitWriter:
        """A writer of one split; its file waits in `.parts` for the others."""
        return SplitWriter(self.output / PARTS / f"{split}.safetensors", two_documents=two_documents)

    def generator(self, *purpose: int) -> np.random.Generator:
        """A random generator of its own for each purpose."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=purpose))


def prepare(
    task: str,
    output: str | Path,
    *,
    source: str | Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    count: int | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Generate or convert the data of a task, and return their card.

    Arguments:
        task: "listops", "text", "retrieval", "image" or "pathfinder".
        output: the folder to fill; what is complete there and was made the same way is left as it is.
        source: file or folder to convert; None generates listops and pathfinder.
        seed: of everything that is drawn; the result does not depend on `workers`.
        workers: processes of a generator; default: as many as there are processors.
        count: training examples of a generator; validation and test keep their size up to a tenth of it.
        skip_bad: go on over bad rows; the card lists them.
        options: listops: min_length, max_length (of generated expressions). pathfinder: size, level (generated).
            text, retrieval: max_length, where documents are cut.

    Raises:
        LeapformerError: a fault of the source or of an option, or other data in the folder.
    """
    output = Path(output)
    if task not in TASKS:
        raise LeapformerError(f"lra: expected one of {', '.join(TASKS)}, found {task!r}")
    module = import_module(f"leapformer.tasks.lra.{task}")
    options = _checked_options(task, module.OPTIONS, options)
    if source is None and task not in GENERATED:
        raise LeapformerError(f"lra-{task}: expected --from with what to convert, found none")
    if source is not None and not os.path.exists(source):
        raise LeapformerError(f"--from {cut(source, 240)}: expected a file or folder, found nothing")
    if count is not None and (source is not None or count < 1):
        raise LeapformerError(f"--count: expected none beside --from, or an integer from 1 on, found {shown(count)}")
    shared.check_general(seed=seed, count=count, workers=workers)
    made = {
        "task": task,
        "source": Path(source).name if source is not None else None,
        "seed": seed,
        "count": count,
        "options": options,
        "maker": module.CONVERTER if source is not None else module.GENERATOR,
    }
    if is_there(output, made, [f"{split}.safetensors" for split in SPLITS]):
        return read_card(output)
    workers = workers or processors()
    bad = BadRows(skip_bad)
    job = Job(output, Path(source) if source is not None else None, seed, workers, count, options, bad, progress)
    make_folder(output / PARTS)
    for split in SPLITS:  # an interrupted preparation may have been of other data
        (output / PARTS / f"{split}.safetensors").unlink(missing_ok=True)
    description = module.prepare(job)
    card = _card(output, made, description, bad.found)
    for split in SPLITS:
        file = output / PARTS / f"{split}.safetensors"
        if file.is_file():
            os.replace(file, output / file.name)
    write_json(output / CARD, card)
    shutil.rmtree(output / PARTS)
    return card


def _checked_options(task: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in defaults:
            raise LeapformerError(f"lra-{task}: --{name.replace('_', '-')} is not an option of this task")
    return {**defaults, **chosen}


def _card(output: Path, made: Mapping[str, Any], description: Description, bad: Sequence[str]) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        file = output / PARTS / f"{split}.safetensors"
        if file.is_file():
            splits[split] = _split_facts(file, description.num_classes)
    if not splits.get("train"):
        raise LeapformerError(f"{made['source']}: expected training examples, found none")
    return {
        "format": FORMAT,
        "task": made["task"],
        "made": dict(made),
        "leapformer": __version__,
        "vocab_size": description.vocab_size,
        "num_classes": description.num_classes,
        "max_length": description.max_length,
        "pad_id": description.pad_id,
        "shift": description.shift,
        "two_documents": "pairs" in read_arrays(output / PARTS / "train.safetensors"),
        "symbols": list(description.symbols),
        "notes": dict(description.notes),
        "splits": splits,
        "bad_rows": list(bad),
    }


def _split_facts(file: Path, num_classes: int) -> dict[str, Any]:
    arrays = read_arrays(file)
    lengths = np.diff(arrays["offsets"])
    return {
        "examples": len(arrays["labels"]),
        "examples_by_label": np.bincount(arrays["labels"], minlength=num_classes).tolist(),
        "documents": len(lengths),
        "shortest": int(lengths.min()) if len(lengths) else 0,
        "mean_length": round(float(lengths.mean()), 2) if len(lengths) else 0.0,
        "longest": int(lengths.max(initial=0)),
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
    }


def hold_out(examples: int, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples that stay in training, and of the share held out for validation; seeded."""
    order = job.generator(1).permutation(examples)
    held = round(examples * VALIDATION_SHARE)
    return np.sort(order[held:]), np.sort(order[:held])


def make_shards(make: Callable[..., None], paths: Sequence[Path], arguments: Sequence[tuple], job: Job) -> None:
    """`preparation.make_shards` with the processes and the progress of a job, for shards of the layout of `storage`."""
    shared.make_shards(make, paths, arguments, workers=job.workers, progress=job.progress, is_whole=_is_whole)


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_arrays(path)
    except LeapformerError:
        return False
    return True
