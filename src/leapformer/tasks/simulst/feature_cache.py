"""The features of all utterances of a split, computed once and kept on disk beside the runs that share them.

A file holds float16 [frames of all utterances, M]: half the size, and an error of at most 2^-11 of a log-mel value (0.01),
a hundredth of what the least noise changes. Training reads it through a memory map, in random order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leapformer.tasks.simulst.audio import SAMPLE_RATE
from leapformer.tasks.simulst.features import MEL_BINS, FeatureStatistics, frame_count, offline

Progress = Callable[[Iterable[int], str], Iterable[int]]
_INT16 = np.float32(1 / 32768)
_BLOCK = 1 << 16  # frames of one step of the statistics


class CachedFeatures(Sequence[Tensor]):
    """Features of the utterances of a split: item i is float32 [F, M], not normalised.

    Arguments:
        split: rows with "audio", int16 [N] at 16 kHz, and "samples", N; as `SpokenSplit` has them.
        key: names the content of the split; what was computed under another key is not taken.
        cache: the folder to keep the file in.
        progress: wraps the numbers of the utterances while features are computed.
    """

    def __init__(
        self, split: Any, *, key: str, cache: Path, progress: Progress = lambda numbers, what: numbers
    ) -> None:
        counts = [frame_count(row["samples"]) for row in split.rows]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        digest = hashlib.sha256(f"{key}|{MEL_BINS}|{SAMPLE_RATE}|{int(self.starts[-1])}".encode()).hexdigest()[:16]
        self.path = cache / f"features-{digest}.npy"
        if not self.path.is_file():
            self._compute(split, progress)
        self._frames = np.load(self.path, mmap_mode="r", allow_pickle=False)

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

    def _compute(self, split: Any, progress: Progress) -> None:
        """Write the file under another name, and rename it when it is whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".writing-{os.getpid()}-{self.path.name}")
        try:
            shape = (int(self.starts[-1]), MEL_BINS)
            frames = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
            for number in progress(range(len(self)), "features"):
                samples = split[number]["audio"].astype(np.float32) * _INT16
                frames[self.starts[number] : self.starts[number + 1]] = offline(samples).numpy()
            frames.flush()
            del frames
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
