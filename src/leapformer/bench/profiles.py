"""Where the time of one call goes, by operator: the rows "profiles" of a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from leapformer.bench.result import Table, short
from leapformer.bench.rows import rows_of

TOP = 12  # operators of a profile


@dataclass(frozen=True)
class Operator:
    """How often an operator is called, and milliseconds without what it calls in turn."""

    operator: str
    calls: int
    ms: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One call of a contender: its costliest operators, and the milliseconds of all."""

    step: str
    contender: str
    operators: list[Operator]
    all_ms: float


def profile_of(run: Callable[[], object], *, step: str, contender: str) -> Profile:
    """The second of two calls by operator, the costly ones first. `step` is what a call does, in words."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    operators = [Operator(e.key, e.count, e.self_cpu_time_total / 1e3) for e in events[:TOP]]
    all_ms = sum(e.self_cpu_time_total for e in events) / 1e3
    return Profile(step=step, contender=contender, operators=operators, all_ms=all_ms)


def profile_tables(content: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each profile of a result."""
    for row in rows_of(content, "profiles", Profile):
        lines = [[o.operator, f"{o.calls:,}", short(o.ms), f"{o.ms / row.all_ms:.0%}"] for o in row.operators]
        title = f"Where a {row.step} of {row.contender} spends its time ({short(row.all_ms)} ms in operators)"
        yield Table(title, ["operator", "calls", "ms", "share"], lines)
