"""The acceptance table: what is owed of each implementation, what is aimed at, and what a run measured.

Ratios hold for a machine of two cores with AVX-512; on another one the table is still what the same code reaches there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from leapformer.bench import lra, streaming
from leapformer.bench.contenders import CAUSAL, LEAP, LRA, RESEARCH, SDPA
from leapformer.bench.result import Table, short

KEPT = f"{RESEARCH}, memory kept"
WITH_BACKWARD = "forward + backward"
# Times as fast as SDPA, causal, forward + backward: (owed, aimed at) by length.
SPEED = {
    "native": {512: (2.2, 2.5), 1024: (3.3, 4), 2048: (5.3, 6), 4096: (10, 12), 8192: (19, 24), 16384: (34, 45)},
    "torch": {512: (1.0, 1.2), 1024: (1.6, 1.9), 2048: (2.3, 2.6), 4096: (5, 6), 8192: (9, 10), 16384: (17, 20)},
}
PEAK = {"forward": (0.58, 0.70), WITH_BACKWARD: (0.54, 0.65)}
MEMORY = {"native": 1.0, "torch": 1.7}
LRA_SPEED = {1024: (3, 5), 4096: (6, 10)}
LRA_KEPT = 2
ODD = (0.75, 0.9)
LONG_GIB, LONG_FLAT = 0.5, 1.1
SMALL_MODEL = {"native": 0.9, "torch": 0.6}  # of cosFormer's training
SMALL_MODEL_SOFTMAX = {4096: 3}
STEP_SPEED, STEP_MICROSECONDS, STEP_FLAT = 3, 20, 1.25
STREAM_FACTOR, STREAM_FLAT = 0.1, 1.2
SPEAKERS, SPEAKERS_MILLISECONDS = 32, 360


class Row(NamedTuple):
    """One promise. `measured` is None where a run did not measure it; `at_most`: smaller is better."""

    work: str
    against: str
    measured: float | None
    accept: float | None
    stretch: float | None = None
    at_most: bool = False
    unit: str = ""
    why: str = ""

    @property
    def met(self) -> str:
        if self.measured is None:
            return "not measured" + (f": {self.why}" if self.why else "")
        if self._reaches(self.stretch):
            return "yes, stretch"
        if self.accept is None:
            return "stretch not reached"
        return "yes" if self._reaches(self.accept) else "no"

    def _reaches(self, wanted: float | None) -> bool:
        if wanted is None or self.measured is None:
            return False
        return self.measured <= wanted if self.at_most else self.measured >= wanted


def acceptance_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The rows that a processor can show, out of the results "attention", "decoding", "lra" and "streaming", any of which may be missing."""
    rows = []
    if "attention" in results:
        rows += list(attention_promises(results["attention"]))
    if "decoding" in results:
        rows += list(decoding_promises(results["decoding"]))
    if "lra" in results:
        rows += list(lra_promises(results["lra"]))
    if "streaming" in results:
        rows += list(streaming_promises(results["streaming"]))
    lines = []
    for row in rows:
        sign = "at most " if row.at_most else ""
        wanted = [
            f"{sign}{short(value)}{row.unit}" if value is not None else "-" for value in (row.accept, row.stretch)
        ]
        measured = "-" if row.measured is None else short(row.measured) + row.unit
        lines.append([row.work, row.against, measured, *wanted, row.met])
    return Table("Acceptance", ["work", "against", "measured", "accept", "stretch", "met"], lines)


def attention_promises(content: Mapping[str, Any]) -> Iterator[Row]:
    """Speed over SDPA, share of the peak, odd shapes, the Long-Range Arena shape, memory and the long sequence."""
    for impl, promises in SPEED.items():
        for length, (accept, stretch) in promises.items():
            row = _time_row(content, CAUSAL.name, length, WITH_BACKWARD)
            measured = _median(row.get("speed_over", {}).get(SDPA, {}).get(impl))
            work = f"{impl}, causal, {WITH_BACKWARD}, {length:,} tokens"
            yield Row(work, SDPA, measured, accept, stretch, unit=" x", why=_why(row, impl, SDPA))
    for name, (accept, stretch) in PEAK.items():
        shares = [
            (row["share_of_peak"]["native"]["median"], row["length"])
            for row in content.get("time", [])
            if row["shape"] == CAUSAL.name and row["pass"] == name and "native" in row["share_of_peak"]
        ]
        measured, length = min(shares, default=(None, None))
        at = f", lowest at {length:,} tokens" if length else ""
        yield Row(f"native, causal, {name}{at}", "matrix product", measured, accept, stretch, why="no native")
    yield _odd_promise(content)
    for length, (accept, stretch) in LRA_SPEED.items():
        row = _time_row(content, LRA.name, length, WITH_BACKWARD)
        for other, owed, aimed in ((RESEARCH, accept, stretch), (KEPT, LRA_KEPT, None)):
            measured = _median(row.get("speed_over", {}).get(other, {}).get("native" + LEAP))
            work = f"native with LeaP, {LRA.name} shape, {WITH_BACKWARD}, {length:,} tokens"
            yield Row(work, other, measured, owed, aimed, unit=" x", why=_why(row, "native" + LEAP, other))
    for impl, accept in MEMORY.items():
        over = [
            (row["over_sdpa"][impl], row["length"])
            for row in content.get("memory", [])
            if row["shape"] == CAUSAL.name and impl in row["over_sdpa"]
        ]
        measured, length = max(over, default=(None, None))
        at = f", highest at {length:,} tokens" if length else ""
        yield Row(f"{impl}, memory, causal{at}", SDPA, measured, accept, at_most=True, unit=" x")
    yield from _long_promises(content)


def decoding_promises(content: Mapping[str, Any]) -> Iterator[Row]:
    """One step of a layer's attention: over torch's own step, and flat over the context."""
    rows = [row for row in content.get("steps", []) if "native" in row["contenders"]]
    clock = f"{content['settings']['clock']}_ms"
    speeds = [(_median(row["speed_over"].get("torch", {}).get("native")), row["context"]) for row in rows]
    slowest, context = min(((speed, at) for speed, at in speeds if speed is not None), default=(None, None))
    at = f", lowest at {context:,} tokens of context" if context else ""
    yield Row(f"native, one decoding step{at}", "torch step", slowest, STEP_SPEED, unit=" x", why="no native")
    steps = [1e3 * row["contenders"]["native"][clock]["median"] for row in rows]
    longest = f"{rows[0]['context']:,} to {rows[-1]['context']:,}" if rows else "1,024 to 1,048,576"
    flat = max(steps) / min(steps) if len(steps) > 1 else None
    work = f"native, one decoding step, {longest} tokens: slowest over fastest"
    yield Row(work, "itself", flat, STEP_FLAT, at_most=True, unit=" x", why="no native")
    slow = max(steps, default=None)
    yield Row("native, slowest decoding step", "-", slow, None, STEP_MICROSECONDS, at_most=True, unit=" us",
              why="no native")  # fmt: skip


def lra_promises(content: Mapping[str, Any]) -> Iterator[Row]:
    """LeaPformer's training of the small model: over cosFormer's at every length, over softmax's, with dropout and without."""
    rows = {row["length"]: row for row in content.get("speed", []) if row["kind"] == "training"}
    for length, row in rows.items():
        work = f"{lra.LEAP} ({row['impl']}), training, {length:,} tokens"
        measured = _median(row["speed_over"].get(lra.COSFORMER, {}).get(lra.LEAP))
        yield Row(
            work, lra.COSFORMER, measured, SMALL_MODEL[row["impl"]], unit=" x", why=_why(row, lra.LEAP, lra.COSFORMER)
        )
    for length, accept in SMALL_MODEL_SOFTMAX.items():
        row = rows.get(length, {})
        for other in (lra.SOFTMAX, lra.NO_DROPOUT):
            measured = _median(row.get("speed_over", {}).get(other, {}).get(lra.LEAP))
            work = f"{lra.LEAP}, training, {length:,} tokens"
            yield Row(work, other, measured, accept, unit=" x", why=_why(row, lra.LEAP, other))


def streaming_promises(content: Mapping[str, Any]) -> Iterator[Row]:
    """One speaker of LeaPformer: real-time factor, flat and low, and a state that does not grow; then many speakers."""
    rows = [row for row in content.get("lengths", []) if streaming.LEAP in row["real_time_factor"]]
    factors = [(row["real_time_factor"][streaming.LEAP]["median"], row["seconds"]) for row in rows]
    lengths = f"{rows[0]['seconds']} to {rows[-1]['seconds']} s of audio" if rows else "5 to 600 s of audio"
    work, why = f"{streaming.LEAP}, streaming", "not among the lengths"
    slowest, at = max(factors, default=(None, 0))
    flat = slowest / min(factors)[0] if slowest is not None and len(factors) > 1 else None
    yield Row(f"{work}, {lengths}: real-time factor, highest over lowest", "itself", flat, STREAM_FLAT, at_most=True,
              unit=" x", why=why)  # fmt: skip
    highest = f", highest at {at} s" if rows else ""
    yield Row(f"{work}: real-time factor{highest}", "-", slowest, STREAM_FACTOR, at_most=True, why=why)
    states = [row["state_bytes"][streaming.LEAP] for row in rows]
    grown = max(states) / min(states) if len(states) > 1 else None
    told = f"{work}, {lengths}: bytes of state, most over least"
    yield Row(told, "itself", grown, 1.0, at_most=True, unit=" x", why=why)
    threads = streaming.SPEAKERS_THREADS
    wanted = {"contender": streaming.LEAP, "speakers": SPEAKERS, "threads": threads}
    row = next((row for row in content.get("speakers", []) if all(row[key] == wanted[key] for key in wanted)), None)
    yield Row(
        f"{work}, {SPEAKERS} speakers, {threads} threads: 95 % of the words within", "-",
        row["delay_ms"]["p95"] if row else None, SPEAKERS_MILLISECONDS, at_most=True, unit=" ms",
        why="--quick" if content["settings"]["quick"] else "fewer speakers are too many here",
    )  # fmt: skip


def _long_promises(content: Mapping[str, Any]) -> Iterator[Row]:
    rows = [row for row in content.get("long", []) if row["impl"] == "native"]
    last = rows[-1] if rows else {}
    measured = [row for row in rows if "not_run" not in row]
    enough = len(measured) > 1 and "not_run" not in last
    work, why = "native with LeaP, one sequence of 1,048,576 tokens", last.get("not_run", "no native, or --quick")
    yield Row(
        f"{work}: memory beyond its tensors", "-", last.get("beyond_gib"), LONG_GIB, at_most=True, unit=" GiB", why=why
    )
    for column, memory in (("microseconds_a_token_kept", ", memory kept"), ("microseconds_a_token", ", fresh memory")):
        paces = [row[column]["median"] for row in measured]
        flat = max(paces) / min(paces) if enough else None
        told = f"{work}: time per token from 16,384 on{memory}, slowest over fastest"
        yield Row(told, "itself", flat, LONG_FLAT, at_most=True, unit=" x", why=why)


def _odd_promise(content: Mapping[str, Any]) -> Row:
    rates = next((row["rate_over_aligned"] for row in content.get("odd", []) if row["impl"] == "native"), {})
    measured, name = min(((rate["median"], name) for name, rate in rates.items()), default=(None, None))
    work = "native, odd shapes" + (f", lowest: {name}" if name else "")
    return Row(work, "its aligned rate", measured, *ODD, unit=" x", why="no native")


def _time_row(content: Mapping[str, Any], shape: str, length: int, name: str) -> Mapping[str, Any]:
    rows = content.get("time", [])
    wanted = (shape, length, name)
    return next((row for row in rows if (row["shape"], row["length"], row["pass"]) == wanted), {})


def _median(values: Mapping[str, float] | None) -> float | None:
    return values["median"] if values else None


def _why(row: Mapping[str, Any], *names: str) -> str:
    """Why a race has no ratio of these contenders."""
    if not row:
        return "not among the lengths"
    missing = [name for name in names if name not in row["contenders"]]
    return "; ".join(f"{name}: {row['not_run'][name]}" if name in row["not_run"] else f"no {name}" for name in missing)
