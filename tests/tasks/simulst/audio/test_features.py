"""Log-mel features: Kaldi's formula in float64, streams equal to the whole, statistics."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.tasks.simulst.audio.features import (
    FeatureStatistics,
    FilterbankStream,
    frame_count,
    offline,
)

pytest.importorskip("kaldi_native_fbank")

LOG_EPSILON = float(np.log(np.float32(1.1920929e-07)))


def voice(samples: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.1 * noise + 0.2 * np.sin(np.arange(samples) * 0.1) + 0.05).astype(np.float32)


def kaldi_fbank(samples: np.ndarray, bins: int = 80) -> np.ndarray:
    """Kaldi's feature-window.cc and mel-computations.cc written out in float64, for audio padded as ours is."""
    x = np.concatenate([np.zeros(240), samples.astype(np.float64) * 32768, np.zeros(-len(samples) % 160)])
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    mel = lambda hertz: 1127 * np.log(1 + np.asarray(hertz) / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), bins + 2)
    at = mel(np.arange(256) * 16_000 / 512)
    left, center, right = (edges[i : i + bins, None] for i in range(3))
    weights = np.maximum(0, np.minimum((at - left) / (center - left), (right - at) / (right - center)))
    rows = []
    for start in range(0, len(x) - 399, 160):
        frame = x[start : start + 400] - x[start : start + 400].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)[:256]) ** 2
        rows.append(np.log(np.maximum(weights @ power, 1.1920929e-07)))
    return np.array(rows).reshape(-1, bins)


def stream(samples: np.ndarray, largest: int, seed: int = 0) -> torch.Tensor:
    """The features of pushes of random sizes from 1 to `largest`."""
    bank, random, pieces, at = FilterbankStream(), np.random.default_rng(seed), [], 0
    while at < len(samples):
        size = int(random.integers(1, largest + 1))
        pieces.append(bank.push(samples[at : at + size]))
        at += size
    return torch.cat([*pieces, bank.finish()])


@pytest.mark.parametrize("bins", [80, 40])
def test_equals_kaldis_formula(bins):
    x = voice(16_000)
    features = offline(x, bins=bins)
    assert features.dtype == torch.float32 and features.shape == (100, bins)
    expected = kaldi_fbank(x, bins)
    if bins == 80:  # bins narrower than the spectrum's 31.25 Hz may hold nothing
        assert (expected > LOG_EPSILON + 1).all()
    np.testing.assert_allclose(features.numpy(), expected, atol=2e-3)
    assert np.abs(features.numpy() - expected).mean() < 1e-5


def test_silence_is_the_floor():
    features = offline(np.zeros(1600, np.float32))
    assert features.shape == (10, 80)
    assert torch.allclose(features, torch.full_like(features, LOG_EPSILON))


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_every_360_ms_give_36_frames_at_once(chunks):
    bank, x = FilterbankStream(), voice(5760 * chunks)
    assert [len(bank.push(x[5760 * n : 5760 * (n + 1)])) for n in range(chunks)] == [36] * chunks
    assert len(bank.finish()) == 0


@pytest.mark.parametrize("largest", [1, 7, 160, 400, 5760, 100_000])
def test_a_stream_is_the_whole(largest):
    x = voice(4321 if largest == 1 else 20_123, seed=largest)
    assert torch.equal(stream(x, largest), offline(x))


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 161, 399, 400, 5759, 5760, 5761])
def test_no_audio_is_lost(samples):
    x = voice(samples)
    features = offline(x)
    assert len(features) == frame_count(samples) == int(np.ceil(samples / 160))
    np.testing.assert_allclose(features.numpy(), kaldi_fbank(x), atol=2e-3)
    assert torch.equal(stream(x, 100), features)


def test_frames_do_not_depend_on_what_follows():
    x = voice(8000)
    features = offline(x)
    x[4800:] = voice(3200, seed=9)
    assert torch.equal(offline(x)[:30], features[:30])
    assert not torch.equal(offline(x)[30], features[30])


@pytest.mark.parametrize("at", [0, 1, 100, 161, 5000])
def test_a_copy_goes_on_by_itself(at):
    x, y = voice(9000), voice(9000, seed=5)
    bank = FilterbankStream()
    before = bank.push(x[:at])
    copy = bank.copy()
    mine = torch.cat([before, bank.push(x[at:]), bank.finish()])
    theirs = torch.cat([before, copy.push(y[at:]), copy.finish()])
    assert torch.equal(mine, offline(x))
    assert torch.equal(theirs, offline(np.concatenate([x[:at], y[at:]])))


def test_a_stream_keeps_only_what_the_next_frame_needs():
    bank = FilterbankStream()
    for seed in range(20):
        bank.push(voice(16_123, seed))
        assert bank.nbytes < 400 * 4
    ready = bank._computer.num_frames_ready
    assert ready == 20 * 16_123 // 160
    with pytest.raises(RuntimeError, match="already removed"):
        bank._computer.get_frame(ready - 1)


def test_streams_do_not_touch_one_another():
    x, y = voice(4000), voice(4000, seed=1)
    first, second, pieces = FilterbankStream(), FilterbankStream(), ([], [])
    for at in range(0, 4000, 250):
        pieces[0].append(first.push(x[at : at + 250]))
        pieces[1].append(second.push(y[at : at + 250]))
    assert torch.equal(torch.cat(pieces[0]), offline(x)) and torch.equal(torch.cat(pieces[1]), offline(y))


def test_bad_samples_leave_the_stream_as_it_was():
    x = voice(3200)
    bank = FilterbankStream()
    pieces = [bank.push(x[:1000])]
    for bad, match in (
        (np.array([0.1, np.nan]), "samples: expected finite ones, got nan at index 1"),
        (np.zeros(3, np.int16), r"samples: expected floating \[N\] within \[-1, 1\], got int16 \[3\]"),
        (np.zeros((1, 3)), r"got float64 \[1, 3\]"),
    ):
        with pytest.raises(ValueError, match=match):
            bank.push(bad)
    pieces += [bank.push(torch.from_numpy(x[1000:])), bank.finish()]
    assert torch.equal(torch.cat(pieces), offline(x))
    for call in (bank.finish, lambda: bank.push(x)):
        with pytest.raises(ValueError, match="filterbank stream: expected no call after finish"):
            call()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    with pytest.raises(MissingExtra, match=r"'kaldi-native-fbank'.*leapformer\[speech\]"):
        offline(np.zeros(10, np.float32))


# ---- statistics


def utterances(bins: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [100 + torch.randn(T, bins, generator=generator) * torch.arange(1, bins + 1) for T in (7, 1, 40, 0, 13)]


def statistics(parts: list[torch.Tensor], bins: int = 5) -> FeatureStatistics:
    total = FeatureStatistics.empty(bins)
    for part in parts:
        total = total.merge(FeatureStatistics.of(part))
    return total


def test_statistics_are_those_of_all_frames():
    parts = utterances()
    frames = torch.cat(parts).double().numpy()
    total = statistics(parts)
    assert (total.count, total.utterances) == (61, 5)
    assert total.mean.dtype == total.variance.dtype == torch.float64
    np.testing.assert_allclose(total.mean, frames.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(total.variance, frames.var(axis=0), rtol=1e-10)


def test_statistics_of_halves_merge():
    parts = utterances()
    merged, total = statistics(parts[:2]).merge(statistics(parts[2:])), statistics(parts)
    assert (merged.count, merged.utterances) == (total.count, total.utterances)
    torch.testing.assert_close(merged.mean, total.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.variance, total.variance, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="statistics: expected 5 bins, got 4"):
        total.merge(FeatureStatistics.empty(4))


def test_normalised_features_have_mean_0_and_variance_1():
    parts = utterances()
    total = statistics(parts)
    normal = total.normalize(torch.cat(parts))
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    assert torch.equal(total.normalize(parts[2][3:9]), total.normalize(parts[2])[3:9])  # so in a stream
    assert total.normalize(parts[0].double()[None]).dtype == torch.float64


def test_a_bin_that_never_varied_is_not_blown_up():
    total = FeatureStatistics.of(torch.full((9, 2), 3.0))
    assert total.normalize(torch.tensor([[3.0, 4.0]])).tolist() == [[0.0, 10.0]]


def test_statistics_are_kept_exactly(tmp_path):
    path, total = tmp_path / "statistics.safetensors", statistics(utterances())
    total.save(path)
    loaded = FeatureStatistics.load(path)
    assert (loaded.count, loaded.utterances) == (61, 5)
    assert torch.equal(loaded.mean, total.mean) and torch.equal(loaded.variance, total.variance)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_that_are_no_statistics(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "statistics.safetensors"

    def fails(match: str) -> None:
        with pytest.raises(LeapformerError, match=match) as caught:
            FeatureStatistics.load(path)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))

    fails("expected feature statistics, found No such file or directory")
    path.write_bytes(b"no statistics")
    fails(r"expected feature statistics \(safetensors\), found")
    statistics(utterances()).save(path)
    path.write_bytes(path.read_bytes()[:-4])
    fails(r"expected feature statistics \(safetensors\), found")
    good = {"count": torch.tensor([3]), "utterances": torch.tensor([1])}
    real = torch.zeros(4, dtype=torch.float64)
    save_file({**good, "mean": real.float(), "variance": real}, path)
    fails("expected count, utterances, mean and variance, found count, mean, utterances, variance of other types")
    save_file({"mean": real}, path)
    fails("found mean of other types")
    save_file({**good, "mean": real, "variance": real[:3].clone()}, path)
    fails("expected one count and as many means as variances, found other sizes")
    save_file({**good, "mean": real, "variance": real - 1}, path)
    fails("expected finite means and variances from 0 on, found others")


def test_statistics_check_what_they_are_given():
    with pytest.raises(ValueError, match=r"features: expected floating \[T, M\], got torch.int64 \[3, 5\]"):
        FeatureStatistics.of(torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="statistics: expected at least one frame, got none"):
        FeatureStatistics.empty(5).normalize(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"features: expected \[..., 5\], got \[3, 4\]"):
        statistics(utterances()).normalize(torch.zeros(3, 4))


def test_statistics_out_of_range(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    good = {"count": torch.tensor([4]), "utterances": torch.tensor([2]), "mean": torch.zeros(80, dtype=torch.float64),
            "variance": torch.ones(80, dtype=torch.float64)}  # fmt: skip
    for changed, message in (
        ({"count": torch.tensor([-4])}, "expected counts from 0 on, found -4 and 2"),
        (
            {"mean": good["mean"][:1].clone(), "variance": good["variance"][:1].clone()},
            "expected 3 to 128 bins, found 1",
        ),
        ({"mean": torch.full((80,), torch.nan, dtype=torch.float64)}, "expected finite means"),
    ):
        save_file({**good, **changed}, path)
        with pytest.raises(LeapformerError, match=message):
            FeatureStatistics.load(path)
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(LeapformerError, match="expected at most 1,048,576 bytes, found more"):
        FeatureStatistics.load(path)


def test_statistics_replace_no_device(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LeapformerError, match="expected a file or a name that is free, found a pipe"):
        FeatureStatistics.empty().save(tmp_path / "pipe")
