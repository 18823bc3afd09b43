"""Speech as training changes it: speed, vocal tract length, SpecAugment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from leapformer.tasks.simulst.audio.augmentation import augment, spec_augment, stretch, warp
from leapformer.tasks.simulst.audio.features import offline

# ---- speed and vocal tract length


def test_speed_changes_the_length_alone():
    ramp = torch.arange(40.0)[:, None].expand(40, 3)
    longer = stretch(ramp, 1.5)
    assert longer.shape == (60, 3)
    steps = longer[5:-5, 0].diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 1.5))
    assert torch.equal(stretch(ramp, 1.0), ramp)


def centres() -> torch.Tensor:
    """Hz of the 80 bins of Kaldi's filterbank from 20 Hz to 8 kHz: float64 [80]."""
    mel = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700), 82)[1:-1]
    return torch.from_numpy(700 * (np.exp(mel / 1127) - 1))


def warped_frequency(f: torch.Tensor, factor: float) -> torch.Tensor:
    """Where eq. 1 of Jaitly and Hinton (2013) moves f, with F_hi of 4,800 Hz."""
    border = 4800 * min(factor, 1)
    above = 8000 - (8000 - border) / (8000 - border / factor) * (8000 - f)
    return torch.where(f <= border / factor, f * factor, above)


@pytest.mark.parametrize("factor", [0.8, 0.93, 1.1, 1.25])
def test_the_warp_is_that_of_the_paper(factor):
    """Bins that hold their own place in mel show where each took its content from; lines are interpolated without
    error.
    """
    mel = torch.log1p(centres() / 700)
    found = 700 * torch.expm1(warp(mel[None], factor))[0]
    inside = (found > centres()[0]) & (found < centres()[-1])  # else the nearest bin
    assert int(inside.sum()) >= 70
    torch.testing.assert_close(warped_frequency(found, factor)[inside], centres()[inside], rtol=1e-10, atol=0)


def test_no_warp_and_no_other_size():
    x = torch.randn(7, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        warp(x, 1.0), x, rtol=1e-4, atol=1e-4
    )  # places are off by float32's rounding of up to 79
    assert warp(x.double(), 0.9).dtype == torch.float64 and warp(x, 1.1).shape == (7, 80)
    assert warp(torch.zeros(0, 80), 1.1).shape == (0, 80)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_warped_tone_is_the_higher_or_lower_tone(factor):
    def loudest(hertz: float) -> torch.Tensor:
        return offline(0.5 * np.sin(2 * math.pi * hertz / 16_000 * np.arange(8_000)).astype(np.float32))[10:40]

    for hertz in (500.0, 1500.0, 3000.0):
        moved, other = warp(loudest(hertz), factor).mean(0), loudest(hertz * factor).mean(0)
        assert abs(int(moved.argmax()) - int(other.argmax())) <= 1


def test_draws_of_an_utterance():
    x = torch.randn(100, 80, generator=torch.Generator().manual_seed(0))
    none = {"frequency_masks": 0, "time_masks": 0}

    def drawn(**options) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [augment(x, generator=generator, **none, **options) for _ in range(200)]

    assert all(torch.equal(each, x) for each in drawn())
    lengths = [len(each) for each in drawn(speed=0.1)]
    assert (min(lengths), max(lengths)) == (90, 110)
    voices = drawn(vocal_tract=0.1)
    assert all(each.shape == x.shape for each in voices) and len({float(each[0, 40]) for each in voices}) > 190
    assert all(torch.equal(a, b) for a, b in zip(voices, drawn(vocal_tract=0.1), strict=True))


# ---- SpecAugment


def masks(T: int, **keywords) -> torch.Tensor:
    """What is masked in T frames of ones, for 300 draws: bool [300, T, 80]."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([spec_augment(torch.ones(T, 80), generator=generator, **keywords) == 0 for _ in range(300)])


def is_stretch(masked: torch.Tensor) -> bool:
    where = masked.nonzero().flatten()
    return len(where) == 0 or len(where) == int(where[-1] - where[0]) + 1


def test_masks_are_one_band_and_one_stretch():
    drawn = masks(300)
    bands, stretches = drawn.all(dim=1), drawn.all(dim=2)
    assert torch.equal(drawn, bands[:, None, :] | stretches[:, :, None])
    assert all(map(is_stretch, bands)) and all(map(is_stretch, stretches))
    widths, lengths = bands.sum(1), stretches.sum(1)
    assert (int(widths.min()), int(widths.max())) == (0, 27)
    assert int(lengths.max()) <= 100
    # means of uniform draws from 0 to 27 and 0 to 100, within 4 standard deviations
    assert abs(float(widths.double().mean()) - 13.5) < 4 * (27 * 29 / 12 / 300) ** 0.5
    assert abs(float(lengths.double().mean()) - 50) < 4 * (100 * 102 / 12 / 300) ** 0.5
    assert bands.any(0).all() and stretches.any(0).all()  # every bin and frame can be masked


def test_numbers_and_widths_of_masks():
    assert not masks(50, frequency_masks=0, time_masks=0).any()
    only_time = masks(50, frequency_masks=0, time_masks=2, time_width=5)
    assert torch.equal(only_time.any(2), only_time.all(2)) and int(only_time.all(2).sum(1).max()) in range(6, 11)
    shared = masks(50, frequency_masks=0, time_share=0.2)
    assert int(shared.all(2).sum(1).max()) == 10
    assert masks(0).shape == (300, 0, 80)
    assert int(masks(3).all(2).sum(1).max()) == 3


def test_masking_changes_nothing_else():
    x = torch.randn(200, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = x.clone()
    y, again = (spec_augment(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(x, kept) and torch.equal(y, again) and y.dtype == torch.float64
    assert (y == 0).any() and torch.equal(y[y != 0], x[y != 0])
