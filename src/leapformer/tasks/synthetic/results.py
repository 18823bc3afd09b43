"""What the results of a synthetic task are: accuracy at the trained length and at multiples of it, beside chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leapformer.training.results import LOSS, Metric, Page, TaskResults


def at(name: str, times: int) -> str:
    """The key of a figure at so many times the trained length."""
    return name if times == 1 else f"{name}_at_{times}"


def _share(key: str, heading: str, **more: Any) -> Metric:
    return Metric(key, heading, 1, factor=100.0, unit="%", better="higher", **more)


_ACCURACY = _share("accuracy", "accuracy", note="higher is better", said="an accuracy of {} %")
_COLUMNS = (
    _ACCURACY,
    _share(at("accuracy", 2), "at twice"),
    _share(at("accuracy", 4), "at four times"),
    _share("chance", "chance", note="needs no model"),
)


def _line(results: Mapping[str, Any]) -> str:
    metrics, length = results["splits"]["validation"], results["length"]
    longer = sorted(int(key.removeprefix("accuracy_at_")) for key in metrics if key.startswith("accuracy_at_"))
    told = [f"{metrics[at('accuracy', times)]:.1%} at {times * length} tokens" for times in (1, *longer)]
    return (
        f"accuracy {', '.join(told)} (chance {metrics['chance']:.1%}), loss {metrics['loss']:.4f} nats; "
        f"{results['tokens_per_second']:.0f} tokens/s"
    )


RESULTS = TaskResults(
    unit="tokens",
    headline=_ACCURACY,
    columns=(*_COLUMNS, LOSS),
    compared=(_ACCURACY,),
    line=_line,
    page=Page(
        metrics=(*_COLUMNS, Metric("loss", "loss", 4, note="nats")),
        headline=_ACCURACY,
        explanation="""\
<b>Accuracy</b>: the share in % of right answers, at the trained length, and at twice and four times of it.
<b>Chance</b>: what answers that need no model reach.
<b>LeaP modules</b> are the small networks that learn the proportions of the re-weighting.""",
    ),
)
