"""Log-mel features of speech, whole or as a stream, and their statistics.

Kaldi's filterbank: 80 mel bins from 20 Hz to 8 kHz, Povey windows of 25 ms every 10 ms, pre-emphasis 0.97, the mean of
each window removed, no dither, samples scaled to the range of 16-bit integers, natural logarithm floored at float32's
epsilon.

240 zero samples stand before the audio, so that frame t is complete with sample 160 (t + 1), and 360 ms of audio give
36 frames and not 34. Zeros complete the last 10 ms: N samples give ceil(N / 160) frames.

Letters: N samples, T frames, M mel bins.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.reading import read_bytes
from leapformer.files.showing import cut
from leapformer.files.writing import write_bytes
from leapformer.tasks.simulst.audio.reading import LOUDEST, SAMPLE_RATE, check_samples

MEL_BINS = 80
WINDOW = 400  # samples: 25 ms
SHIFT = 160  # samples: 10 ms
LEFT_PADDING = WINDOW - SHIFT
INT16_SCALE = 32768.0
# The least standard deviation that features are divided by: a bin that hardly varied in the statistics is not blown up.
SMALLEST_STD = 0.1
BINS = (3, 128)  # that Kaldi's filterbank can have
_RESAMPLED = 4  # times louder than what went into it may be what comes out of the resampler, and more
_LARGEST = 1 << 20  # bytes of a file of statistics


def frame_count(samples: int) -> int:
    """T = ceil(N / 160), the frames of so many samples at 16 kHz."""
    return -(-samples // SHIFT)


def offline(samples: ArrayLike, *, bins: int = MEL_BINS) -> Tensor:
    """The features of whole audio: floating samples [N] within [-1, 1] at 16 kHz to float32 [ceil(N / 160), M].

    Raises:
        ValueError: samples are not floating [N], or not finite.
        MissingExtra: kaldi-native-fbank is not installed.
    """
    stream = FilterbankStream(bins=bins)
    return torch.cat([stream.push(samples), stream.finish()])


class FilterbankStream:
    """The features of audio that is still coming in, in memory that does not grow.

    The frames of all pushes and of `finish` together are exactly those of `offline`, for pushes of any size.

    Arguments:
        bins: M.

    Raises:
        MissingExtra: kaldi-native-fbank is not installed.
    """

    def __init__(self, *, bins: int = MEL_BINS) -> None:
        self.bins = bins
        self._computer = _online_fbank(bins)
        self._done = 0  # frames handed out
        self._finished = False
        # What the next frames need of the past: the computer holds it too, but it cannot be copied.
        self._tail = np.zeros(0, np.float32)
        self._accept(np.zeros(LEFT_PADDING, np.float32))

    def push(self, samples: ArrayLike) -> Tensor:
        """The frames that `samples` [n] complete: float32 [m, M], m >= 0.

        Raises:
            ValueError: samples are not floating [n] or not finite (the stream is as before), or it is finished.
        """
        samples = check_samples(samples, loudest=_RESAMPLED * LOUDEST)
        self._check_open()
        return self._accept(samples * np.float32(INT16_SCALE))

    def finish(self) -> Tensor:
        """The last frame, if the audio does not end on a whole 10 ms: float32 [0 or 1, M]. No push may follow."""
        self._check_open()
        self._finished = True
        begun = len(self._tail) - LEFT_PADDING
        return self._accept(np.zeros(-begun % SHIFT, np.float32))

    def copy(self) -> FilterbankStream:
        """A stream that goes on from here by itself: a snapshot."""
        other = FilterbankStream.__new__(FilterbankStream)
        other.bins, other._finished, other._done = self.bins, self._finished, 0
        other._computer, other._tail = _online_fbank(self.bins), np.zeros(0, np.float32)
        other._accept(self._tail)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of samples kept for the next frames; below 1,600."""
        return self._tail.nbytes

    def _accept(self, scaled: np.ndarray) -> Tensor:
        """Take samples of 16-bit scale, hand out the frames that are complete, and drop them from the computer."""
        self._computer.accept_waveform(SAMPLE_RATE, scaled)
        ready = self._computer.num_frames_ready
        frames = np.empty((ready - self._done, self.bins), np.float32)
        for row, frame in enumerate(range(self._done, ready)):
            frames[row] = self._computer.get_frame(frame)
        self._computer.pop(len(frames))
        self._tail = np.concatenate([self._tail, scaled])[len(frames) * SHIFT :].copy()
        self._done = ready
        return torch.from_numpy(frames)

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("filterbank stream: expected no call after finish")


def _online_fbank(bins: int) -> Any:
    try:
        import kaldi_native_fbank
    except ImportError:
        raise MissingExtra("speech", package="kaldi-native-fbank", purpose="the features of speech") from None
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = bins
    return kaldi_native_fbank.OnlineFbank(options)


# ---- statistics


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and variance of every bin over the frames of many utterances.

    Arguments:
        count: frames. utterances: how many they came from.
        mean, variance: float64 [M]; the variance is that of the frames themselves (divided by count).
    """

    count: int
    utterances: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def empty(cls, bins: int = MEL_BINS) -> FeatureStatistics:
        """Of no frames, to merge others into."""
        zeros = torch.zeros(bins, dtype=torch.float64)
        return cls(0, 0, zeros, zeros.clone())

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Of one utterance, floating [T, M].

        Raises:
            ValueError: another shape.
        """
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"features: expected floating [T, M], got {features.dtype} {list(features.shape)}")
        x = features.detach().to("cpu", torch.float64)
        if not len(x):
            return cls(0, 1, *(torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2)))
        return cls(len(x), 1, x.mean(0), x.var(0, correction=0))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Of the frames of both, without the cancellation of sums of squares (Chan, Golub and LeVeque 1979).

        Raises:
            ValueError: they have different numbers of bins.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"statistics: expected {len(self.mean)} bins, got {len(other.mean)}")
        count = self.count + other.count
        share = other.count / count if count else 0.0
        apart = other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * apart**2
        return FeatureStatistics(count, self.utterances + other.utterances, self.mean + share * apart, variance)

    def normalize(self, features: Tensor) -> Tensor:
        """(features - mean) / max(standard deviation, 0.1), [..., M], of the features' dtype and on their device.

        Frame by frame, so that it is the same in a stream.

        Raises:
            ValueError: the statistics are of no frames, or the number of bins differs.
        """
        if not self.count:
            raise ValueError("statistics: expected at least one frame, got none")
        if features.shape[-1:] != self.mean.shape:
            raise ValueError(f"features: expected [..., {len(self.mean)}], got {list(features.shape)}")
        std = self.variance.sqrt().clamp(min=SMALLEST_STD)
        return (features - self.mean.to(features)) / std.to(features)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: int64 [1] `count` and `utterances`, float64 [M] `mean` and `variance`."""
        from safetensors.torch import save

        counts = {name: torch.tensor([getattr(self, name)]) for name in ("count", "utterances")}
        content = save({**counts, "mean": self.mean.contiguous(), "variance": self.variance.contiguous()})
        write_bytes(path, content, shared=True)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            LeapformerError: the file is missing, cut off, of another layout, or its values make no sense.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            os.stat(path)
            tensors = load(read_bytes(path, largest=_LARGEST))
        except OSError as error:
            raise LeapformerError(f"{path}: expected feature statistics, found {error.strerror or error}") from None
        except SafetensorError as error:
            raise LeapformerError(
                f"{path}: expected feature statistics (safetensors), found {cut(error, 160)}"
            ) from None
        found = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
        whole, real = (torch.int64, 1), (torch.float64, 1)
        if found != {"count": whole, "utterances": whole, "mean": real, "variance": real}:
            names = cut(", ".join(sorted(found))) or "nothing"
            raise LeapformerError(
                f"{path}: expected count, utterances, mean and variance, found {names} of other types"
            )
        mean, variance = tensors["mean"], tensors["variance"]
        if mean.shape != variance.shape or len(tensors["count"]) != 1 or len(tensors["utterances"]) != 1:
            raise LeapformerError(f"{path}: expected one count and as many means as variances, found other sizes")
        if not (mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()):
            raise LeapformerError(f"{path}: expected finite means and variances from 0 on, found others")
        count, utterances = int(tensors["count"]), int(tensors["utterances"])
        if count < 0 or utterances < 0:
            raise LeapformerError(f"{path}: expected counts from 0 on, found {count:,} and {utterances:,}")
        if not BINS[0] <= len(mean) <= BINS[1]:
            raise LeapformerError(f"{path}: expected {BINS[0]} to {BINS[1]} bins, found {len(mean):,}")
        return cls(count, utterances, mean, variance)
