"""What the results of a Long-Range Arena task are: accuracy, beside that of answers which need no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from leapformer.training.results import LOSS, Metric, Page, TaskResults

_ACCURACY = Metric(
    "accuracy", "accuracy %", 2, factor=100.0, better="higher", note="higher is better", said="an accuracy of {} %"
)
_COMMONEST = Metric("majority_accuracy", "commonest class %", 2, factor=100.0)
_ROOT = Metric("root_operator_accuracy", "root operator %", 2, factor=100.0)


def arena_results(unit: Literal["tokens", "examples"]) -> TaskResults:
    """Of classification, whose loss is a mean over examples, or of filling in masks, where it is one over tokens."""

    def line(results: Mapping[str, Any]) -> str:
        metrics = results["splits"]["validation"]
        return (
            f"accuracy {metrics['accuracy']:.2%} ± {metrics['accuracy_error']:.2%} (the commonest "
            f"{metrics['majority_accuracy']:.2%}), loss {metrics['loss']:.4f} nats; "
            f"{results[f'{unit}_per_second']:.1f} {unit}/s"
        )

    return TaskResults(
        unit=unit, headline=_ACCURACY, columns=(LOSS, _ACCURACY, _COMMONEST, _ROOT), line=line, page=_PAGE
    )


_PAGE = Page(
    metrics=(_ACCURACY, replace(_COMMONEST, note="needs no model"), Metric("loss", "loss", 3, note="nats")),
    headline=_ACCURACY,
    explanation="""\
<b>Accuracy</b>: the share of right answers; <b>commonest class</b>: what always giving the same answer reaches.
<b>LeaP modules</b> are the small networks that learn the proportions of the re-weighting.""",
)

RESULTS = arena_results("examples")
