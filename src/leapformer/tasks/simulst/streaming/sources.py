"""The source of one stream, cut into the chunks that the encoder takes: audio becomes frames, text becomes tokens.

A chunk is what the encoder's states come in: r states, so 4 r frames of speech (r = 9: 360 ms), or r tokens of text.
However the source arrives, the chunks are the same, and so is all that is computed from them.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from leapformer.nn.subsampling import STRIDE, subsampled_length
from leapformer.tasks.simulst.audio.features import SHIFT, FilterbankStream
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE, StreamingResampler, check_samples
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.text.vocabulary import END

FRAMES_OF_A_STATE = STRIDE**2
STATE_MS = 1000 * FRAMES_OF_A_STATE * SHIFT / SAMPLE_RATE  # 40


class Chunk(NamedTuple):
    """`inputs` float [4 r, M] or int64 [r] for the encoder (the last of a source may have less), and how much of the
    source was read with it, in ms or words."""

    inputs: Tensor
    read: float


class SpeechSource:
    """Audio of one stream.

    Arguments:
        processor: whose statistics normalise the features.
        pre_decision: r.
        sample_rate: of the samples, in Hz.

    Attributes:
        ready: chunks that were not taken yet. read: ms of audio so far. finished: whether it has ended.
        cut_short: whether the last chunk has less than r states, as only the end of a source leaves it.
    """

    def __init__(self, processor: TranslationProcessor, pre_decision: int, *, sample_rate: int = SAMPLE_RATE) -> None:
        assert processor.statistics is not None
        self.ready: deque[Chunk] = deque()
        self.finished = self.cut_short = False
        self._processor = processor
        self._frames_of_a_chunk = FRAMES_OF_A_STATE * pre_decision
        self._resampler = StreamingResampler(sample_rate)
        self._filterbank = FilterbankStream(bins=len(processor.statistics.mean))
        self._frames = torch.zeros(0, self._filterbank.bins)
        self._samples = self._states = 0

    @property
    def read(self) -> float:
        return 1000 * self._samples / self._resampler.from_rate

    def push(self, samples: ArrayLike) -> None:
        """Samples float [n]. Raises ValueError, with everything as before, where they are none."""
        samples = check_samples(samples)
        self._samples += len(samples)
        self._take(self._filterbank.push(self._resampler.push(samples)))

    def skip(self, samples: ArrayLike) -> None:
        """Samples that nobody will look at: only the time passes."""
        self._samples += len(check_samples(samples))

    def finish(self) -> None:
        """The audio has ended; the rest becomes the last chunk."""
        self._take(self._filterbank.push(self._resampler.finish()))
        self._take(self._filterbank.finish())
        self.finished, self.cut_short = True, len(self._frames) > 0
        if self.cut_short:
            self._add(self._frames)
        self._frames = self._frames[:0]

    def forget(self) -> None:
        """Drop what nobody will look at."""
        self.ready.clear()
        self._frames = self._frames[:0].clone()

    @property
    def states(self) -> int:
        """States that the source so far gives, those of an incomplete chunk included."""
        return self._states + subsampled_length(len(self._frames))

    @property
    def nbytes(self) -> int:
        """Bytes of samples and frames that wait to be complete, and of chunks that wait to be taken."""
        return self._filterbank.nbytes + _nbytes(self._frames, *(chunk.inputs for chunk in self.ready))

    def copy(self) -> SpeechSource:
        """A source that goes on from here by itself.

        Raises ValueError for other sample rates than 16 kHz: soxr's resampler cannot be copied.
        """
        if self._resampler.from_rate != SAMPLE_RATE:
            raise ValueError(
                f"snapshot: expected audio at {SAMPLE_RATE:,} Hz (a resampler cannot be copied), "
                f"found {self._resampler.from_rate:,} Hz"
            )
        other = copy.copy(self)
        other.ready = deque(self.ready)
        other._filterbank = self._filterbank.copy()
        other._resampler = copy.copy(self._resampler)  # without a stream at equal rates
        return other

    def _take(self, frames: Tensor) -> None:
        size = self._frames_of_a_chunk
        self._frames = torch.cat([self._frames, frames])
        while len(self._frames) >= size:
            self._add(self._frames[:size].clone())
            self._frames = self._frames[size:]
        self._frames = self._frames.clone()  # a view would keep all frames alive

    def _add(self, frames: Tensor) -> None:
        self._states += subsampled_length(len(frames))
        self.ready.append(Chunk(self._processor.normalize(frames), min(self._states * STATE_MS, self.read)))


class TextSource:
    """Text of one stream; attributes as `SpeechSource`, with words in the place of ms."""

    def __init__(self, processor: TranslationProcessor, pre_decision: int) -> None:
        self.ready: deque[Chunk] = deque()
        self.finished = self.cut_short = False
        self._processor = processor
        self._size = pre_decision
        self._tokens: list[tuple[int, int]] = []  # each with the number of the word that it lies in, from 1
        self._words = self._states = 0

    @property
    def read(self) -> float:
        return self._words

    def push(self, text: str) -> None:
        """Whole words."""
        for word in self._words_of(text):
            self._words += 1
            self._take([(token, self._words) for token in self._processor.source_ids(word, end=False)])

    def skip(self, text: str) -> None:
        self._words += len(self._words_of(text))

    def finish(self) -> None:
        if self._words:
            self._take([(END, self._words)])
        self.finished, self.cut_short = True, len(self._tokens) > 0
        if self.cut_short:
            self._add(self._tokens)
        self._tokens = []

    def forget(self) -> None:
        self.ready.clear()
        self._tokens = []

    @property
    def states(self) -> int:
        return self._states + len(self._tokens)

    @property
    def nbytes(self) -> int:
        return _nbytes(*(chunk.inputs for chunk in self.ready))

    def copy(self) -> TextSource:
        other = copy.copy(self)
        other.ready, other._tokens = deque(self.ready), list(self._tokens)
        return other

    def _words_of(self, text: str) -> list[str]:
        if not isinstance(text, str):
            raise ValueError(f"text: expected words as str, found {type(text).__name__}")
        return text.split()

    def _take(self, tokens: list[tuple[int, int]]) -> None:
        self._tokens = self._tokens + tokens
        while len(self._tokens) >= self._size:
            self._add(self._tokens[: self._size])
            self._tokens = self._tokens[self._size :]

    def _add(self, tokens: list[tuple[int, int]]) -> None:
        self._states += len(tokens)
        self.ready.append(Chunk(torch.tensor([token for token, _ in tokens]), tokens[-1][1]))


Source = SpeechSource | TextSource


def _nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
