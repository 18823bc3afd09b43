"""Sequences of a kind as a data set: made when they are asked for, never stored.

B: sequences of a batch, T: tokens of a sequence with the symbol that closes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from leapformer.models.loss import IGNORE_INDEX
from leapformer.tasks.synthetic.draws import uniforms
from leapformer.tasks.synthetic.kind import BLANK, Kind

COUNTED = 4096  # sequences that the commonest answers are counted on, and at most so many tokens in all:
COUNTED_TOKENS = 1 << 20
AT_ONCE = 64  # sequences that chance is measured on


class Sequences(Dataset):
    """The sequences of a kind, by number: items are {"input_ids": [T], "labels": [T]}, int64.

    Labels are as the model takes them, which shifts them by one: what is asked after token t is label t + 1. So that
    the last token has a place too, each sequence ends with a blank, from which nothing is predicted.

    Arguments:
        kind: makes them. length: T - 1. seed, stream: see `uniforms`. count: how many there are.
    """

    def __init__(self, kind: Kind, *, length: int, seed: int, stream: str, count: int) -> None:
        self.kind, self.length, self.seed, self.stream, self.count = kind, length, seed, stream, count

    def __len__(self) -> int:
        return self.count

    def answered(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Sequences as their kind makes them: ids and answers, int64 [B, T - 1]."""
        wanted = self.kind.draws(self.length)
        return self.kind.sequences(uniforms(self.seed, self.stream, self.length, indices, wanted), self.length)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Several at once: input_ids and labels, int64 [B, T]."""
        tokens, answers = self.answered(indices)
        return {
            "input_ids": torch.from_numpy(np.pad(tokens, ((0, 0), (0, 1)), constant_values=BLANK)),
            "labels": torch.from_numpy(np.pad(answers, ((0, 0), (1, 0)), constant_values=IGNORE_INDEX)),
        }

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """What torch's loader asks for where it is there: a batch is made at once."""
        batch = self.batch(indices)
        return [{name: rows[number] for name, rows in batch.items()} for number in range(len(indices))]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"sequence {index} of {self.count}")
        return self.__getitems__([index])[0]


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch out of items, which all have one length."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def chance(dataset: Sequences) -> float:
    """Accuracy on a data set without a model: the kind's own guess, or else the commonest answer at each place.

    What is commonest is counted on sequences of their own, the same ones in every run.
    """
    if dataset.kind.guess is not None:
        return dataset.kind.guess
    count = max(1, min(COUNTED, COUNTED_TOKENS // dataset.length))
    counted = Sequences(dataset.kind, length=dataset.length, seed=0, stream="counted", count=count)
    best = _commonest(counted.answered(range(count))[1])
    right = asked = 0
    for start in range(0, len(dataset), AT_ONCE):
        answers = dataset.answered(range(start, min(start + AT_ONCE, len(dataset))))[1]
        right += int((answers == best).sum())  # which is -1 where nothing is asked
        asked += int((answers != IGNORE_INDEX).sum())
    return right / asked


def _commonest(answers: np.ndarray) -> np.ndarray:
    """The commonest of answers [B, T] at each place, int64 [T]; -1 where nothing is asked."""
    size = answers.max() + 1
    places = np.broadcast_to(np.arange(answers.shape[1]), answers.shape)
    asked = answers != IGNORE_INDEX
    found, counts = np.unique(places[asked] * size + answers[asked], return_counts=True)
    best = np.full(answers.shape[1], -1, dtype=np.int64)
    rising = counts.argsort(kind="stable")
    best[found[rising] // size] = found[rising] % size  # of what is written twice the last stays, the commonest
    return best
