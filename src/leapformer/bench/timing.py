"""Time and compare: contenders take turns in one run, and what counts is the ratio within a turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from leapformer.bench.rows import Spread, Times, spread

SHORTEST = 0.02  # seconds of one measurement; quicker calls are repeated inside it
MOST_CALLS = 2000
WARM = 1.0  # seconds; a first call that took longer is not repeated, its setting up is a small part of it


class Sample(NamedTuple):
    """Seconds of one call: of the processor, summed over the process's threads, and of the clock on the wall."""

    cpu: float
    wall: float


Timer = Callable[[int], Sample]  # makes so many calls in a row and returns the mean of one


def timer(run: Callable[[], object]) -> Timer:
    """Times calls of a function in this process."""
    return partial(timed, run)


def timed(run: Callable[[], object], calls: int) -> Sample:
    """The mean of `calls` calls of `run` in a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    return Sample((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


@dataclass
class Race:
    """Samples of every contender in the order of the turns, and why some did not run."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str, clock: str) -> list[float]:
        """Seconds of a contender by turn; `clock` is "cpu" or "wall"."""
        return [getattr(sample, clock) for sample in self.samples[name]]

    def ratios(self, slow: str, fast: str, clock: str) -> list[float]:
        """How many times as long `slow` took, turn by turn; empty where one did not run."""
        if slow not in self.samples or fast not in self.samples:
            return []
        pairs = zip(self.seconds(slow, clock), self.seconds(fast, clock), strict=True)
        return [a / b for a, b in pairs]

    def speed_over(self, slow: Sequence[str], clock: str) -> dict[str, dict[str, Spread]]:
        """How many times as fast as each of `slow` every contender is; empty for one that did not run."""
        found: dict[str, dict[str, Spread]] = {}
        for other in slow:
            ratios = {name: self.ratios(other, name, clock) for name in self.samples}
            found[other] = {name: spread(values) for name, values in ratios.items() if values}
        return found

    def a_second(self, work: float, clock: str) -> dict[str, Spread]:
        """How much of something each contender does in a second, where a call does `work` of it."""
        return {name: spread([work / s for s in self.seconds(name, clock)]) for name in self.samples}

    def times(self) -> dict[str, Times]:
        """Milliseconds of both clocks."""
        return {
            name: Times(*(spread([1e3 * s for s in self.seconds(name, clock)]) for clock in ("cpu", "wall")))
            for name in self.samples
        }


def race(
    timers: Mapping[str, Timer],
    *,
    repeats: int,
    clock: str = "cpu",
    limit: float = math.inf,
    expected: Mapping[str, float] | None = None,
    turn: Callable[[str], None] = lambda name: None,
) -> Race:
    """Warm every contender up, then let them take turns.

    Arguments:
        repeats: turns; fewer, but at least three, where a turn takes more than `limit` seconds.
        clock: "cpu" or "wall", that of the limit.
        limit: seconds. A contender whose call takes longer, or is expected to, is left out with the reason.
        expected: seconds of a call, where something is known beforehand.
        turn: told what is measured next.
    """
    result = Race()
    calls: dict[str, int] = {}
    whole_turn = 0.0
    for name, time_calls in timers.items():
        guess = (expected or {}).get(name, 0.0)
        if guess > limit:
            result.not_run[name] = f"about {guess:.3g} s a call, over the limit of {limit:g} s"
            continue
        turn(name)
        first = getattr(time_calls(1), clock)
        again = first if first > min(limit, WARM) else getattr(time_calls(1), clock)
        if again > limit:
            result.not_run[name] = f"{again:.3g} s a call, over the limit of {limit:g} s"
            continue
        calls[name] = min(MOST_CALLS, max(1, math.ceil(SHORTEST / max(again, 1e-9))))
        whole_turn += calls[name] * again
    turns = repeats if whole_turn * repeats <= 4 * limit else max(3, int(4 * limit / whole_turn))
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for _ in range(min(turns, repeats)):
        for name, count in calls.items():
            turn(name)
            samples[name].append(timers[name](count))
    result.samples = samples
    return result


def fitted_exponent(lengths: Sequence[float], costs: Sequence[float]) -> float | None:
    """b of cost = a length^b by least squares on logarithms; None with fewer than two lengths."""
    if len(set(lengths)) < 2:
        return None
    x, y = [math.log(length) for length in lengths], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope
