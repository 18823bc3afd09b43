"""What training changes in the features of speech: how fast it is, the size of the speaker's vocal tract, and masks.

Letters: T frames, M mel bins.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

LOWEST_HZ, HIGHEST_HZ = 20.0, 8000.0  # of the filterbank
WARPED_HZ = 4800.0  # formants lie below; above it the warp goes back, so that the highest frequency stays in its place


def augment(
    features: Tensor, *, generator: torch.Generator, speed: float = 0.0, vocal_tract: float = 0.0, **masks: Any
) -> Tensor:
    """A copy of one utterance's features [T, M], normalised: stretched in time, warped in frequency, and masked.

    Arguments:
        generator: draws all of it, on the CPU; one state of it gives one result.
        speed: the utterance becomes longer or shorter by at most this share.
        vocal_tract: its formants become higher or lower by at most this share.
        masks: keywords of `spec_augment`.
    """
    if speed:
        features = stretch(features, _factor(speed, generator))
    if vocal_tract:
        features = warp(features, _factor(vocal_tract, generator))
    return spec_augment(features, generator=generator, **masks)


def _factor(share: float, generator: torch.Generator) -> float:
    """Drawn evenly from 1 - share to 1 + share."""
    return 1 + share * (2 * float(torch.rand((), generator=generator)) - 1)


def stretch(features: Tensor, factor: float) -> Tensor:
    """Features [F, M] of speech that is `factor` times as long, by linear interpolation in time: [round(F factor),
    M].
    """
    frames = max(1, round(len(features) * factor))
    return torch.nn.functional.interpolate(features.T[None], size=frames, mode="linear", align_corners=False)[0].T


def warp(features: Tensor, factor: float) -> Tensor:
    """Features [T, M] as of a speaker whose formants lie `factor` times as high, by linear interpolation between bins.

    Frequency f takes what stood at f / factor, up to 4.8 kHz times the lesser of factor and 1; from there to 8 kHz,
    which stays in its place, the map is a straight line too.

    Source: vocal tract length perturbation, Jaitly and Hinton 2013, eq. 1.
    """
    M = features.shape[1]
    centres = _mel_centres(M)
    step = centres[1] - centres[0]
    at = [(_mel(_unwarped(_hertz(mel), factor)) - centres[0]) / step for mel in centres]
    place = torch.tensor(at, dtype=features.dtype).clamp(0, M - 1)
    below = place.floor().long().clamp(max=M - 2)
    return torch.lerp(features[:, below], features[:, below + 1], place - below)


def _unwarped(frequency: float, factor: float) -> float:
    """The frequency whose content the warp moves to this one."""
    source = WARPED_HZ * min(factor, 1) / factor  # where the first line ends, before and after the warp
    target = source * factor
    if frequency <= target:
        return frequency / factor
    return HIGHEST_HZ - (HIGHEST_HZ - frequency) * (HIGHEST_HZ - source) / (HIGHEST_HZ - target)


def _mel(frequency: float) -> float:
    return 1127.0 * math.log1p(frequency / 700.0)


def _hertz(mel: float) -> float:
    return 700.0 * math.expm1(mel / 1127.0)


@cache
def _mel_centres(bins: int) -> list[float]:
    """Centres of the triangles of a filterbank, in mel: bins + 1 equal steps from its lowest frequency to its
    highest.
    """
    low, high = _mel(LOWEST_HZ), _mel(HIGHEST_HZ)
    return [low + (high - low) * number / (bins + 1) for number in range(1, bins + 1)]


def spec_augment(
    features: Tensor,
    *,
    generator: torch.Generator,
    frequency_width: int = 27,
    frequency_masks: int = 1,
    time_width: int = 100,
    time_masks: int = 1,
    time_share: float = 1.0,
) -> Tensor:
    """Masks bands of bins and stretches of frames of one utterance.

    A band is f bins wide, f drawn from 0 to `frequency_width`, and begins at 0 to M - f; a stretch likewise, of at most
    `time_width` frames and `time_share` of the utterance. What is masked is 0, the mean of normalised features.

    Source: SpecAugment, Park et al. 2019 (arXiv 1904.08779), sec. 2, without time warping.

    Arguments:
        features: [T, M], normalised; they are not changed.
        generator: draws the masks, on the CPU; one state of it gives one result.
        frequency_width, time_width: F and T of the paper. frequency_masks, time_masks: how many.
        time_share: p of the paper, 0 to 1.

    Returns:
        A copy [T, M] of the same dtype.
    """
    masked = features.clone()
    T, M = features.shape
    for _ in range(frequency_masks):
        start, end = _stretch(M, frequency_width, generator)
        masked[:, start:end] = 0
    for _ in range(time_masks):
        start, end = _stretch(T, min(time_width, int(time_share * T)), generator)
        masked[start:end] = 0
    return masked


def _stretch(length: int, longest: int, generator: torch.Generator) -> tuple[int, int]:
    """Where a mask begins and ends (excluded) within `length`."""
    width = int(torch.randint(min(longest, length) + 1, (), generator=generator))
    start = int(torch.randint(length - width + 1, (), generator=generator))
    return start, start + width
