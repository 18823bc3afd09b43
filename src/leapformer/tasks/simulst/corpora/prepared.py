"""Prepared speech: a folder of utterances with their translations, whoever made them.

A folder holds, for each split,

SPLIT.int16   the samples of all utterances one after another: int16, little-endian, mono, 16,000 Hz
SPLIT.jsonl   one row each: id, text, translation, start and samples (where it is in the file), and what its maker knows
              of it besides (`spoken`: voice, speed, pitch, snr; `corpora`: speaker)

and card.json, which is written last. The samples are not compressed: training reads them again in every epoch, at
random places and through a memory map, while the processors are busy with the model; FLAC would save about 40 % of the
disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from leapformer import __version__
from leapformer.errors import LeapformerError
from leapformer.files.expanding import largest_file
from leapformer.files.reading import read_bytes, read_json_object
from leapformer.files.showing import shown
from leapformer.files.writing import make_folder, staged_file, write_json, write_text
from leapformer.tasks.card import CARD, FORMAT, read_card
from leapformer.tasks.files import parse_json_row, read_lines
from leapformer.tasks.preparation import PARTS, BadRows, Progress, make_shards, parts_key, processors
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE

Example = TypeVar("Example")

_SHARD = 100  # utterances: a few seconds of work
_HELD_OUT = 1_000  # examples for validation and for the test, where they have no files of their own: at most so many
_HELD_OUT_SHARE = 0.1


# ---- reading


class SpokenSplit(Sequence[dict[str, Any]]):
    """The utterances of one split, as rows of its index with "audio": int16 [N] at 16,000 Hz, a read-only memory map.

    Arguments:
        folder: of prepared data.
        split: one that the card names: "train", "validation", "test", or a further test set such as "test-he".

    Raises:
        LeapformerError: the folder is not complete, has no such split, or its files do not fit each other.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = folder = Path(folder)
        self.name = split
        self.card = read_card(folder)
        if split not in self.card["splits"]:
            raise LeapformerError(f"{folder}: expected the split {split}, found {', '.join(self.card['splits'])}")
        index, audio = _split_files(folder, split)
        self.rows = [_check_row(parse_json_row(line, where), where) for line, where in read_lines(index)]
        if not audio.is_file():
            raise LeapformerError(f"{audio}: expected prepared audio, found no such file")
        samples = 0
        for row in self.rows:
            if row["start"] != samples:
                raise LeapformerError(
                    f"data: {index}: expected the utterance {shown(row['id'])} to start at {samples:,}, "
                    f"found {shown(row['start'])}"
                )
            samples += row["samples"]
        if audio.stat().st_size != 2 * samples:
            raise LeapformerError(
                f"{audio}: expected {2 * samples:,} bytes by {index.name}, found {audio.stat().st_size:,}"
            )
        self._audio = np.memmap(audio, dtype="<i2", mode="r") if samples else np.zeros(0, "<i2")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        row = self.rows[number]
        return {**row, "audio": self._audio[row["start"] : row["start"] + row["samples"]]}


_ROW = {"id": str, "text": str, "translation": str, "start": int, "samples": int}


def _check_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of an index, of the types that it is written with."""
    for key, kind in _ROW.items():
        value: Any = row.get(key)
        if type(value) is not kind or (kind is int and not 0 <= value < 2**48):
            expected = "text" if kind is str else "a number of samples"
            raise LeapformerError(f"data: {where}: {key}: expected {expected}, found {shown(value)}")
    return row


def _split_files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}.jsonl", folder / f"{split}.int16"


def file_names(splits: Iterable[str]) -> list[str]:
    """The files of these splits."""
    return [file.name for split in splits for file in _split_files(Path(), split)]


# ---- choosing


def hold_out(
    examples: Sequence[Example], text: Callable[[Example], str], splits: Sequence[str], seed: int
) -> dict[str, list[Example]]:
    """Cut examples into "train" and splits that have none of their own; the same text is in one of them alone.

    Arguments:
        text: of an example.
        splits: to fill, each with a tenth of the texts, at most 1,000, chosen by a hash.
        seed: of the hash.

    Raises:
        LeapformerError: there are too few texts.
    """
    texts = sorted({text(example) for example in examples}, key=lambda each: _hash_of(seed, each))
    share = min(_HELD_OUT, max(1, round(len(texts) * _HELD_OUT_SHARE)))
    if splits and len(texts) <= len(splits) * share:
        raise LeapformerError(f"data: expected more than {len(splits)} texts to hold some out, found {len(texts)}")
    split_of = {each: split for place, split in enumerate(splits) for each in texts[place * share :][:share]}
    parts: dict[str, list[Example]] = {split: [] for split in ("train", *splits)}
    for example in examples:
        parts[split_of.get(text(example), "train")].append(example)
    return parts


def _hash_of(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}|{text}".encode()).digest()


def draw(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    """`count` of the examples in their order, drawn with the seed; None: all of them."""
    if count is None or count >= len(examples):
        return examples
    return [examples[number] for number in np.sort(np.random.default_rng(seed).permutation(len(examples))[:count])]


# ---- writing


@dataclass(frozen=True)
class Utterance:
    """One utterance to be written.

    Arguments:
        row: of the index, all but start and samples.
        recipe: a dataclass of plain values, from which another process makes the samples.
    """

    row: Mapping[str, Any]
    recipe: Any


def write_prepared(
    output: Path,
    splits: Mapping[str, Sequence[Utterance]],
    make_audio: Callable[[Any], np.ndarray],
    *,
    made: Mapping[str, Any],
    facts: Mapping[str, Any],
    bad: BadRows,
    workers: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Make the audio of all splits, shard by shard in processes, put the shards together, and write the card last.

    Arguments:
        output: the folder to fill; see `preparation.is_there`.
        make_audio: the samples of a recipe, int16 [N]; a function of a module. What it raises as LeapformerError is a
            bad row.
        made: what the data depend on, "maker" among it. facts: further keys of the card.
        workers: processes; default: as many as there are processors.

    Returns:
        The card.

    Raises:
        LeapformerError: a bad row that is not to be skipped, or a split without a good one.
    """
    parts = output / PARTS
    make_folder(parts)
    shards = {split: _shards(parts, split, splits[split], (made["maker"], bad.skip)) for split in splits}
    calls = [shard for of_split in shards.values() for shard in of_split]
    recipes = [(make_audio, [utterance.recipe for utterance in utterances], bad.skip) for _, utterances in calls]
    make_shards(
        make_shard,
        [path for path, _ in calls],
        recipes,
        workers=workers or processors(),
        progress=progress,
        is_whole=_is_whole,
    )
    written = {split: _put_together(parts, split, shards[split], bad) for split in splits}
    for split in splits:
        for file in _split_files(parts, split):
            os.replace(file, output / file.name)
    card = {
        "format": FORMAT,
        "task": "spoken",
        "made": dict(made),
        "leapformer": __version__,
        "sample_rate": SAMPLE_RATE,
        **facts,
        "splits": written,
        "bad_rows": bad.found,
    }
    write_json(output / CARD, card)
    shutil.rmtree(parts)
    return card


Shard = tuple[Path, Sequence[Utterance]]


def _shards(parts: Path, split: str, utterances: Sequence[Utterance], identity: Sequence[Any]) -> list[Shard]:
    """Path and utterances of each shard; the path names all that the audio depends on."""
    shards = []
    for first in range(0, len(utterances), _SHARD):
        some = utterances[first : first + _SHARD]
        key = parts_key(*identity, [identify(utterance.recipe) for utterance in some])
        shards.append((parts / f"{split}-{first // _SHARD:05d}-{key}.json", some))
    return shards


def identify(recipe: Any) -> dict[str, Any]:
    """The values of a recipe as JSON can hold them: bytes by their hash, paths by their names."""
    values = asdict(recipe)
    return {
        name: hashlib.sha256(value).hexdigest()
        if isinstance(value, bytes)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in values.items()
    }


def make_shard(path: Path, make_audio: Callable[[Any], np.ndarray], recipes: Sequence[Any], skip_bad: bool) -> None:
    """Write the samples of these recipes to PATH with the suffix .int16, and then PATH, which says how many each has.

    A recipe that is bad has none, and its fault is listed.
    """
    bad, sizes = BadRows(skip_bad), []
    with staged_file(path.with_suffix(".int16")) as file:
        for recipe in recipes:
            samples = np.zeros(0, np.int16)
            with bad.guard():
                samples = make_audio(recipe)
            file.write(samples.astype("<i2").tobytes())
            sizes.append(len(samples))
    write_json(path, {"samples": sizes, "bad": bad.found})


def _is_whole(path: Path) -> bool:
    try:
        return path.with_suffix(".int16").stat().st_size == 2 * sum(_read_shard(path)[0])
    except (OSError, LeapformerError):
        return False


def _read_shard(path: Path) -> tuple[list[int], list[str]]:
    """The samples of each utterance of a shard, and its bad rows.

    Raises:
        LeapformerError: it is none.
    """
    shard = read_json_object(path)
    sizes, bad = shard.get("samples"), shard.get("bad")
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise LeapformerError(f"{path}: samples: expected a list of sizes, found {shown(sizes)}")
    if not isinstance(bad, list) or not all(isinstance(row, str) for row in bad):
        raise LeapformerError(f"{path}: bad: expected a list of texts, found {shown(bad)}")
    return sizes, bad


def _put_together(parts: Path, split: str, shards: Sequence[Shard], bad: BadRows) -> dict[str, Any]:
    """Audio file and index of a split, and what the card says of them."""
    index, audio = _split_files(parts, split)
    rows: list[dict[str, Any]] = []
    start, digest = 0, hashlib.sha256()
    with staged_file(audio) as file:
        for path, utterances in shards:
            content = read_bytes(path.with_suffix(".int16"), largest=largest_file())
            file.write(content)
            digest.update(content)
            sizes, bad_rows = _read_shard(path)
            bad.found.extend(bad_rows)
            for size, utterance in zip(sizes, utterances, strict=True):
                if size:
                    rows.append(_with_place(utterance.row, start, size))
                start += size
    if not rows:
        raise LeapformerError(f"{split}: expected at least one good utterance, found none")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(index, text)
    return {
        "utterances": len(rows),
        "seconds": round(start / SAMPLE_RATE, 1),
        "bytes": 2 * start,
        "speakers": len({row.get("voice") or row.get("speaker") for row in rows} - {None, ""}),
        "sha256": {audio.name: digest.hexdigest(), index.name: hashlib.sha256(text.encode()).hexdigest()},
    }


def _with_place(row: Mapping[str, Any], start: int, samples: int) -> dict[str, Any]:
    first = {
        "id": row["id"],
        "text": row["text"],
        "translation": row["translation"],
        "start": start,
        "samples": samples,
    }
    return {**first, **row}
