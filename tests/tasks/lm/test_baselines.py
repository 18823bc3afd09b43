"""The counted models against the formula, and against the known values of WikiText-2."""

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from leapformer.tasks.lm.baselines import (
    bigram_probabilities,
    count_baselines,
    count_word_baselines,
    unigram_probabilities,
)
from leapformer.tasks.lm.corpora import load_corpus
from leapformer.tasks.lm.packing import encode_split
from leapformer.tasks.lm.tokenizers import build_tokenizer

V = 7
TRAIN = np.random.default_rng(0).integers(0, V - 1, 60)  # id 6 is never seen


def formula_unigram(token: int) -> float:
    counts = Counter(TRAIN.tolist())
    return max(counts[token] - 0.75, 0) / 60 + 0.75 * len(counts) / 60 / V


def formula_bigram(before: int, token: int) -> float:
    pairs = Counter(zip(TRAIN[:-1].tolist(), TRAIN[1:].tolist(), strict=True))
    total = sum(count for (first, _), count in pairs.items() if first == before)
    if total == 0:
        return formula_unigram(token)
    kinds = sum(first == before for first, _ in pairs)
    return max(pairs[before, token] - 0.75, 0) / total + 0.75 * kinds / total * formula_unigram(token)


def test_probabilities_follow_the_formula_and_sum_to_one():
    unigram = unigram_probabilities(TRAIN, vocab_size=V)
    np.testing.assert_allclose(unigram, [formula_unigram(token) for token in range(V)], rtol=1e-12)
    assert unigram.sum() == pytest.approx(1, abs=1e-12)
    before, after = (grid.reshape(-1) for grid in np.meshgrid(np.arange(V), np.arange(V), indexing="ij"))
    bigram = bigram_probabilities(TRAIN, before, after, vocab_size=V).reshape(V, V)
    expected = [[formula_bigram(first, second) for second in range(V)] for first in range(V)]
    np.testing.assert_allclose(bigram, expected, rtol=1e-12)
    np.testing.assert_allclose(bigram.sum(1), 1, atol=1e-12)


def test_perplexities_are_per_word():
    text = np.array([0, 6, 3, 3])
    result = count_baselines(TRAIN, text, vocab_size=V, words=2)
    unigram = math.prod(formula_unigram(token) for token in (6, 3, 3))
    bigram = formula_bigram(0, 6) * formula_bigram(6, 3) * formula_bigram(3, 3)
    assert result.unigram_word_perplexity == pytest.approx(unigram ** (-1 / 2))
    assert result.bigram_word_perplexity == pytest.approx(bigram ** (-1 / 2))


def test_unknown_words_share_one_place():
    result = count_word_baselines(["a b a\n"], ["a new newer\n"])
    assert result.words == 4
    assert math.isfinite(result.bigram_nats)
    # a, b, <eos> and the unknown word: the discounted mass of three kinds, 0.75 * 3 / 4, shared by four
    unknown = 0.75 * 3 / 4 / 4
    end = 0.25 / 4 + unknown
    assert result.unigram_nats == pytest.approx(-2 * math.log(unknown) - math.log(end))


@pytest.mark.slow
def test_wikitext2_baselines():
    """The scale of docs/data.md: tokens of a 2k BPE, and words."""
    folder = Path(os.environ.get("LEAPFORMER_DATA", "")) / "wikitext2"
    if not os.environ.get("LEAPFORMER_DATA") or not folder.is_dir():
        pytest.skip("LEAPFORMER_DATA names no folder that holds wikitext2")
    corpus = load_corpus("wikitext", path=folder)
    tokenizer = build_tokenizer("bpe", vocab_size=2048, documents=corpus.train)
    train, valid = (
        encode_split(corpus.split(name), tokenizer, separate_documents=False) for name in ("train", "validation")
    )
    assert (len(train.tokens), len(valid.tokens)) == (3_531_896, 363_423)
    tokens = count_baselines(train.tokens, valid.tokens, vocab_size=len(tokenizer), words=valid.words)
    assert tokens.unigram_word_perplexity == pytest.approx(34_952.5, abs=1)
    assert tokens.bigram_word_perplexity == pytest.approx(902.3, abs=0.1)
    words = count_word_baselines(corpus.train, corpus.validation)
    assert words.unigram_word_perplexity == pytest.approx(965.1, abs=0.1)
    assert words.bigram_word_perplexity == pytest.approx(302.5, abs=0.1)
