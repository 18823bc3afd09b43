"""Kinds that ask at every place for what is so of all that was read: parity, addition, majority, brackets.

N: examples, T: tokens of each, W: random numbers of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from leapformer.tasks.synthetic.draws import whole
from leapformer.tasks.synthetic.kind import Kind

BRACKETS = 2  # kinds of them


class Running(Kind):
    """A kind that asks at every place, with as many random numbers as there are places."""

    default_length = 40

    def draws(self, length: int) -> int:
        return length


class RunningSum(Running):
    """Digits below ``modulus``; their sum so far, modulo that. Digit d has the id 1 + d, as an answer too."""

    modulus: ClassVar[int]

    @property
    def vocab_size(self) -> int:
        return 1 + self.modulus

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        digits = whole(uniform, self.modulus)
        return 1 + digits, 1 + digits.cumsum(axis=1) % self.modulus


@dataclass(frozen=True)
class Parity(RunningSum):
    """Bits; whether the number of ones so far is odd, as a bit."""

    modulus = 2


@dataclass(frozen=True)
class Addition(RunningSum):
    """Digits from 0 to 4; their sum so far modulo 5."""

    modulus = 5


@dataclass(frozen=True)
class Majority(Running):
    """Two symbols, the ids 1 and 2; which one has been seen more often so far, 1 where both as often."""

    @property
    def vocab_size(self) -> int:
        return 3

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        seconds = whole(uniform, 2)
        lead = (2 * seconds - 1).cumsum(axis=1)  # of the second symbol
        return 1 + seconds, np.where(lead > 0, 2, 1)


@dataclass(frozen=True)
class Brackets(Running):
    """Opening and closing brackets of two kinds that nest; how many are open, at most `depth`.

    A walk: each place opens or closes with one chance in two, opens where nothing is open, and closes at the greatest
    depth. What closes is of the kind that was opened last; what opens is of any. Ids: 1 and 2 open, 3 and 4 close,
    5 + d is the answer d.

    Arguments:
        depth: the greatest.
    """

    depth: int = 8

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * BRACKETS + self.depth + 1

    def draws(self, length: int) -> int:
        return 2 * length

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        wants_to_open, drawn_kinds = uniform[:, 0::2] < 0.5, whole(uniform[:, 1::2], BRACKETS)
        rows = np.arange(len(uniform))
        tokens, depths = (np.empty((len(uniform), length), dtype=np.int64) for _ in range(2))
        depth = np.zeros(len(uniform), dtype=np.int64)
        # Of what is open, by depth; one more, as no row may write outside where nothing opens.
        stack = np.zeros((len(uniform), self.depth + 1), dtype=np.int64)
        for place in range(length):
            opens = ((depth == 0) | wants_to_open[:, place]) & (depth < self.depth)
            stack[rows, depth] = np.where(opens, drawn_kinds[:, place], stack[rows, depth])
            depth = depth + np.where(opens, 1, -1)
            closed = stack[rows, depth]
            tokens[:, place] = np.where(opens, 1 + drawn_kinds[:, place], 1 + BRACKETS + closed)
            depths[:, place] = depth
        return tokens, 1 + 2 * BRACKETS + depths
