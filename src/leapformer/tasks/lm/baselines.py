"""Perplexities that need no model: unigram and bigram counted on the training tokens.

With D = 0.75, V the number of ids, c(w) and c(h, w) the counts, N the training tokens and t(.) the number of different
successors (absolute discounting, interpolated: Ney, Essen, Kneser 1994):

    p(w)     = max(c(w) - D, 0) / N + D t() / N * 1 / V
    p(w | h) = max(c(h, w) - D, 0) / c(h) + D t(h) / c(h) * p(w),        p(w) where h was never seen before a token

All functions give the summed nats of the evaluated text; `metrics.word_perplexity` makes the perplexity of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leapformer.tasks.lm.corpora import word_tokens

DISCOUNT = 0.75


@dataclass(frozen=True)
class CountedBaselines:
    """Summed nats of the evaluated tokens under each model, and the word perplexities of them."""

    unigram_nats: float
    bigram_nats: float
    words: int

    @property
    def unigram_word_perplexity(self) -> float:
        return math.exp(self.unigram_nats / self.words)

    @property
    def bigram_word_perplexity(self) -> float:
        return math.exp(self.bigram_nats / self.words)


def unigram_probabilities(train: np.ndarray, *, vocab_size: int, discount: float = DISCOUNT) -> np.ndarray:
    """Float64 [vocab_size], positive, sums to 1; `train` integer [n]."""
    counts = np.bincount(train, minlength=vocab_size)
    freed = discount * np.count_nonzero(counts)
    return (np.maximum(counts - discount, 0.0) + freed / vocab_size) / len(train)


def bigram_probabilities(
    train: np.ndarray, previous: np.ndarray, following: np.ndarray, *, vocab_size: int, discount: float = DISCOUNT
) -> np.ndarray:
    """p(following | previous), float64 [m], for integer [m] arrays; counts from `train`, integer [n]."""
    unigram = unigram_probabilities(train, vocab_size=vocab_size, discount=discount)
    train = train.astype(np.int64)
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    context_counts = np.bincount(train[:-1], minlength=vocab_size)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)

    wanted = previous.astype(np.int64) * vocab_size + following
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counts = np.where(pairs[at] == wanted, pair_counts[at], 0)
    total = np.maximum(context_counts[previous], 1)
    freed = np.where(context_counts[previous] > 0, discount * successors[previous] / total, 1.0)
    return np.maximum(counts - discount, 0.0) / total + freed * unigram[following]


def count_baselines(
    train: np.ndarray, evaluated: np.ndarray, *, vocab_size: int, words: int, discount: float = DISCOUNT
) -> CountedBaselines:
    """Both baselines over the model's own tokens: they know what the model knows, so this is what it has to beat.

    Arguments:
        train, evaluated: integer [n], [m]: flat token arrays, n, m >= 2.
        vocab_size: number of ids.
        words: word-level tokens of the evaluated text.

    As for the models, the first token of `evaluated` is not predicted.
    """
    previous, following = evaluated[:-1], evaluated[1:]
    unigram = unigram_probabilities(train, vocab_size=vocab_size, discount=discount)[following]
    bigram = bigram_probabilities(train, previous, following, vocab_size=vocab_size, discount=discount)
    return CountedBaselines(-float(np.log(unigram).sum()), -float(np.log(bigram).sum()), words)


def count_word_baselines(
    train: Sequence[str], evaluated: Sequence[str], *, discount: float = DISCOUNT
) -> CountedBaselines:
    """Both baselines over words and line ends of two lists of documents.

    The vocabulary is that of the training text and one unknown word, which stands for all that are not in it: only with
    a closed vocabulary, such as WikiText's, may the result be compared with that of an open one.
    """
    ids: dict[str, int] = {}
    train_ids = np.fromiter((ids.setdefault(word, len(ids)) for word in word_tokens(train)), dtype=np.int64)
    unknown = len(ids)
    evaluated_ids = np.fromiter((ids.get(word, unknown) for word in word_tokens(evaluated)), dtype=np.int64)
    size = unknown + bool((evaluated_ids == unknown).any())
    return count_baselines(train_ids, evaluated_ids, vocab_size=size, words=len(evaluated_ids), discount=discount)
