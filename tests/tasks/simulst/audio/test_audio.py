"""Reading audio: every format, rate and channel count as mono at 16 kHz, exact cuts, one line for what is bad."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.tasks.simulst.audio.reading import (
    AudioInfo,
    StreamingResampler,
    audio_info,
    check_samples,
    read_audio,
    read_blocks,
    resample,
)

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

SUBTYPES = {
    "pcm16.wav": "PCM_16",
    "float.wav": "FLOAT",
    "a.flac": "PCM_16",
    "a.ogg": "VORBIS",
    "opus.ogg": "OPUS",
    "a.mp3": "MPEG_LAYER_III",
}


def voice(samples: int, rate: int = 16_000, *, channels: int = 1) -> np.ndarray:
    """Tones and some noise, float32 [N, channels], channels different."""
    time = np.arange(samples)[:, None] / rate
    tones = 0.3 * np.sin(2 * np.pi * time * (220 + 110 * np.arange(channels)))
    return (tones + 0.02 * np.random.default_rng(0).standard_normal(tones.shape)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = 16_000, subtype: str | None = None) -> Path:
    soundfile.write(path, samples, rate, subtype=subtype or SUBTYPES.get(path.name))
    return path


def fails(match: str, *arguments, **keywords) -> None:
    """`read_audio` must say so in one line that begins with the place."""
    with pytest.raises(LeapformerError, match=match) as caught:
        read_audio(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(keywords.get("name", arguments[0])))


def test_samples_of_lossless_files_are_exact(tmp_path):
    x = voice(5000)
    assert np.array_equal(read_audio(write(tmp_path / "float.wav", x)), x[:, 0])
    steps = np.round(x[:, 0].astype(np.float64) * 32768).clip(-32768, 32767)
    for name in ("pcm16.wav", "a.flac"):
        read = read_audio(write(tmp_path / name, (steps / 32768).astype(np.float32)))
        assert read.dtype == np.float32 and np.array_equal(read * 32768, steps)
    eight = read_audio(write(tmp_path / "8bit.wav", x, subtype="PCM_U8"))
    assert np.abs(eight - x[:, 0]).max() <= 1 / 128


@pytest.mark.parametrize("name", ["a.ogg", "opus.ogg", "a.mp3"])
def test_samples_of_lossy_files_are_near(tmp_path, name):
    x = voice(16_000)
    read = read_audio(write(tmp_path / name, x))
    assert len(read) == len(x)
    assert np.corrcoef(read, x[:, 0])[0, 1] > 0.99


def test_channels_are_averaged(tmp_path):
    x = voice(3000, channels=3)
    read = read_audio(write(tmp_path / "float.wav", x))
    np.testing.assert_allclose(read, x.astype(np.float64).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_become_16_khz(tmp_path, rate):
    """A tone stays the same tone, and what 16 kHz cannot hold goes away."""
    time = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time)
    too_high = 0.4 * np.sin(2 * np.pi * 10_000 * time) if rate > 20_000 else 0
    path = write(tmp_path / "float.wav", (tone + too_high).astype(np.float32), rate)
    assert audio_info(path) == AudioInfo(rate, 1, rate) and audio_info(path).seconds == 1.0
    read = read_audio(path)
    assert len(read) == 16_000
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert np.abs(read - expected)[1000:-1000].max() < 1e-3
    assert len(read_audio(path, sample_rate=rate)) == rate


@pytest.mark.parametrize("name", SUBTYPES)
def test_a_cut_is_a_slice(tmp_path, name):
    path = write(tmp_path / name, voice(80_000, channels=2))
    whole = read_audio(path)
    for offset, duration in ((0.0, 0.5), (0.31234, 1.0), (1.5, None), (2.0, 0.5), (4.5, 0.5), (0.5, 0.0001)):
        start = round(offset * 16_000)
        end = len(whole) if duration is None else round((offset + duration) * 16_000)
        cut = read_audio(path, offset=offset, duration=duration)
        assert len(cut) == end - start
        assert np.array_equal(cut, whole[start:end])


def test_blocks_are_the_whole(tmp_path):
    path = write(tmp_path / "float.wav", voice(200_000, 44_100, channels=2), 44_100)
    blocks = list(read_blocks(path))
    assert len(blocks) > 3
    assert np.array_equal(np.concatenate(blocks), read_audio(path))


def test_a_rounded_cut_may_end_a_little_beyond_the_file(tmp_path):
    path = write(tmp_path / "float.wav", voice(16_000))
    assert len(read_audio(path, offset=0.5, duration=0.51)) == 8_000
    fails(r"offset 0\.5 s \+ duration 0\.52 s: expected a cut within 1\.000 s of audio, found one up to 1\.020 s", path,
          offset=0.5, duration=0.52)  # fmt: skip


@pytest.mark.parametrize(("offset", "duration", "match"), [
    (1.0, None, r"offset 1 s: expected a cut within 1\.000 s of audio, found one up to 1\.000 s"),
    (7.0, 1.0, r"offset 7 s \+ duration 1 s: expected a cut within 1\.000 s of audio, found one up to 8\.000 s"),
    (-0.1, None, r"offset: expected seconds from 0 on, found -0\.1"),
    (float("nan"), None, "offset: expected seconds from 0 on, found nan"),
    (0.0, 0.0, r"duration: expected seconds above 0, found 0\.0"),
    (0.0, float("inf"), "duration: expected seconds above 0, found inf"),
    (0.0, 1e-6, r"duration 1e-06 s: expected at least one sample, found none"),
])  # fmt: skip
def test_cuts_that_cannot_be(tmp_path, offset, duration, match):
    fails(match, write(tmp_path / "float.wav", voice(16_000)), offset=offset, duration=duration)


def test_open_files_and_members_of_archives(tmp_path):
    path = write(tmp_path / "a.flac", voice(4000))
    whole = read_audio(path)
    assert np.array_equal(read_audio(io.BytesIO(path.read_bytes())), whole)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "a.flac")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("a.flac") as member:
        assert np.array_equal(read_audio(member, offset=0.1), whole[1600:])
    fails("rows.tsv:7: expected audio", io.BytesIO(b"no audio" * 9), name="rows.tsv:7")


def test_very_short_files(tmp_path):
    assert read_audio(write(tmp_path / "float.wav", np.float32([[0.25]]))).tolist() == [0.25]
    assert len(read_audio(write(tmp_path / "float.wav", np.float32([0.25, 0.5, 0.25]), 48_000))) <= 1
    fails("expected audio, found no samples", write(tmp_path / "float.wav", np.zeros(0, np.float32)))


def test_silence_stays_silence(tmp_path):
    read = read_audio(write(tmp_path / "pcm16.wav", np.zeros(44_100, np.float32), 44_100))
    assert len(read) == 16_000 and not read.any()


def test_missing_empty_and_other_files(tmp_path):
    fails("expected an audio file, found No such file or directory", tmp_path / "none.wav")
    fails("expected an audio file, found Is a directory", tmp_path)
    (tmp_path / "empty.wav").write_bytes(b"")
    fails("expected an audio file, found an empty one", tmp_path / "empty.wav")
    (tmp_path / "text.mp3").write_text("these are words, and no audio\n" * 20)
    fails(r"expected audio \(wav, flac, ogg, mp3\), found", tmp_path / "text.mp3")
    (tmp_path / "head.wav").write_bytes(b"RIFF\0\0\0\0WAVE")
    fails("expected a chunk of samples, found the end of the file: it is cut off", tmp_path / "head.wav")
    fails("expected 1,000 to 768,000 samples a second, found 999", write(tmp_path / "slow.wav", voice(500), 999))


@pytest.mark.parametrize(("name", "match"), [
    ("pcm16.wav", r"expected 80,000 bytes of samples, found 39,9\d\d: the file is cut off"),
    ("float.wav", r"expected 160,000 bytes of samples, found 79,9\d\d: the file is cut off"),
    ("a.flac", "expected .* found an error of the decoder"),
    ("a.ogg", "expected a last ogg page that ends the stream, found none: the file is cut off"),
    ("a.mp3", r"expected 40,000 samples, found \d+,\d+: the file is cut off"),
])  # fmt: skip
def test_files_that_are_cut_off(tmp_path, name, match):
    path = write(tmp_path / name, voice(40_000))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails(match, path)


@pytest.mark.parametrize("name", ["a.ogg", "opus.ogg"])
@pytest.mark.parametrize("missing", [1, 200, 500])
def test_ogg_files_that_are_cut_off_within_their_last_page(tmp_path, name, missing):
    path = write(tmp_path / name, voice(16_000))
    path.write_bytes(path.read_bytes()[:-missing])
    fails("expected a last ogg page that ends the stream, found none: the file is cut off", path)


def test_a_wav_file_from_a_pipe_does_not_know_its_size(tmp_path):
    path = write(tmp_path / "pcm16.wav", voice(3000))
    whole, content = read_audio(path), bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert np.array_equal(read_audio(path), whole)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers(tmp_path, bad):
    x = voice(100_000, channels=2)
    x[80_000, 1] = bad
    path = write(tmp_path / "float.wav", x)
    fails(rf"sample 80,000 \(5\.000 s\): expected a finite number, found {bad}", path)
    assert len(read_audio(path, duration=4.0)) == 64_000


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("largest", [1, 50, 5_000])
def test_a_resampled_stream_is_the_whole(rate, largest):
    x = voice(6_000, rate)[:, 0]
    stream, random, pieces, at = StreamingResampler(rate), np.random.default_rng(1), [], 0
    while at < len(x):
        size = int(random.integers(1, largest + 1))
        pieces.append(stream.push(x[at : at + size]))
        at += size
    pieces.append(stream.finish())
    joined = np.concatenate(pieces)
    assert joined.dtype == np.float32 and np.array_equal(joined, resample(x, rate))
    assert abs(len(joined) - len(x) * 16_000 / rate) <= 1


def test_a_finished_resampler_takes_no_more():
    for rate in (16_000, 8_000):
        stream = StreamingResampler(rate)
        stream.finish()
        for call in (lambda stream=stream: stream.push(np.zeros(3)), stream.finish):
            with pytest.raises(ValueError, match="resampler: expected no call after finish"):
                call()
    with pytest.raises(ValueError, match="sample rates: expected positive ones, got 0 and 16000"):
        StreamingResampler(0)


@pytest.mark.parametrize(("samples", "match"), [
    (np.zeros((4, 2), np.float32), r"expected floating \[N\] within \[-1, 1\], got float32 \[4, 2\]"),
    (np.zeros(4, np.int16), r"expected floating \[N\] within \[-1, 1\], got int16 \[4\]"),
    ([0.0, 0.5, float("nan")], "expected finite ones, got nan at index 2"),
    ([float("-inf")], "expected finite ones, got -inf at index 0"),
])  # fmt: skip
def test_samples_of_a_stream_are_checked(samples, match):
    with pytest.raises(ValueError, match=match):
        check_samples(samples)


def test_samples_may_be_of_any_floating_dtype():
    for dtype in (np.float16, np.float32, np.float64):
        assert check_samples(np.array([0.5, -0.25], dtype)).dtype == np.float32


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "float.wav", voice(100))
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(MissingExtra, match=r"'soxr'.*leapformer\[speech\]"):
        StreamingResampler(8_000)
    assert len(read_audio(path)) == 100  # at 16 kHz it is not needed
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtra, match=r"'soundfile'.*leapformer\[speech\]"):
        read_audio(path)


@pytest.mark.skipif("LEAPFORMER_DATA" not in os.environ, reason="LEAPFORMER_DATA is not set")
def test_real_recordings():
    folder = Path(os.environ["LEAPFORMER_DATA"]) / "tuxpaint_speech"
    rows = [row.split("\t") for row in (folder / "manifest.tsv").read_text(encoding="utf-8").splitlines()]
    seconds = {row[1]: float(row[3]) for row in rows if row[0] == "en"}
    with tarfile.open(folder / "en.tar.xz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        assert len(members) == len(seconds)
        for member in members:
            content = archive.extractfile(member)
            assert content is not None
            read = read_audio(io.BytesIO(content.read()), name=member.name)
            assert abs(len(read) / 16_000 - seconds[member.name.removeprefix("./")]) < 0.001
            assert 0.001 < np.abs(read).max() <= 1.5
