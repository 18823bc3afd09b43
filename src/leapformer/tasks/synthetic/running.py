"""Kinds that ask at every place for what is so of all that was read: parity, addition, majority, brackets.

N: examples, T: tokens of each, W: random numbers of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leapformer.tasks.synthetic.draws import whole
from leapformer.tasks.synthetic.kind import Kind

MODULUS = 5
BRACKETS = 2  # kinds of them


@dataclass(frozen=True)
class Parity(Kind):
    """Bits; whether the number of ones so far is odd, as a bit. Bit b has the id 1 + b."""

    default_length = 40

    @property
    def vocab_size(self) -> int:
        return 3

    def draws(self, length: int) -> int:
        return length

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        bits = whole(uniform, 2)
        return 1 + bits, 1 + bits.cumsum(axis=1) % 2


@dataclass(frozen=True)
class Addition(Kind):
    """Digits from 0 to 4; their sum so far modulo 5. Digit d has the id 1 + d."""

    default_length = 40

    @property
    def vocab_size(self) -> int:
        return 1 + MODULUS

    def draws(self, length: int) -> int:
        return length

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        digits = whole(uniform, MODULUS)
        return 1 + digits, 1 + digits.cumsum(axis=1) % MODULUS


@dataclass(frozen=True)
class Majority(Kind):
    """Two symbols, the ids 1 and 2; which one has been seen more often so far, 1 where both as often."""

    default_length = 40

    @property
    def vocab_size(self) -> int:
        return 3

    def draws(self, length: int) -> int:
        return length

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        seconds = whole(uniform, 2)
        lead = (2 * seconds - 1).cumsum(axis=1)  # of the second symbol
        return 1 + seconds, np.where(lead > 0, 2, 1)


@dataclass(frozen=True)
class Brackets(Kind):
    """Opening and closing brackets of two kinds that nest; how many are open, at most `depth`.

    A walk: each place opens or closes with one chance in two, opens where nothing is open, and closes at the greatest
    depth. What closes is of the kind that was opened last; what opens is of any. Ids: 1 and 2 open, 3 and 4 close,
    5 + d is the answer d.

    Arguments:
        depth: the greatest.
    """

    default_length = 40

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
