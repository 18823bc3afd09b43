"""What every kind of synthetic task is.

N: examples, T: tokens of each, W: random numbers of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from leapformer.models.loss import IGNORE_INDEX

BLANK = 0  # the id, in every kind, of the places that say nothing, and of the symbol that closes a sequence


@dataclass(frozen=True)
class Kind(ABC):
    """A task by its settings, which are the fields of its class, with their defaults."""

    default_length: ClassVar[int]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids that occur, answers among them."""

    def fault(self, lengths: list[int]) -> str | None:
        """Why sequences of these lengths, rising, can't be made, beginning with the key of the recipe; None: they
        can.
        """
        return None

    @abstractmethod
    def draws(self, length: int) -> int:
        """W: how many random numbers a sequence takes."""

    @abstractmethod
    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Make sequences out of random numbers.

        Arguments:
            uniform: float64 [N, W], from 0 to below 1.
            length: T.

        Returns:
            Ids int64 [N, T], and what is asked at each place, after its id has been read: the id of the answer, int64
            [N, T], -100 where nothing is asked.
        """

    @property
    def guess(self) -> float | None:
        """Accuracy of who guesses among what may be the answer; None: what is counted at each place says more."""
        return None


def settings_of(kind: Kind | type[Kind]) -> tuple[str, ...]:
    """Names of the settings of a kind."""
    return tuple(field.name for field in fields(kind))


def nothing_asked(shape: tuple[int, ...]) -> np.ndarray:
    """Answers with which nothing is asked anywhere."""
    return np.full(shape, IGNORE_INDEX, dtype=np.int64)
