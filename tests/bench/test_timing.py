"""Turns, limits, medians and exponents, with timers that are told what to say."""

import pytest

from leapformer.bench.rows import Spread, spread
from leapformer.bench.timing import Race, Sample, fitted_exponent, race, timed


def clockwork(*seconds: float):
    """A timer that says these wall seconds one after the other, then the last one again, and notes how it is called."""
    asked = []

    def time_calls(calls: int) -> Sample:
        asked.append(calls)
        wall = seconds[min(len(asked), len(seconds)) - 1]
        return Sample(wall, 2 * wall)

    return time_calls, asked


def test_contenders_take_turns_after_a_warm_up():
    order = []
    slow, asked_slow = clockwork(0.5, 0.1)
    fast, asked_fast = clockwork(0.001)
    outcome = race({"slow": slow, "fast": fast}, repeats=3, turn=order.append)
    assert order == ["slow", "fast", *["slow", "fast"] * 3]
    assert asked_slow == [1, 1, 1, 1, 1]
    assert asked_fast == [1, 1, 20, 20, 20]  # what is quick is repeated until 20 ms are full
    assert outcome.ratios("slow", "fast", "cpu") == pytest.approx([100, 100, 100])
    assert outcome.times()["slow"].wall_ms.median == pytest.approx(200)


def test_what_is_over_the_limit_is_named_and_not_run():
    known, asked = clockwork(9)
    slow, _ = clockwork(3)
    fast, _ = clockwork(0.1)
    timers = {"known": known, "slow": slow, "fast": fast}
    outcome = race(timers, repeats=2, limit=1, expected={"known": 2})
    assert set(outcome.samples) == {"fast"} and asked == []
    assert outcome.not_run == {
        "known": "about 2 s a call, over the limit of 1 s",
        "slow": "3 s a call, over the limit of 1 s",
    }
    assert outcome.ratios("slow", "fast", "cpu") == []


def test_long_turns_are_fewer_but_three_at_least():
    assert len(race({"a": clockwork(0.8)[0]}, repeats=9, limit=1).samples["a"]) == 5
    assert len(race({"a": clockwork(1.0)[0], "b": clockwork(1.0)[0]}, repeats=9, limit=1).samples["a"]) == 3


def test_spread_of_measured_values():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(median=3.5, p20=2.0, p80=5.0, n=6)
    assert spread([2.0]) == Spread(median=2.0, p20=2.0, p80=2.0, n=1)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 1.37])
def test_exponent_of_a_known_law(exponent):
    lengths = [512, 1024, 2048, 8192]
    assert fitted_exponent(lengths, [0.3 * n**exponent for n in lengths]) == pytest.approx(exponent, abs=1e-9)


def test_exponent_needs_two_lengths():
    assert fitted_exponent([512], [1.0]) is None
    assert fitted_exponent([512, 512], [1.0, 2.0]) is None


def test_timed_calls_as_often_as_told():
    calls = []
    sample = timed(lambda: calls.append(1), 7)
    assert len(calls) == 7 and sample.wall > 0 and sample.cpu >= 0


def test_seconds_by_clock():
    outcome = Race(samples={"a": [Sample(1.0, 2.0), Sample(3.0, 4.0)]})
    assert outcome.seconds("a", "cpu") == [1.0, 3.0] and outcome.seconds("a", "wall") == [2.0, 4.0]
