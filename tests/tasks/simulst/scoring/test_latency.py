"""Latency: worked examples, the formulas written another way, and what counts in a corpus."""

from __future__ import annotations

import math
import random

import pytest

from leapformer.tasks.simulst.scoring.latency import (
    METRICS,
    Emissions,
    average_lagging,
    average_proportion,
    corpus_latency,
    differentiable_average_lagging,
    length_adaptive_average_lagging,
    mean,
    reference_words,
)


def wait_k(k: int, source: int, target: int) -> list[float]:
    return [float(min(k + i, source)) for i in range(target)]


def drawn(seed: int) -> Emissions:
    """Delays of a made-up sentence: within the source, at its end and beyond it."""
    draw = random.Random(seed)
    source_length = draw.choice([360.0, draw.uniform(1, 20_000)])
    words = draw.choice([1, 2, draw.randint(1, 50)])
    last = source_length * draw.choice([0.7, 1.0, 1.3])
    delays = sorted(min(draw.uniform(0, 1.5 * source_length), last) for _ in range(words))
    if draw.random() < 0.1:
        delays = [source_length + 1.5] * words
    return Emissions(delays, source_length, draw.randint(1, 50))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_wait_k_of_equal_lengths_lags_by_k(k):
    """What the metrics were made for: N = X words at one a source word."""
    delays = wait_k(k, 20, 20)
    assert average_lagging(delays, 20, 20) == pytest.approx(k)
    assert length_adaptive_average_lagging(delays, 20, 20) == pytest.approx(k)
    assert differentiable_average_lagging(delays, 20, 20) == pytest.approx(k)


def test_an_offline_system_lags_by_the_source():
    delays = [9.0] * 4
    assert average_lagging(delays, 9, 4) == length_adaptive_average_lagging(delays, 9, 4) == 9
    assert differentiable_average_lagging(delays, 9, 4) == pytest.approx(9)
    assert average_proportion(delays, 9, 4) == 1


def test_a_worked_example():
    """Source of 1,000 ms, reference of 4 words, 5 words written: r = 250 (AL) and 200 (LAAL, DAL)."""
    delays = [200.0, 600.0, 600.0, 1000.0, 1000.0]
    assert average_lagging(delays, 1000, 4) == pytest.approx((200 + 350 + 100 + 250) / 4)
    assert length_adaptive_average_lagging(delays, 1000, 4) == pytest.approx((200 + 400 + 200 + 400) / 4)
    assert average_proportion(delays, 1000, 4) == pytest.approx(3400 / 4000)
    # d' = 200, 600, 800, 1000, 1200
    assert differentiable_average_lagging(delays, 1000, 4) == pytest.approx((200 + 400 + 400 + 400 + 400) / 5)


def test_words_after_the_source_do_not_count_for_al():
    assert average_lagging([300, 1000], 1000, 4) == average_lagging([300, 1000, 1000, 1500], 1000, 4)
    assert average_lagging([1001.0, 1500.0], 1000, 4) == 1001.0  # the first word is late already


@pytest.mark.parametrize("seed", range(200))
def test_equal_the_formulas(seed):
    one = drawn(seed)
    d, X, Y, N = one.delays, one.source_length, one.target_length, len(one.delays)
    tau = next((i for i in range(1, N + 1) if d[i - 1] >= X), N)
    for metric, words in ((average_lagging, Y), (length_adaptive_average_lagging, max(Y, N))):
        expected = d[0] if d[0] > X else math.fsum(d[i - 1] - (i - 1) * X / words for i in range(1, tau + 1)) / tau
        assert metric(d, X, Y) == pytest.approx(expected, abs=1e-6)
    assert average_proportion(d, X, Y) == pytest.approx(math.fsum(d) / X / Y, abs=1e-9)
    # d'_i unrolled: the latest of what any earlier word allows
    unrolled = [max(d[j] + (i - j) * X / N for j in range(i + 1)) for i in range(N)]
    expected = math.fsum(unrolled[i] - i * X / N for i in range(N)) / N
    assert differentiable_average_lagging(d, X, Y) == pytest.approx(expected, abs=1e-6)


def test_a_corpus_is_the_mean_over_what_was_written():
    sentences = [drawn(seed) for seed in range(30)]
    silent = [Emissions([], 500.0, 3), Emissions([100.0], 0.0, 3)]
    scores = corpus_latency([silent[0], *sentences, silent[1]])
    assert list(scores) == ["AL", "LAAL", "AP", "DAL"]
    for name, metric in METRICS.items():
        values = [metric(one.delays, one.source_length, one.target_length) for one in sentences]
        assert scores[name] == pytest.approx(sum(values) / 30, abs=1e-9)
    assert all(map(math.isnan, corpus_latency(silent[:1]).values()))
    assert math.isnan(mean([])) and mean([0.1] * 10) == 0.1


def test_words_of_a_reference():
    assert [reference_words(text) for text in ("ein Hund", "Hund", "", "ein  Hund")] == [2, 1, 1, 3]


@pytest.mark.parametrize("metric", METRICS.values())
def test_lengths_are_checked(metric):
    with pytest.raises(ValueError, match="delays: expected at least one word, got none"):
        metric([], 10.0, 3)
    for lengths in ((0.0, 3), (10.0, 0)):
        with pytest.raises(ValueError, match=f"positive length, got {lengths[0]} and {lengths[1]}"):
            metric([1.0], *lengths)
