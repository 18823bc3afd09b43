"""What the results of a language model are: loss, bits per byte, perplexity per word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leapformer.training.results import LOSS, Metric, Page, TaskResults

_BITS = Metric("bits_per_byte", "bits per byte", 3, note="lower is better", said="{} bits per byte")


def _line(results: Mapping[str, Any]) -> str:
    metrics = results["splits"]["validation"]
    return (
        f"loss {metrics['loss']:.4f} nats a token, {metrics['bits_per_byte']:.3f} bits a byte, "
        f"word perplexity {metrics['word_perplexity']:.1f}; {results['tokens_per_second']:.0f} tokens/s"
    )


RESULTS = TaskResults(
    unit="tokens",
    headline=_BITS,
    columns=(
        LOSS,
        Metric("bits_per_byte", "bits/byte", 4),
        Metric("word_perplexity", "word ppl", 1),
    ),
    line=_line,
    page=Page(
        metrics=(Metric("word_perplexity", "word perplexity", 1, note="lower is better"), _BITS),
        headline=_BITS,
        explanation="""\
<b>Word perplexity</b>: among how many equally likely next words the model is left guessing, on average.
<b>Bits per byte</b>: how far the model could compress the text; raw text has 8.
The <b>counted</b> rows need no training: they predict a token from how often it (unigram), or it after the token \
before (bigram), stands in the training text.
<b>LeaP modules</b> are the small networks that learn the proportions shown below.""",
        has_speed=True,
    ),
)
