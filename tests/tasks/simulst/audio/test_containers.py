"""Audio in every kind of file that libsndfile writes: whole, or in one line; never a shorter one."""

from __future__ import annotations

import io

import numpy as np
import pytest

from leapformer.errors import LeapformerError

sf = pytest.importorskip("soundfile")

from leapformer.tasks.simulst.audio.containers import READABLE  # noqa: E402
from leapformer.tasks.simulst.audio.reading import LOUDEST, audio_info, check_samples, read_audio  # noqa: E402

RATE = 16_000
SOUND = (0.3 * np.sin(np.arange(8_000) / 10)).astype(np.float32)
# Without RAW, which is no container, and SD2, whose length lies in another file.
KINDS = [
    (kind, codec)
    for kind in sf.available_formats()
    if kind not in ("RAW", "SD2", "MP3")
    for codec in sf.available_subtypes(kind)
]
NO_SEEK = (
    "GSM610",
    "G721_32",
    "G723_24",
    "G723_40",
    "NMS_ADPCM_16",
    "NMS_ADPCM_24",
    "NMS_ADPCM_32",
    "DWVW_16",
    "DWVW_24",
)


def written(kind: str, codec: str, samples: np.ndarray = SOUND) -> bytes:
    file = io.BytesIO()
    try:
        sf.write(file, samples, RATE, format=kind, subtype=codec)
    except sf.LibsndfileError:
        pytest.skip(f"libsndfile does not write {kind} {codec}")
    return file.getvalue()


def read(content: bytes, **cut) -> np.ndarray:
    return read_audio(io.BytesIO(content), name="a file", **cut)


@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_whole_and_cut_off(kind, codec):
    content = written(kind, codec)
    if kind not in READABLE:
        with pytest.raises(LeapformerError, match="a file: expected audio whose file tells its length"):
            read(content)
        return
    whole = read(content)
    assert abs(len(whole) - len(SOUND)) < 350  # codecs of blocks fill up the last one; VOC rounds the rate
    assert np.array_equal(read(content, offset=0.1, duration=0.2), whole[1_600:4_800]) or kind == "VOC"
    for size in (0, 10, 60, len(content) // 2, len(content) * 9 // 10, len(content) - 40):
        with pytest.raises(LeapformerError, match="^a file: .*") as caught:
            read(content[:size])
        assert "\n" not in str(caught.value)
    for missing in range(1, 12):  # a last block or a chunk of names may be missing, samples may not
        try:
            found = read(content[:-missing])
        except LeapformerError:
            continue
        assert np.array_equal(found, whole)


@pytest.mark.parametrize("codec", NO_SEEK)
def test_codecs_that_cannot_seek_are_decoded_from_the_start(codec):
    kind = {"G723_24": "AU", "G723_40": "AU", "DWVW_16": "AIFF", "DWVW_24": "AIFF"}.get(codec, "WAV")
    content = written(kind, codec, np.tile(SOUND, 20))  # more than a block
    whole = read(content)
    assert np.array_equal(read(content, offset=4.5, duration=0.25), whole[72_000:76_000])
    assert np.corrcoef(whole[: len(SOUND)], SOUND)[0, 1] > 0.5


def test_big_endian_wav(tmp_path):
    sf.write(tmp_path / "a.wav", SOUND, RATE, endian="BIG")
    content = (tmp_path / "a.wav").read_bytes()
    assert content.startswith(b"RIFX") and len(read(content)) == len(SOUND)
    with pytest.raises(LeapformerError, match="expected 16,000 bytes of samples, found 1.,...: the file is cut off"):
        read(content[:-1000])


def test_headers_that_promise_too_much():
    wav, flac = bytearray(written("WAV", "PCM_16")), bytearray(written("FLAC", "PCM_16"))
    place = wav.index(b"data") + 4
    wav[place : place + 4] = (0x7FFE_FFFF).to_bytes(4, "little")
    with pytest.raises(LeapformerError, match="expected 2,147,418,111 bytes of samples"):
        read(bytes(wav))
    flac[21:26] = bytes([flac[21] | 0x0F, 255, 255, 255, 255])  # 68,719,476,735 samples
    with pytest.raises(LeapformerError, match="a file: .*"):
        read(bytes(flac))
    flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])
    with pytest.raises(LeapformerError, match="expected a header with the number of samples, found none"):
        read(bytes(flac))


def test_audio_beyond_the_memory(monkeypatch):
    monkeypatch.setattr("leapformer.tasks.simulst.audio.reading.largest_file", lambda: 4 * 7_999)
    with pytest.raises(LeapformerError, match="a file: expected at most 7,999 samples, as the memory allows"):
        read(written("WAV", "PCM_16"))


def test_a_pipe_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.wav")
    for work in (read_audio, audio_info):
        with pytest.raises(LeapformerError, match="expected an audio file, found a pipe"):
            work(tmp_path / "a.wav")


def test_a_cut_beyond_all_numbers():
    content = written("WAV", "PCM_16")
    with pytest.raises(LeapformerError, match="expected a cut within 0.500 s"):
        read(content, offset=1e308)
    with pytest.raises(LeapformerError, match="expected a cut within 0.500 s"):
        read(content, duration=1e308)


def test_samples_whose_energies_would_overflow():
    loud = np.zeros(800, np.float32)
    loud[7] = 1e30
    with pytest.raises(ValueError, match=r"expected magnitudes of at most 1e\+10, got 1.*e\+30 at index 7"):
        check_samples(loud)
    with pytest.raises(ValueError, match="expected finite ones, got inf at index 0"):
        check_samples(np.array([1e300]))
    with pytest.raises(LeapformerError, match=r"sample 7 .*: expected a magnitude of at most 1e\+10, found"):
        read(written("WAV", "FLOAT", loud))
    pytest.importorskip("kaldi_native_fbank")
    from leapformer.tasks.simulst.audio.features import offline

    with pytest.raises(ValueError, match="expected magnitudes of at most"):
        offline(loud)
    assert offline(np.full(800, 4 * LOUDEST, np.float32)).isfinite().all()
    assert offline(4 * LOUDEST * np.where(np.arange(800) % 2, 1, -1).astype(np.float32)).isfinite().all()
