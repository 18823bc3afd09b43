"""How late the words of a simultaneous translation come: AL, LAAL, AP and DAL.

A sentence is the delays of its words: d_i is how much of the source had been read when word i (from 1) was written, in
milliseconds of audio or in source words. With times in place of delays (what was read plus the computation, SimulEval's
`elapsed`) each metric becomes its computation-aware form.

Letters: X length of the source, Y target words, N words written, r = X / Y source per target word.

The definitions are those of SimulEval 1.1.4 and OmniSTEval 0.1.10, in every case: Y is the reference's length, a
sentence without written words or without a source is left out, and an empty reference has one word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Metric = Callable[[Sequence[float], float, int], float]


def average_lagging(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """AL = 1/tau sum_{i <= tau} (d_i - (i - 1) r), tau the first word written with the whole source read (or N).

    Where the first word comes after the source's end, it is that word's delay.

    Source: Ma et al. 2019 (STACL, arXiv 1810.08398), sec. 4.

    Arguments:
        delays: d_1 ... d_N, at least one, in the unit of `source_length`.
        source_length: X > 0. target_length: Y > 0, words of the reference.

    Raises:
        ValueError: no delays, or a length that is not positive.
    """
    _check(delays, source_length, target_length)
    return _lagging(delays, source_length, source_length / target_length)


def length_adaptive_average_lagging(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """LAAL: AL with r = X / max(Y, N), so that writing more than the reference does not pay.

    Source: Papi et al. 2022 (arXiv 2206.05807); Polak et al. 2022 (arXiv 2204.06028). Arguments and errors as
    `average_lagging`.
    """
    _check(delays, source_length, target_length)
    return _lagging(delays, source_length, source_length / max(target_length, len(delays)))


def average_proportion(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """AP = sum_i d_i / (X Y): the mean share of the source that was read.

    Source: Cho and Esipova 2016 (arXiv 1606.02012), where Y = N. Arguments and errors as `average_lagging`.
    """
    _check(delays, source_length, target_length)
    return sum(delays) / (source_length * target_length)


def differentiable_average_lagging(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """DAL = 1/N sum_i (d'_i - (i - 1) X / N), where d'_1 = d_1 and d'_i = max(d_i, d'_{i-1} + X / N).

    Source: Arivazhagan et al. 2019 (MILk, arXiv 1906.05218). Arguments and errors as `average_lagging`; `target_length`
    does not enter.
    """
    _check(delays, source_length, target_length)
    step = source_length / len(delays)
    total, written = 0.0, -math.inf
    for before, delay in enumerate(delays):
        written = max(delay, written + step)
        total += written - before * step
    return total / len(delays)


METRICS: dict[str, Metric] = {
    "AL": average_lagging,
    "LAAL": length_adaptive_average_lagging,
    "AP": average_proportion,
    "DAL": differentiable_average_lagging,
}


def reference_words(reference: str) -> int:
    """Y as SimulEval counts it: what single spaces separate, so 1 for an empty reference."""
    return len(reference.split(" "))


@dataclass(frozen=True)
class Emissions:
    """When the words of one sentence were written.

    Arguments:
        delays: d_1 ... d_N (or times, for the computation-aware forms); N may be 0.
        source_length: X. target_length: Y.
    """

    delays: Sequence[float]
    source_length: float
    target_length: int


def corpus_latency(sentences: Iterable[Emissions]) -> dict[str, float]:
    """The mean of each of `METRICS` over the sentences that have a source and written words; NaN where there is none.

    Raises:
        ValueError: such a sentence has a target length that is not positive.
    """
    written = [sentence for sentence in sentences if len(sentence.delays) and sentence.source_length > 0]
    return {
        name: mean([metric(one.delays, one.source_length, one.target_length) for one in written])
        for name, metric in METRICS.items()
    }


def mean(values: Sequence[float]) -> float:
    """Exactly rounded sum / number; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def _lagging(delays: Sequence[float], source_length: float, step: float) -> float:
    if delays[0] > source_length:
        return delays[0]
    total = 0.0
    for before, delay in enumerate(delays):
        total += delay - before * step
        if delay >= source_length:
            return total / (before + 1)
    return total / len(delays)


def _check(delays: Sequence[float], source_length: float, target_length: int) -> None:
    if not len(delays):
        raise ValueError("delays: expected at least one word, got none")
    if source_length <= 0 or target_length <= 0:
        raise ValueError(f"expected a source and a target of positive length, got {source_length} and {target_length}")
