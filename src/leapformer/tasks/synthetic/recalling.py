"""Kinds that ask for what stood before: recall, copy-at, selective-copy.

N: examples, T: tokens of each, W: random numbers of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leapformer.tasks.synthetic.draws import choices, weighted_choices, whole
from leapformer.tasks.synthetic.kind import BLANK, Kind, nothing_asked

GAP_POWER = 0.01  # of the distances between pairs and questions in the paper's code; small: mostly short ones


@dataclass(frozen=True)
class Recall(Kind):
    """Multi-query associative recall (MQAR; Arora et al., arXiv 2312.04927).

    First key, value, key, value, ...; then each key once more, at any even place behind, blanks between: there its
    value is asked for. A sequence has each key and each value once at most.

    Arguments:
        pairs: of key and value, and so questions.
        vocabulary: keys and values: the first half of the ids are keys.
    """

    default_length = 64

    pairs: int = 8
    vocabulary: int = 64

    @property
    def vocab_size(self) -> int:
        return 1 + self.vocabulary

    @property
    def keys(self) -> int:
        return self.vocabulary // 2

    def fault(self, lengths: list[int]) -> str | None:
        if self.keys < self.pairs:
            return (
                f"data.vocabulary: expected at least {2 * self.pairs}, two for each of data.pairs={self.pairs}, "
                f"found {self.vocabulary}"
            )
        if lengths[0] < 4 * self.pairs:
            return (
                f"data.length: expected at least {4 * self.pairs}, four places for each of data.pairs={self.pairs}, "
                f"found {lengths[0]}"
            )
        return None

    def _places(self, length: int) -> int:
        """Where a question may stand: every second place behind the pairs."""
        return (length - 2 * self.pairs) // 2

    def draws(self, length: int) -> int:
        return self.vocabulary + self._places(length)

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        for_keys, for_values, for_places = np.split(uniform, [self.keys, self.vocabulary], axis=1)
        keys = 1 + choices(for_keys, self.pairs)
        values = 1 + self.keys + choices(for_values, self.pairs)
        tokens = np.full((len(uniform), length), BLANK, dtype=np.int64)
        tokens[:, 0 : 2 * self.pairs : 2] = keys
        tokens[:, 1 : 2 * self.pairs : 2] = values
        weights = np.arange(1, self._places(length) + 1) ** (GAP_POWER - 1)
        asked = 2 * self.pairs + 2 * weighted_choices(for_places, weights, self.pairs)
        answers = nothing_asked(tokens.shape)
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(answers, asked, values, axis=1)
        return tokens, answers

    @property
    def guess(self) -> float | None:
        """Any of the values that were shown."""
        return 1 / self.pairs


@dataclass(frozen=True)
class CopyAt(Kind):
    """A text of random symbols, then questions: a number n in digits, at whose last one symbol n of the text is asked
    for, counted from 0.

    Arguments:
        questions: after the text. digits: of each number, the first one the most significant. base: of the digits.
        vocabulary: symbols of the text.
    """

    default_length = 64

    questions: int = 12
    digits: int = 3
    base: int = 10
    vocabulary: int = 16

    @property
    def vocab_size(self) -> int:
        return 1 + self.base + self.vocabulary

    def text(self, length: int) -> int:
        """Symbols of the text of a sequence."""
        return length - self.questions * self.digits

    def fault(self, lengths: list[int]) -> str | None:
        if self.text(lengths[0]) < 1:
            return (
                f"data.length: expected at least {self.questions * self.digits + 1}, a text before "
                f"data.questions={self.questions} of data.digits={self.digits}, found {lengths[0]}"
            )
        longest = self.text(lengths[-1])
        if longest > self.base**self.digits:
            return (
                f"data.digits: expected enough for the longest text of {longest} symbols, found {self.digits} of "
                f"data.base={self.base}"
            )
        return None

    def draws(self, length: int) -> int:
        return self.text(length) + self.questions

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.text(length)
        text = 1 + self.base + whole(uniform[:, :size], self.vocabulary)
        numbers = whole(uniform[:, size:], size)
        powers = self.base ** np.arange(self.digits)[::-1]
        digits = 1 + numbers[:, :, None] // powers % self.base  # [N, questions, digits]
        tokens = np.concatenate([text, digits.reshape(len(uniform), -1)], axis=1)
        answers = nothing_asked(tokens.shape)
        answers[:, size + self.digits - 1 :: self.digits] = np.take_along_axis(text, numbers, axis=1)
        return tokens, answers


@dataclass(frozen=True)
class SelectiveCopy(Kind):
    """Random symbols, a few of them marked; then as many places that ask for the marked ones, in their order, without
    showing the answers (after Gu and Dao, arXiv 2312.00752, where the noise is one symbol).

    Arguments:
        marked: symbols to copy. vocabulary: symbols; each has two ids, plain and marked, and answers are plain.
    """

    default_length = 64

    marked: int = 8
    vocabulary: int = 16

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * self.vocabulary + 1

    @property
    def ask(self) -> int:
        """The id that asks for the next one."""
        return 1 + 2 * self.vocabulary

    def fault(self, lengths: list[int]) -> str | None:
        if lengths[0] < 2 * self.marked:
            return (
                f"data.length: expected at least {2 * self.marked}, two places for each of data.marked={self.marked}, "
                f"found {lengths[0]}"
            )
        return None

    def draws(self, length: int) -> int:
        return 2 * (length - self.marked)

    def sequences(self, uniform: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        for_symbols, for_places = np.split(uniform, 2, axis=1)
        symbols = 1 + whole(for_symbols, self.vocabulary)
        places = np.sort(choices(for_places, self.marked), axis=1)
        copied = np.take_along_axis(symbols, places, axis=1)
        tokens = np.full((len(uniform), length), self.ask, dtype=np.int64)
        tokens[:, : -self.marked] = symbols
        np.put_along_axis(tokens, places, copied + self.vocabulary, axis=1)
        answers = nothing_asked(tokens.shape)
        answers[:, -self.marked :] = copied
        return tokens, answers
