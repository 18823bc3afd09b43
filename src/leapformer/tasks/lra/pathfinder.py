"""Pathfinder: are the two discs on one dashed curve? 1,024 pixels in a row at 32 x 32 (Linsley et al. 2018; Tay et al.
2021). At 128 x 128 it is Path-X.

A picture has no padding: pixel 0 is black, and a symbol like the others. 80 % for training, 10 % for validation and 10
% for the test, drawn with the seed.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.files.reading import read_bytes
from leapformer.files.showing import cut
from leapformer.tasks.files import list_files
from leapformer.tasks.lra.harness import convert_pickles, has_pickles
from leapformer.tasks.lra.image import read_picture, read_picture_file
from leapformer.tasks.lra.preparation import Description, Job, make_shards
from leapformer.tasks.lra.snakes import LEVELS, SETTINGS, draw
from leapformer.tasks.lra.storage import SplitWriter, read_arrays
from leapformer.tasks.preparation import PARTS, parts_key

GENERATOR = "pathfinder generator 1"
CONVERTER = "pathfinder reader 1"
OPTIONS = {"size": 32, "level": 14}

TRAIN = 160_000  # of 200,000
SHARD_PIXELS = 2_000 * 32 * 32

_FOLDERS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
_LABEL_COLUMN = 3
LARGEST_METADATA = 1 << 28  # bytes of one file; the release's have half a megabyte


def prepare(job: Job) -> Description:
    """Draw the pictures, or convert the release's folders or an older harness's pickles."""
    size, level = job.options["size"], job.options["level"]
    if size not in SETTINGS:
        raise LeapformerError(f"--size: expected {_list(SETTINGS)}, found {size}")
    if level not in LEVELS:
        raise LeapformerError(f"--level: expected {_list(LEVELS)}, found {level}")
    description = Description(256, 2, size * size, GENERATOR if job.source is None else CONVERTER, pad_id=None)
    if job.source is None:
        _generate(job, size, level)
    elif has_pickles(job.source, "pathfinder"):
        return convert_pickles(job, "pathfinder", description)
    else:
        return replace(description, notes={"empty_files": _convert(job, size, level)})
    return description


def _list(values: Iterable[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}"


# ---- generator


def make_shard(path: Path, seed: int, number: int, size: int, level: int, count: int) -> None:
    """Write the shard of this number."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, number)))
    pictures = draw(generator, SETTINGS[size], paddles=level, count=count)
    with SplitWriter(path) as writer:
        writer.add_many(pictures.images, np.full(count, size * size), pictures.labels)


def _generate(job: Job, size: int, level: int) -> None:
    """The shards in their order; pictures are drawn independently, so that any cut into splits is a random one."""
    train = job.count or TRAIN
    rest = max(1, train // 8)
    counts = {"train": train, "validation": rest, "test": rest}
    shard = SHARD_PIXELS // (size * size)
    total = sum(counts.values())
    numbers = range(-(-total // shard))
    key = parts_key(GENERATOR, job.seed, size, level, shard)
    paths = [job.output / PARTS / f"pathfinder-{key}-{number:05d}.safetensors" for number in numbers]
    make_shards(make_shard, paths, [(job.seed, number, size, level, shard) for number in numbers], job)
    begin = 0
    for split, count in counts.items():
        with job.writer(split) as writer:
            for tokens, labels in _rows(paths, shard, begin, begin + count):
                writer.add_many(tokens, np.full(len(labels), size * size), labels)
        begin += count


def _rows(paths: list[Path], shard: int, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures and labels number `begin` to `end` - 1, shard by shard."""
    for number in range(begin // shard, -(-end // shard)):
        arrays = read_arrays(paths[number])
        first, last = max(begin - number * shard, 0), min(end - number * shard, shard)
        offsets = arrays["offsets"]
        yield arrays["tokens"][offsets[first] : offsets[last]], arrays["labels"][first:last]


# ---- the release's folders


def _convert(job: Job, size: int, level: int) -> int:
    """pathfinder32/curv_contour_length_14/{imgs/BATCH/sample_I.png, metadata/BATCH.npy}; counts the empty pictures."""
    assert job.source is not None
    folder = _find_folder(job.source, size, level)
    rows = list(_metadata(job, folder))
    order = job.generator(1).permutation(len(rows))
    held = len(rows) // 10
    parts = {"test": order[:held], "validation": order[held : 2 * held], "train": order[2 * held :]}
    empty = done = 0
    for split, numbers in parts.items():
        with job.writer(split) as writer:
            for number in np.sort(numbers):
                file, label = rows[number]
                done += 1
                if done % 1000 == 0 or done == len(rows):
                    job.progress(done, len(rows), folder.name)
                if os.path.isfile(file) and not os.path.getsize(file):
                    empty += 1  # the release itself has one
                    continue
                with job.bad.guard():
                    writer.add(read_picture(lambda file=file: read_picture_file(file), file, size).tobytes(), label)
    return empty


def _find_folder(source: Path, size: int, level: int) -> Path:
    name = _FOLDERS[level]
    candidates = [source, source / name, source / f"pathfinder{size}" / name]
    for folder in candidates[1:] if source.name != name else candidates:
        if (folder / "metadata").is_dir():
            return folder
    raise LeapformerError(f"--from {source}: expected pathfinder{size}/{name} with imgs and metadata, found none")


def _metadata(job: Job, folder: Path) -> Iterator[tuple[Path, int]]:
    """File and label of each picture, batch by batch."""
    files = list_files(folder / "metadata", "*.npy")
    files.sort(key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise LeapformerError(f"{folder / 'metadata'}: expected .npy files, found none")
    for path in files:
        for row, columns in enumerate(read_metadata(path), start=1):
            with job.bad.guard():
                yield _parse_row(folder, columns, f"{path}:{row}")


def read_metadata(path: Path) -> list[list[str]]:
    """The rows of a metadata file: plain text with spaces in the release, an array in what its generator writes.

    Raises:
        LeapformerError: it is neither.
    """
    try:
        content = read_bytes(path, largest=LARGEST_METADATA)
        if not content.startswith(b"\x93NUMPY"):
            return [line.split() for line in content.decode("utf-8").splitlines() if line.strip()]
        array = _read_array(content)
        if array.ndim != 2:
            raise ValueError(f"an array of shape {list(array.shape)}")
    except Exception as error:  # numpy's reader lets through what Python's parser meets in a header
        reason = cut(str(error).removeprefix(f"{path}: "), 100) or type(error).__name__
        raise LeapformerError(f"{path}: expected rows of text or an array of text, found {reason}") from None
    return [[value.decode() if isinstance(value, bytes) else str(value) for value in row] for row in array.tolist()]


def _read_array(content: bytes) -> np.ndarray:
    """An array of text from the bytes of a .npy file; numpy makes what a header promises before it looks for it."""
    file = io.BytesIO(content)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read_header:
        raise ValueError(f"the version {version} of the format")
    shape, fortran, dtype = read_header[version](file)
    if dtype.hasobject:
        raise ValueError("Object arrays, which could run code")
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind not in "US" or size != len(content) - file.tell():
        raise ValueError(f"{dtype} {list(shape)} in {len(content) - file.tell():,} bytes")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def _parse_row(folder: Path, columns: list[str], where: str) -> tuple[Path, int]:
    """[0] folder [1] file [2] index [3] label [4] continuity [5] contour length ..."""
    if len(columns) <= _LABEL_COLUMN:
        raise LeapformerError(f"{where}: expected folder, file, index and label, found {len(columns)} columns")
    if columns[_LABEL_COLUMN] not in ("0", "1"):
        raise LeapformerError(f"{where}: expected the label 0 or 1, found {columns[_LABEL_COLUMN][:40]!r}")
    file = folder / columns[0] / columns[1]
    if ".." in file.parts or folder not in file.parents or "\0" in str(file):
        raise LeapformerError(f"{where}: expected a file inside {folder.name}, found {columns[0][:40]!r}")
    return file, int(columns[_LABEL_COLUMN])
