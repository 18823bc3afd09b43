"""The acceptance table: what is owed of each implementation, what is aimed at, and what a run measured.

    python -m benchmarks.acceptance [WHAT ...]          measure what is owed, or a part of it, and judge it
    python -m benchmarks.acceptance --only-table        judge what is already in the folder

Measures as `leapformer bench` does, with the research code beside, and leaves the table in `acceptance.md`. Ratios hold
for a machine of two cores with AVX-512; on another one the table is still what the same code reaches there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import typer

from benchmarks.contenders import RESEARCH, others
from leapformer.bench import lra, streaming
from leapformer.bench.attention import LongRow, MemoryRow, OddRow, TimeRow
from leapformer.bench.contenders import CAUSAL, LEAP, LRA, MEMORY_KEPT, SDPA
from leapformer.bench.decoding import StepRow
from leapformer.bench.result import FORMAT, Table, machine_line, short
from leapformer.bench.rows import Compared, rows_of
from leapformer.cli.bench import Asked, run_bench, show_table
from leapformer.errors import LeapformerError
from leapformer.files.reading import read_json_object
from leapformer.files.showing import shown
from leapformer.files.writing import write_text

KEPT = RESEARCH + MEMORY_KEPT
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


class Promise(NamedTuple):
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
    """The rows that a processor can show, out of the results of JUDGED, any of which may be missing."""
    lines = []
    for name, promises in JUDGED.items():
        for row in promises(results[name]) if name in results else ():
            sign = "at most " if row.at_most else ""
            wanted = ["-" if x is None else f"{sign}{short(x)}{row.unit}" for x in (row.accept, row.stretch)]
            measured = "-" if row.measured is None else short(row.measured) + row.unit
            lines.append([row.work, row.against, measured, *wanted, row.met])
    return Table("Acceptance", ["work", "against", "measured", "accept", "stretch", "met"], lines)


def attention_promises(content: Mapping[str, Any]) -> Iterator[Promise]:
    """Speed over SDPA, share of the peak, odd shapes, the Long-Range Arena shape, memory and the long sequence."""
    rows = rows_of(content, "time", TimeRow)
    for impl, promises in SPEED.items():
        for length, (accept, stretch) in promises.items():
            row = _time_row(rows, CAUSAL.name, length)
            measured = _speed(row, impl, over=SDPA)
            work = f"{impl}, causal, {WITH_BACKWARD}, {length:,} tokens"
            yield Promise(work, SDPA, measured, accept, stretch, unit=" x", why=_why(row, impl, SDPA))
    for name, (accept, stretch) in PEAK.items():
        shares = [
            (row.share_of_peak["native"].median, row.length)
            for row in rows
            if row.shape == CAUSAL.name and row.passes == name and "native" in row.share_of_peak
        ]
        measured, length = min(shares, default=(None, None))
        at = f", lowest at {length:,} tokens" if length else ""
        yield Promise(f"native, causal, {name}{at}", "matrix product", measured, accept, stretch, why="no native")
    yield _odd_promise(content)
    for length, (accept, stretch) in LRA_SPEED.items():
        row = _time_row(rows, LRA.name, length)
        for other, owed, aimed in ((RESEARCH, accept, stretch), (KEPT, LRA_KEPT, None)):
            measured = _speed(row, "native" + LEAP, over=other)
            work = f"native with LeaP, {LRA.name} shape, {WITH_BACKWARD}, {length:,} tokens"
            yield Promise(work, other, measured, owed, aimed, unit=" x", why=_why(row, "native" + LEAP, other))
    yield from _memory_promises(content)
    yield from _long_promises(content)


def decoding_promises(content: Mapping[str, Any]) -> Iterator[Promise]:
    """One step of a layer's attention: over torch's own step, and flat over the context."""
    rows = [row for row in rows_of(content, "steps", StepRow) if "native" in row.contenders]
    speeds = [(_speed(row, "native", over="torch"), row.context) for row in rows]
    slowest, context = min(((speed, at) for speed, at in speeds if speed is not None), default=(None, None))
    at = f", lowest at {context:,} tokens of context" if context else ""
    yield Promise(f"native, one decoding step{at}", "torch step", slowest, STEP_SPEED, unit=" x", why="no native")
    steps = [1e3 * row.contenders["native"].by(content["settings"]["clock"]).median for row in rows]
    longest = f"{rows[0].context:,} to {rows[-1].context:,}" if rows else "1,024 to 1,048,576"
    work = f"native, one decoding step, {longest} tokens: slowest over fastest"
    yield Promise(work, "itself", _flatness(steps), STEP_FLAT, at_most=True, unit=" x", why="no native")
    work, slow = "native, slowest decoding step", max(steps, default=None)
    yield Promise(work, "-", slow, None, STEP_MICROSECONDS, at_most=True, unit=" us", why="no native")


def lra_promises(content: Mapping[str, Any]) -> Iterator[Promise]:
    """LeaPformer's training of the small model: over cosFormer's at every length, over softmax's in both its ways."""
    rows = {row.length: row for row in rows_of(content, "speed", lra.SpeedRow) if row.kind == "training"}
    for length, row in rows.items():
        work, other = f"{lra.LEAP} ({row.impl}), training, {length:,} tokens", lra.COSFORMER
        why, accept = _why(row, lra.LEAP, other), SMALL_MODEL[row.impl]
        yield Promise(work, other, _speed(row, lra.LEAP, over=other), accept, unit=" x", why=why)
    for length, accept in SMALL_MODEL_SOFTMAX.items():
        row = rows.get(length)
        for other in (lra.SOFTMAX, lra.NO_DROPOUT):
            work, why = f"{lra.LEAP}, training, {length:,} tokens", _why(row, lra.LEAP, other)
            yield Promise(work, other, _speed(row, lra.LEAP, over=other), accept, unit=" x", why=why)


def streaming_promises(content: Mapping[str, Any]) -> Iterator[Promise]:
    """One speaker of LeaPformer: real-time factor, flat and low, and a state that does not grow; then many speakers."""
    name = streaming.LEAP
    rows = [row for row in rows_of(content, "lengths", streaming.LengthRow) if name in row.real_time_factor]
    factors = [(row.real_time_factor[name].median, row.seconds) for row in rows]
    lengths = f"{rows[0].seconds} to {rows[-1].seconds} s of audio" if rows else "5 to 600 s of audio"
    work, why = f"{name}, streaming", "not among the lengths"
    told, flat = f"{work}, {lengths}: real-time factor, highest over lowest", _flatness([f for f, _ in factors])
    yield Promise(told, "itself", flat, STREAM_FLAT, at_most=True, unit=" x", why=why)
    slowest, at = max(factors, default=(None, 0))
    highest = f", highest at {at} s" if rows else ""
    yield Promise(f"{work}: real-time factor{highest}", "-", slowest, STREAM_FACTOR, at_most=True, why=why)
    told, grown = f"{work}, {lengths}: bytes of state, most over least", _flatness([r.state_bytes[name] for r in rows])
    yield Promise(told, "itself", grown, 1.0, at_most=True, unit=" x", why=why)
    threads = streaming.SPEAKERS_THREADS
    delays = {
        (row.contender, row.speakers, row.threads): row.delay_ms.p95
        for row in rows_of(content, "speakers", streaming.SpeakersRow)
    }
    told = f"{work}, {SPEAKERS} speakers, {threads} threads: 95 % of the words within"
    why = "--quick" if content["settings"]["quick"] else "fewer speakers are too many here"
    delay = delays.get((name, SPEAKERS, threads))
    yield Promise(told, "-", delay, SPEAKERS_MILLISECONDS, at_most=True, unit=" ms", why=why)


JUDGED: dict[str, Callable[[Mapping[str, Any]], Iterator[Promise]]] = {
    "attention": attention_promises,
    "decoding": decoding_promises,
    "lra": lra_promises,
    "streaming": streaming_promises,
}


def _memory_promises(content: Mapping[str, Any]) -> Iterator[Promise]:
    rows = [row for row in rows_of(content, "memory", MemoryRow) if row.shape == CAUSAL.name]
    for impl, accept in MEMORY.items():
        over = [(row.over_sdpa[impl], row.length) for row in rows if impl in row.over_sdpa]
        measured, length = max(over, default=(None, None))
        at = f", highest at {length:,} tokens" if length else ""
        yield Promise(f"{impl}, memory, causal{at}", SDPA, measured, accept, at_most=True, unit=" x")


def _long_promises(content: Mapping[str, Any]) -> Iterator[Promise]:
    rows = [row for row in rows_of(content, "long", LongRow) if row.impl == "native"]
    measured = [row for row in rows if row.not_run is None]
    last = rows[-1] if rows else None
    whole = last is not None and last.not_run is None
    work, why = "native with LeaP, one sequence of 1,048,576 tokens", "no native, or --quick"
    beyond = last.beyond_gib if last else None
    why = last.not_run if last and last.not_run else why
    told = f"{work}: memory beyond its tensors"
    yield Promise(told, "-", beyond, LONG_GIB, at_most=True, unit=" GiB", why=why)
    kept, fresh = [r.microseconds_a_token_kept for r in measured], [r.microseconds_a_token for r in measured]
    for paces, memory in ((kept, ", memory kept"), (fresh, ", fresh memory")):
        flat = _flatness([pace.median for pace in paces if pace]) if whole and None not in paces else None
        told = f"{work}: time per token from 16,384 on{memory}, slowest over fastest"
        yield Promise(told, "itself", flat, LONG_FLAT, at_most=True, unit=" x", why=why)


def _odd_promise(content: Mapping[str, Any]) -> Promise:
    rates = {row.impl: row.rate_over_aligned for row in rows_of(content, "odd", OddRow)}.get("native", {})
    measured, name = min(((rate.median, name) for name, rate in rates.items()), default=(None, None))
    work = "native, odd shapes" + (f", lowest: {name}" if name else "")
    return Promise(work, "its aligned rate", measured, *ODD, unit=" x", why="no native")


def _flatness(values: Sequence[float]) -> float | None:
    """The largest over the smallest; None with fewer than two."""
    return max(values) / min(values) if len(values) > 1 else None


def _time_row(rows: Sequence[TimeRow], shape: str, length: int) -> TimeRow | None:
    wanted = (shape, length, WITH_BACKWARD)
    return next((row for row in rows if (row.shape, row.length, row.passes) == wanted), None)


def _speed(row: Compared | None, name: str, *, over: str) -> float | None:
    speed = row.speed(name, over=over) if row else None
    return speed.median if speed else None


def _why(row: Compared | None, *names: str) -> str:
    """Why a race has no ratio of these contenders."""
    if row is None:
        return "not among the lengths"
    missing = [name for name in names if name not in row.contenders]
    return "; ".join(f"{name}: {row.not_run[name]}" if name in row.not_run else f"no {name}" for name in missing)


def show_acceptance(results: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Write the table of all promises, and print that of those that were measured."""
    promises = acceptance_table(results)
    write_text(output / "acceptance.md", promises.markdown())
    measured = [row for row in promises.rows if not row[-1].startswith("not measured")]
    missing = len(promises.rows) - len(measured)
    note = (f"{missing} more rows were not measured; {output / 'acceptance.md'} says why.",) if missing else ()
    show_table(replace(promises, rows=measured, notes=note))


def results_in(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What `leapformer bench` left in a folder of what is judged.

    Raises:
        LeapformerError: a file is none of this format, or there is none at all.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name in JUDGED:
        path = folder / f"{name}.json"
        if path.exists():
            found[name] = read_json_object(path)
            if found[name].get("format") != FORMAT:
                raise LeapformerError(f"{path}: expected format {FORMAT}, found {shown(found[name].get('format'))}")
    if not found:
        raise LeapformerError(f"{folder}: expected one of {', '.join(f'{name}.json' for name in JUDGED)}, found none")
    return found


def main(argv: Sequence[str]) -> int:
    """Measure and judge; 0, or 2 for wrong input, or 130 where it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance", description="What is owed, and measured.")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(JUDGED)}; default: all")
    parser.add_argument("--only-table", action="store_true", help="judge what is in the folder; measure nothing")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of all results")
    parser.add_argument("--quick", action="store_true", help="small sizes, which most promises say nothing about")
    parser.add_argument("--lengths", help="as of leapformer bench")
    parser.add_argument("--repeats", type=_count, help="turns of the contenders; default 7")
    parser.add_argument("--threads", type=_count, default=1, help="of PyTorch; default 1")
    parser.add_argument("--limit", type=float, help="seconds that one call may take")
    options = vars(parser.parse_args(argv))
    what, only_table, output = options.pop("what"), options.pop("only_table"), options["output"]
    try:
        if only_table:
            results = results_in(output)
        else:
            results = _measured(what or list(JUDGED), options)
        show_acceptance(results, output)
    except LeapformerError as error:
        print(f"benchmarks.acceptance: {error}", file=sys.stderr)
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    for name, content in results.items():
        print(f"{name}: {machine_line(content)}")
    return 0


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {shown(text)}")
    return int(text)


def _measured(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    unknown = [name for name in names if name not in JUDGED]
    if unknown:
        raise LeapformerError(f"expected {', '.join(JUDGED)}, found {unknown[0]!r}")
    results: dict[str, Mapping[str, Any]] = {}
    for name in names:
        results |= run_bench(name, Asked(**options), others())
    return results


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
