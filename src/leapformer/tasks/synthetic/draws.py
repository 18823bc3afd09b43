"""Random numbers of an example, from its seed, split, length and number alone: counters in place of a state.

N: examples, W: numbers of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Numbered, as each is a stream of its own; what is counted for chance is no part of the three others.
STREAMS = {"train": 0, "validation": 1, "test": 2, "counted": 3}


def uniforms(seed: int, stream: str, length: int, indices: Sequence[int], count: int) -> np.ndarray:
    """Numbers from 0 to below 1, float64 [N, W]: row n belongs to example `indices[n]`, whatever else is asked for.

    They are Philox's words (Salmon et al. 2011), which numpy promises to keep, with the example's number in the
    counter.

    Arguments:
        seed: below 2**32. stream: a name in `STREAMS`. length: of the sequences, so that longer ones don't begin like
            the shorter ones. count: W.
    """
    key = np.array([seed, STREAMS[stream] << 32 | length], dtype=np.uint64)
    words = [np.random.Philox(key=key, counter=[0, index, 0, 0]).random_raw(count) for index in indices]
    return (np.array(words, dtype=np.uint64).reshape(len(words), count) >> np.uint64(11)) * 2.0**-53


def whole(uniform: np.ndarray, below: int) -> np.ndarray:
    """Whole numbers from 0 to below `below`, int64, all as likely."""
    return (uniform * below).astype(np.int64)


def choices(uniform: np.ndarray, count: int) -> np.ndarray:
    """`count` different whole numbers of those below M in random order: [N, M] -> int64 [N, count]."""
    return uniform.argsort(axis=1, kind="stable")[:, :count]


def weighted_choices(uniform: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """As `choices`, drawn one after another with chances as their weights [M], without putting back.

    Whoever comes first of M exponential waiting times with these rates is such a draw (Efraimidis and Spirakis 2006).
    """
    return choices(-np.log1p(-uniform) / weights, count)
