"""What the results of simultaneous translation are: loss, BLEU at one k of wait-k and offline, lagging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from leapformer.training.results import LOSS, Metric, Page, TaskResults

K = 5  # of wait-k, where a table has one figure of a model

_BLEU = Metric("BLEU", f"BLEU k={K}", 2, place="curve", k=K, unit=f"BLEU at k = {K}", better="higher")
_OFFLINE = Metric("BLEU", "BLEU offline", 2, place="curve", better="higher")
# Delays are milliseconds of speech and words of text.
_OF_SPEECH = Metric("LAAL", f"LAAL s k={K}", 2, place="curve", k=K, factor=1e-3, source="speech")
_OF_TEXT = Metric("LAAL", f"LAAL words k={K}", 2, place="curve", k=K, source="text")

# A page calls them by longer names.
_PAGE_BLEU = replace(_BLEU, heading=f"BLEU, k = {K}", unit="", note="higher is better", said=f"BLEU {{}} at k = {K}")
_PAGE_OFFLINE = replace(_OFFLINE, heading="BLEU, offline", note="higher is better", said="offline: {}")
_PAGE_LAGGING = replace(
    _OF_SPEECH, heading=f"lagging, k = {K}", unit="s", note="LAAL", instead=replace(_OF_TEXT, unit="words")
)
_PAGE_LOSS = Metric("loss", "loss", 3, note="nats per token", said="a loss of {} nats per token")
# The loss tells of runs that wrote nothing.
_HEADLINE = replace(_PAGE_BLEU, instead=_PAGE_LOSS)


def _line(results: Mapping[str, Any]) -> str:
    """Loss, accuracy and, where sentences were written, their score; a transcription has chrF alone."""
    metrics = results["splits"]["validation"]
    parts = [f"loss {metrics['loss']:.4f} nats a token", f"token accuracy {metrics['token_accuracy']:.2%}"]
    if "BLEU" in metrics:
        k = metrics.get("k")
        parts.append(f"BLEU {metrics['BLEU']:.2f} {'offline' if k is None else f'at k = {k}'}")
    elif "chrF" in metrics:
        parts.append(f"chrF {metrics['chrF']:.2f}")
    return f"{', '.join(parts)}; {results['tokens_per_second']:.0f} tokens/s"


RESULTS = TaskResults(
    unit="tokens",
    headline=_HEADLINE,
    columns=(
        LOSS,
        Metric("perplexity", "ppl", 2),
        Metric("token_accuracy", "token accuracy %", 2, factor=100.0, better="higher"),
        _BLEU,
        _OFFLINE,
        _OF_SPEECH,
        _OF_TEXT,
    ),
    compared=(LOSS, _BLEU),
    line=_line,
    page=Page(
        metrics=(
            _PAGE_BLEU,
            _PAGE_OFFLINE,
            _PAGE_LAGGING,
            _PAGE_LOSS,
            Metric("perplexity", "perplexity", 2, note="per token"),
        ),
        headline=_HEADLINE,
        aside=_PAGE_OFFLINE,
        explanation="""\
<b>BLEU</b>: how many runs of one to four words stand in the reference translation too, 0 to 100; <b>k</b>: how many \
chunks of the source are read before the first word; <b>offline</b>: the whole source is read first.
<b>Lagging</b> (LAAL): how far, on average, a word comes after the part of the source that an even translator would \
need for it.
<b>LeaP modules</b> are the small networks that learn the proportions of the re-weighting.""",
        has_lagging=True,
    ),
)
