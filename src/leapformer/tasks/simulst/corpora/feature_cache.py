"""The features of all utterances of a split, computed once and kept on disk beside the runs that share them.

They are computed in shards, by several processes where there are many; shards that are there are kept over an
interrupt.

A file holds float16 [frames of all utterances, M]: half the size, and an error of at most 2^-11 of a log-mel value
(0.01), a hundredth of what the least noise changes. Training reads it through a memory map, in random order. Beside it
lies its checksum; it is looked at when the file is opened, and features that are damaged are computed again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leapformer.errors import LeapformerError
from leapformer.files.checksums import is_sound, write_sum
from leapformer.files.writing import make_folder, staged_file
from leapformer.tasks.preparation import Progress, make_shards, processors
from leapformer.tasks.simulst.audio.features import MEL_BINS, FeatureStatistics, frame_count, offline
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE
from leapformer.tasks.simulst.corpora.prepared import SpokenSplit
from leapformer.training.task import ProgressOf, untold

_LOG = logging.getLogger(__name__)
_FLOAT16 = np.dtype("<f2")
_LONGEST_HEADER = 1 << 12
_INT16 = np.float32(1 / 32768)
_BLOCK = 1 << 16  # frames of one step of the statistics
_SHARD = 500  # utterances: a few seconds of work
_MANY = 2_000  # utterances: for fewer another process starts in vain


class CachedFeatures(Sequence[Tensor]):
    """Features of the utterances of a split: item i is float32 [F, M], not normalised.

    Arguments:
        split: the audio.
        key: names the content of the split; what was computed under another key is not taken.
        cache: the folder to keep the file in.
        progress: wraps the numbers of the shards while features are computed.
    """

    def __init__(self, split: SpokenSplit, *, key: str, cache: Path, progress: ProgressOf = untold) -> None:
        counts = [frame_count(row["samples"]) for row in split.rows]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        digest = hashlib.sha256(f"{key}|{MEL_BINS}|{SAMPLE_RATE}|{int(self.starts[-1])}".encode()).hexdigest()[:16]
        self.path = cache / f"features-{digest}.npy"
        if not is_sound(self.path):
            if self.path.is_file():
                _LOG.warning("%s is damaged, or was cut off: its features are computed again", self.path)
            self._compute(split, progress)
        self._frames = self._open()

    def _open(self) -> np.ndarray:
        """float16 [frames, M], a read-only memory map."""
        shape = (int(self.starts[-1]), MEL_BINS)
        size = self.path.stat().st_size - math.prod(shape) * _FLOAT16.itemsize
        if not 0 < size <= _LONGEST_HEADER:
            raise LeapformerError(f"{self.path}: expected features of the shape {list(shape)}, found another size")
        if not shape[0]:
            return np.zeros(shape, _FLOAT16)
        return np.memmap(self.path, dtype=_FLOAT16, mode="r", offset=size, shape=shape)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        start, end = self.starts[number], self.starts[number + 1]
        return torch.from_numpy(self._frames[start:end].astype(np.float32))

    def statistics(self) -> FeatureStatistics:
        """Mean and variance of every bin over all frames."""
        found = FeatureStatistics.empty()
        for start in range(0, len(self._frames), _BLOCK):
            found = found.merge(
                FeatureStatistics.of(torch.from_numpy(self._frames[start : start + _BLOCK].astype("f8")))
            )
        return FeatureStatistics(found.count, len(self), found.mean, found.variance)

    def _compute(self, split: SpokenSplit, progress: ProgressOf) -> None:
        """Make the shards that are missing, and the file of them."""
        parts = self.path.with_suffix(".parts")
        try:
            make_folder(parts)
            self._put_together(self._make_shards(parts, split, progress))
        except (OSError, LeapformerError):
            if not is_sound(self.path):  # else another run was done with it first, and took the shards away
                raise
        shutil.rmtree(parts, ignore_errors=True)

    def _make_shards(self, parts: Path, split: SpokenSplit, progress: ProgressOf) -> dict[Path, tuple[int, int]]:
        """Each shard, and the first utterance of it and of the next."""
        bounds = [(first, min(first + _SHARD, len(self))) for first in range(0, len(self), _SHARD)]
        shards = {parts / f"{first:08d}-{end:08d}.float16": (first, end) for first, end in bounds}
        make_shards(
            compute_shard,
            list(shards),
            [(split.folder, split.name, first, end) for first, end in bounds],
            workers=processors() if len(self) >= _MANY else 1,
            progress=_stepping(progress),
            is_whole=lambda path: _is_whole(path, self.starts),
        )
        return shards

    def _put_together(self, shards: dict[Path, tuple[int, int]]) -> None:
        """Write the file, a header of numpy's and the shards one after another, and its checksum."""
        header = {"descr": _FLOAT16.str, "fortran_order": False, "shape": (int(self.starts[-1]), MEL_BINS)}
        with staged_file(self.path, shared=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for shard in shards:
                if not _is_whole(shard, self.starts):
                    raise LeapformerError(f"{shard}: expected the features of its utterances, found another size")
                with shard.open("rb") as part:
                    shutil.copyfileobj(part, file)
        write_sum(self.path, shared=True)


def _is_whole(shard: Path, starts: np.ndarray) -> bool:
    """Whether a shard is there, with as many bytes as the frames of its utterances have."""
    first, end = map(int, shard.stem.split("-"))
    try:
        return shard.stat().st_size == int(starts[end] - starts[first]) * MEL_BINS * _FLOAT16.itemsize
    except OSError:
        return False


def compute_shard(path: Path, folder: Path, split: str, first: int, end: int) -> None:
    """Write the features of some utterances of a split, float16."""
    spoken = SpokenSplit(folder, split)
    with staged_file(path, shared=True) as file:
        for number in range(first, end):
            samples = spoken[number]["audio"].astype(np.float32) * _INT16
            file.write(offline(samples).numpy().astype(_FLOAT16).tobytes())


def _stepping(progress: ProgressOf) -> Progress:
    """A progress that is told how many are done, and steps through the numbers that the given one wraps."""
    steps: Any = None
    taken = 0

    def told(done: int, total: int | None, what: str) -> None:
        nonlocal steps, taken
        if steps is None:
            steps = iter(progress(range(total or 0), "features"))
        for _ in range(done + 1 - taken):  # a number is taken when its shard is begun, and none after the last
            next(steps, None)
        taken = done + 1

    return told
