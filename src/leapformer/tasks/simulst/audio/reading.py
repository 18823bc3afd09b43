"""Audio files and streams as mono float32 samples at 16 kHz.

Samples are numpy float32 arrays [N], nominally within [-1, 1]. Files are whatever libsndfile reads: wav, flac, ogg
(Vorbis and Opus), mp3 and others, of any sample rate and number of channels. They are read block by block, so a long
stereo file needs the memory of its mono samples at 16 kHz.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.expanding import largest_file
from leapformer.files.reading import kind_of_file
from leapformer.files.showing import cut
from leapformer.tasks.simulst.audio.containers import READABLE, CutOff, check_whole

SAMPLE_RATE = 16_000
SAMPLE_RATES = (1_000, 768_000)  # what a file may have
# Corpora round their times, to 0.01 s in the coarsest: a cut may end that much beyond its file, and is clipped.
END_TOLERANCE = 0.01

_BLOCK = 1 << 16  # frames of a file that are decoded at a time
_LONGEST = 1e9  # seconds: a later place in a file is no integer any more
_FEW_CHANNELS = 8  # of more, fewer frames at a time
# libsndfile's seek may land elsewhere in Vorbis, and brings the decoders of Opus and mp3 into another state: these are
# decoded from the start, and in the same blocks, whatever the cut.
_NO_EXACT_SEEK = ("OGG", "MP3", "MPEG")
_NO_SEEK = "DWVW"  # its decoder says that it can
# The energies of samples beyond it could overflow float32, in the resampler or in the mel bins.
LOUDEST = 1e10

AudioSource = str | Path | BinaryIO


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself: sample rate in Hz, number of channels, samples of one channel."""

    sample_rate: int
    channels: int
    samples: int

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate


def audio_info(source: AudioSource, *, name: str | None = None) -> AudioInfo:
    """The format and length of a file, without decoding it; arguments and errors as `read_audio`.

    The length of an mp3 file without a Xing or VBRI header is an estimate of the decoder's.
    """
    where = _place(source, name)
    with _opened(source, where) as file:
        return _info(file, where)


def read_audio(
    source: AudioSource,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    name: str | None = None,
) -> np.ndarray:
    """The samples of a file or of a cut of it: the mean of its channels, resampled.

    Arguments:
        source: a path, or an open binary file that can seek (a member of an archive, for instance).
        offset, duration: the cut in seconds, rounded to samples of the file; default: all of it.
        sample_rate: of the result, in Hz.
        name: what errors call the source; default: its path.

    Returns:
        float32 [N]; N may be 0 for a cut of less than one sample at `sample_rate`.

    Raises:
        LeapformerError: the file is missing, empty, cut off or no audio; it has NaN or infinite samples; the cut is not
            within it (by more than 0.01 s).
        MissingExtra: soundfile or soxr is not installed.
    """
    where, most = _place(source, name), largest_file() // 4
    blocks, samples = [np.zeros(0, np.float32)], 0
    for block in read_blocks(source, offset=offset, duration=duration, sample_rate=sample_rate, name=name):
        samples += len(block)
        if samples > most:
            raise LeapformerError(f"{where}: expected at most {most:,} samples, as the memory allows, found more")
        blocks.append(block)
    return np.concatenate(blocks)


def read_blocks(
    source: AudioSource,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    name: str | None = None,
) -> Iterator[np.ndarray]:
    """`read_audio` in pieces of a few seconds, for files that are too long to hold."""
    where = _place(source, name)
    with _opened(source, where) as file:
        info = _info(file, where)
        start, count = _cut(info, offset, duration, where)
        resampler = StreamingResampler(info.sample_rate, sample_rate)
        for block in _mono_blocks(file, start, count, where):
            yield resampler.push(block)
        yield resampler.finish()


def resample(samples: ArrayLike, from_rate: int, to_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Samples [N] at another rate (Hz): float32 [about N to_rate / from_rate]; errors as `StreamingResampler`."""
    resampler = StreamingResampler(from_rate, to_rate)
    return np.concatenate([resampler.push(samples), resampler.finish()])


class StreamingResampler:
    """Changes the sample rate of a stream; the pieces together are exactly the same for pushes of any size.

    At equal rates the samples pass unchanged. The filter is soxr's "HQ".

    Arguments:
        from_rate, to_rate: in Hz.

    Raises:
        ValueError: a rate is not positive.
        MissingExtra: soxr is not installed.
    """

    def __init__(self, from_rate: int, to_rate: int = SAMPLE_RATE) -> None:
        if min(from_rate, to_rate) <= 0:
            raise ValueError(f"sample rates: expected positive ones, got {from_rate} and {to_rate}")
        self.from_rate, self.to_rate = from_rate, to_rate
        self._finished = False
        self._stream = None if from_rate == to_rate else _soxr().ResampleStream(from_rate, to_rate, 1, dtype="float32")

    def push(self, samples: ArrayLike) -> np.ndarray:
        """What `samples` [n] complete: float32 [m], m >= 0.

        Raises:
            ValueError: samples are not as `check_samples` expects, or the stream is finished.
        """
        samples = check_samples(samples)
        self._check_open()
        return samples if self._stream is None else self._stream.resample_chunk(samples)

    def finish(self) -> np.ndarray:
        """The rest: float32 [m]. The stream takes no samples after it."""
        self._check_open()
        self._finished = True
        none = np.zeros(0, np.float32)
        return none if self._stream is None else self._stream.resample_chunk(none, last=True)

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("resampler: expected no call after finish")


def check_samples(samples: ArrayLike, *, loudest: float = LOUDEST) -> np.ndarray:
    """Samples as float32 [N].

    Raises:
        ValueError: they have more dimensions, are not floating (integers have another scale), not finite or beyond
            `loudest`.
    """
    array = np.asarray(samples)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"samples: expected floating [N] within [-1, 1], got {array.dtype} {list(array.shape)}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    bad = _first_bad(array, loudest)
    if bad is not None:
        expected = f"magnitudes of at most {loudest:g}" if np.isfinite(array[bad]) else "finite ones"
        raise ValueError(f"samples: expected {expected}, got {array[bad]} at index {bad}")
    return array


# ---- files


def _place(source: AudioSource, name: str | None) -> str:
    if name is not None:
        return name
    return str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "audio"))


@contextmanager
def _opened(source: AudioSource, where: str) -> Iterator[Any]:
    """The file for soundfile, once it is known to be whole as far as its format tells."""
    soundfile = _soundfile()
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(_open_regular(source)) if isinstance(source, str | Path) else source
            check_whole(raw)
        except OSError as error:
            raise LeapformerError(f"{where}: expected an audio file, found {error.strerror or error}") from None
        except ValueError:  # a zero byte in the name
            raise LeapformerError(f"{where}: expected an audio file, found no name of a file") from None
        except CutOff as error:
            raise LeapformerError(f"{where}: {error}") from None
        try:
            # By its path, where there is one: libsndfile goes by the suffix of some mp3 files.
            file = stack.enter_context(soundfile.SoundFile(source))
        except soundfile.LibsndfileError as error:
            raise LeapformerError(f"{where}: expected audio (wav, flac, ogg, mp3), found {_reason(error)}") from None
        if file.format not in READABLE:
            raise LeapformerError(
                f"{where}: expected audio whose file tells its length (wav, aiff, au, caf, flac, ogg, mp3), "
                f"found {file.format_info}"
            )
        yield file


def _open_regular(path: str | Path) -> BinaryIO:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would wait for ever
        raise OSError(kind_of_file(mode))
    return open(path, "rb")


def _reason(error: Any) -> str:
    """libsndfile's own words, as a part of a line."""
    return "an error of the decoder: " + cut(error.error_string, 200).rstrip(".")


def _info(file: Any, where: str) -> AudioInfo:
    lowest, highest = SAMPLE_RATES
    if not lowest <= file.samplerate <= highest:
        raise LeapformerError(
            f"{where}: expected {lowest:,} to {highest:,} samples a second, found {file.samplerate:,}"
        )
    if file.frames <= 0:
        raise LeapformerError(f"{where}: expected audio, found no samples")
    return AudioInfo(file.samplerate, file.channels, file.frames)


def _cut(info: AudioInfo, offset: float, duration: float | None, where: str) -> tuple[int, int]:
    """First sample and number of samples, in samples of the file."""
    if not (math.isfinite(offset) and offset >= 0):
        raise LeapformerError(f"{where}: offset: expected seconds from 0 on, found {offset}")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise LeapformerError(f"{where}: duration: expected seconds above 0, found {duration}")
    start = round(min(offset, _LONGEST) * info.sample_rate)
    end = info.samples if duration is None else round(min(offset + duration, _LONGEST) * info.sample_rate)
    if start >= info.samples or end > info.samples + END_TOLERANCE * info.sample_rate:
        length = "" if duration is None else f" + duration {duration:g} s"
        raise LeapformerError(
            f"{where}: offset {offset:g} s{length}: expected a cut within {info.seconds:.3f} s of audio, "
            f"found one up to {max(start, end) / info.sample_rate:.3f} s"
        )
    end = min(end, info.samples)
    if start >= end:
        raise LeapformerError(f"{where}: duration {duration:g} s: expected at least one sample, found none")
    return start, end - start


def _mono_blocks(file: Any, start: int, count: int, where: str) -> Iterator[np.ndarray]:
    """The mean of the channels of samples start to start + count, float32, block by block."""
    end, position = start + count, 0
    size = _BLOCK if file.channels <= _FEW_CHANNELS else _BLOCK // 16
    from_start = file.format in _NO_EXACT_SEEK or not file.seekable() or file.subtype.startswith(_NO_SEEK)
    if from_start:
        file.seekable = lambda: False  # otherwise soundfile seeks behind every block, which some codecs can't
    try:
        if start and not from_start:
            position = file.seek(start)
        while position < end:
            block = file.read(size if from_start else min(size, end - position), dtype="float32", always_2d=True)
            if not len(block):
                raise LeapformerError(f"{where}: expected {end:,} samples, found {position:,}: the file is cut off")
            first, position = max(start - position, 0), position + len(block)
            block = block[first : len(block) - max(position - end, 0)]
            mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
            bad = _first_bad(mono)
            if bad is not None:
                sample = min(position, end) - len(block) + bad
                raise LeapformerError(
                    f"{where}: sample {sample:,} ({sample / file.samplerate:.3f} s): {_found(mono[bad])}"
                )
            yield mono
    except _soundfile().LibsndfileError as error:
        raise LeapformerError(f"{where}: expected {end:,} whole samples, found {_reason(error)}") from None


def _first_bad(samples: np.ndarray, loudest: float = LOUDEST) -> int | None:
    """Index of the first sample that is NaN or beyond `loudest`."""
    good = np.abs(samples) <= loudest
    return None if good.all() else int(np.argmin(good))


def _found(sample: np.float32) -> str:
    """What was expected and found of a sample that is bad."""
    expected = f"a magnitude of at most {LOUDEST:g}" if np.isfinite(sample) else "a finite number"
    return f"expected {expected}, found {sample}"


# ---- optional packages


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError:
        raise MissingExtra("speech", package="soundfile", purpose="reading audio") from None
    return soundfile


def _soxr() -> Any:
    try:
        import soxr
    except ImportError:
        raise MissingExtra("speech", package="soxr", purpose="audio of another sample rate than 16 kHz") from None
    return soxr
