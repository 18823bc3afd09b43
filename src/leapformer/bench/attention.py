"""`leapformer bench attention`: time and memory of attention against length, odd shapes, and one long sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.benchmark import Bench, Benchmark
from leapformer.bench.contenders import (
    CAUSAL,
    FORMS,
    LEAP,
    LONG,
    LRA,
    MEMORY_KEPT,
    PLAIN,
    SDPA,
    Contender,
    Shape,
    contender,
    contenders_for,
    cpu_impls,
    form,
    useful_flops,
)
from leapformer.bench.result import Table, ratio_text, short
from leapformer.bench.rows import KEY, Compared, Raced, Spread, names_of, not_run_notes, rows_of, spread
from leapformer.bench.timing import Race, Timer, fitted_exponent, timer
from leapformer.bench.worker import KEEP_MEMORY, Worker

PRODUCT = "matrix product"
PRODUCT_SIZE = 1024
PASSES = {False: "forward", True: "forward + backward"}
LENGTHS = {CAUSAL.name: (512, 1024, 2048, 4096, 8192, 16384), LRA.name: (1024, 4096)}
QUICK_LENGTHS = {CAUSAL.name: (512, 2048), LRA.name: (256, 1024)}
LONG_LENGTHS = (16384, 131072, 1048576)
LONG_TENSORS = {"torch": 18}  # of the size of q that a call may hold, its inputs and results (8) included; others: 10
ALIGNED = (CAUSAL, 1024)
RAGGED = {
    "N = 1000, K = V = 48": (replace(CAUSAL, width=48), 1000),
    "a key mask": (replace(CAUSAL, masked=True), 1024),
    "grouped heads, 8 on 2": (replace(CAUSAL, groups=2), 1024),
    "wait-k": (replace(CAUSAL, visible="wait-k"), 1024),
}

Seen = dict[tuple[str, bool], tuple[int, float]]  # the last length and seconds of a contender, by direction


@dataclass(frozen=True, kw_only=True)
class TimeRow(Compared):
    """One race of one shape and length.

    Attributes:
        passes: one of PASSES.
        share_of_peak: useful operations a second of ours over those of the matrix product.
        product_gflops: of the matrix product.
    """

    shape: str
    length: int
    passes: str = field(metadata={KEY: "pass"})
    share_of_peak: dict[str, Spread]
    product_gflops: Spread


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """MiB at the peak of one forward + backward of each contender, gradients included, and in those of SDPA."""

    shape: str
    length: int
    memory_mib: dict[str, float | None]
    over_sdpa: dict[str, float]
    not_run: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OddRow(Raced):
    """Rates per useful operation of odd shapes, which are the contenders, over that of the aligned one."""

    impl: str
    rate_over_aligned: dict[str, Spread]


@dataclass(frozen=True, kw_only=True)
class FormRow(Raced):
    """Forms of attention, which are the contenders, in times of the plain one: forward + backward, as in ALIGNED."""

    impl: str
    time_over_plain: dict[str, Spread]


@dataclass(frozen=True, kw_only=True)
class LongRow:
    """Forward + backward of one long sequence, or why it was not run.

    Attributes:
        tensor_gib: of one of its inputs.
        beyond_gib: at the peak, beyond inputs and results; None where the system does not tell.
        microseconds_a_token: with memory that is fresh, and with memory that is kept.
    """

    impl: str
    length: int
    tensor_gib: float
    not_run: str | None = None
    beyond_gib: float | None = None
    microseconds_a_token: Spread | None = None
    microseconds_a_token_kept: Spread | None = None


def measure_attention(bench: Bench) -> None:
    """Time first, then memory, odd shapes, forms and one long sequence. Every row is written as soon as it is there."""
    settings, timed = bench.settings, []
    for shape in (CAUSAL, LRA):
        seen: Seen = {}
        for length in settings.lengths_or(LENGTHS[shape.name], QUICK_LENGTHS[shape.name]):
            for backward in (False, True):
                row = _time_row(bench, shape, length, backward, seen)
                bench.result.add("time", row)
            timed.append((shape, row))
    for shape in (CAUSAL, LRA):
        rows = [row for its_shape, row in timed if its_shape == shape]
        for row in rows[-1:] if settings.quick else rows:
            bench.result.add("memory", _memory_row(bench, shape, row))
    for impl in cpu_impls():
        bench.result.add("odd", _odd_row(bench, impl))
    for impl in cpu_impls():
        bench.result.add("forms", _form_row(bench, impl))
    if not settings.quick and settings.lengths is None:
        for impl in cpu_impls():
            for length in LONG_LENGTHS:
                bench.result.add("long", _long_row(bench, impl, length))


def _time_row(bench: Bench, shape: Shape, length: int, backward: bool, seen: Seen) -> TimeRow:
    """One race. `seen` is updated."""
    timers: dict[str, Timer] = {}
    not_run = {}
    everyone = [*contenders_for(shape), *bench.others]
    with ExitStack() as stack:
        for each in everyone:
            reason = each.why_not or _too_much(each, shape, length, backward)
            reason = reason or _too_slow(each, shape, length, seen.get((each.name, backward)), bench.settings.limit)
            if reason:
                not_run[each.name] = reason
            else:
                timers[each.name] = timer(each.call(shape, length, backward=backward))
        for each in everyone:
            if shape.leap and each.memory_kept:
                worker = _worker(bench, each, shape, length, backward=backward, environment=KEEP_MEMORY)
                timers[each.name + MEMORY_KEPT] = stack.enter_context(worker).time
        timers[PRODUCT] = timer(_product())
        outcome = bench.race(timers, f"{shape.name} attention, {length:,} tokens, {PASSES[backward]}")
    for name in outcome.samples:
        seen[name, backward] = length, spread(outcome.seconds(name, bench.clock)).median
    return TimeRow(
        shape=shape.name,
        length=length,
        passes=PASSES[backward],
        contenders=outcome.times(),
        not_run={**not_run, **outcome.not_run},
        speed_over=outcome.speed_over([SDPA, *_names_of_others(bench)], bench.clock),
        share_of_peak=_shares(outcome, useful_flops(shape, length, backward=backward), bench.clock),
        product_gflops=spread([2 * PRODUCT_SIZE**3 / s / 1e9 for s in outcome.seconds(PRODUCT, bench.clock)]),
    )


def _names_of_others(bench: Bench) -> Iterator[str]:
    for each in bench.others:
        yield each.name
        if each.memory_kept:
            yield each.name + MEMORY_KEPT


def _too_much(each: Contender, shape: Shape, length: int, backward: bool) -> str:
    """Why there is not the memory for a call; empty where there is."""
    needed, free = each.bytes_needed(shape, length, backward=backward), psutil.virtual_memory().available
    return f"about {needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} free" if needed > 0.7 * free else ""


def _too_slow(each: Contender, shape: Shape, length: int, seen: tuple[int, float] | None, limit: float) -> str:
    """Why a call is expected to take too long, by the length and seconds of an earlier one; empty where it is not."""
    if seen is None:
        return ""
    before, seconds = seen
    guess = seconds * (length / before) ** (2 if each.quadratic and shape.visible != "all" else 1)
    return f"about {guess:.3g} s a call, over the limit of {limit:g} s" if guess > limit else ""


def _product() -> Any:
    """The machine's own yardstick: one square product of float32 matrices."""
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    return lambda: torch.mm(a, b)


def _shares(outcome: Race, useful: float, clock: str) -> dict[str, Spread]:
    """Of each of ours, useful operations a second over those of the matrix product, turn by turn."""
    ours = [impl + suffix for impl in cpu_impls() for suffix in ("", LEAP)]
    ratios = {name: outcome.ratios(PRODUCT, name, clock) for name in ours}
    return {
        name: spread([useful / (2 * PRODUCT_SIZE**3) * ratio for ratio in values])
        for name, values in ratios.items()
        if values
    }


def _worker(bench: Bench, each: Contender, shape: Shape, length: int, **rest: Any) -> Worker:
    return Worker(each, shape, length, threads=bench.settings.threads, **rest)


def _memory_row(bench: Bench, shape: Shape, timed: TimeRow) -> MemoryRow:
    """Peak memory of one forward + backward of every contender that was timed at this length."""
    found: dict[str, float | None] = {}
    not_run = dict(timed.not_run)
    for each in (*contenders_for(shape), *bench.others):
        if each.name not in timed.contenders:
            continue
        bench.say(f"{shape.name} attention, {timed.length:,} tokens, memory: {each.name}")
        with _worker(bench, each, shape, timed.length, backward=True) as worker:
            try:
                found[each.name] = worker.memory_mib()
            except RuntimeError as error:
                found[each.name], not_run[each.name] = None, str(error)
    least = found.get(SDPA)
    over = {name: mib / least for name, mib in found.items() if mib is not None and least}
    return MemoryRow(shape=shape.name, length=timed.length, memory_mib=found, over_sdpa=over, not_run=not_run)


def _odd_row(bench: Bench, impl: str) -> OddRow:
    """Rate per useful operation of odd shapes over that of the aligned one, forward + backward, in one race."""
    each, shapes = contender(impl), {"aligned": ALIGNED, **RAGGED}
    timers = {name: timer(each.call(*shape, backward=True)) for name, shape in shapes.items()}
    outcome = bench.race(timers, f"{impl}, odd shapes", limit=math.inf)
    rates = {}
    for name, (shape, length) in RAGGED.items():
        work = useful_flops(shape, length, backward=True) / useful_flops(*ALIGNED, backward=True)
        rates[name] = spread([work * ratio for ratio in outcome.ratios("aligned", name, bench.clock)])
    return OddRow(impl=impl, contenders=outcome.times(), rate_over_aligned=rates)


def _form_row(bench: Bench, impl: str) -> FormRow:
    """What angles, factors and decays cost over plain causal attention, in one race."""
    timers, refused = {}, {}
    for name in FORMS:
        call = form(impl, name).call(*ALIGNED, backward=True)
        try:
            call()
        except ValueError as error:  # it does not take an argument
            refused[name] = f"refused: {error}"
        else:
            timers[name] = timer(call)
    outcome = bench.race(timers, f"{impl}, forms", limit=math.inf)
    ratios = {name: outcome.ratios(name, PLAIN, bench.clock) for name in timers if name != PLAIN}
    over = {name: spread(values) for name, values in ratios.items() if values}
    return FormRow(impl=impl, contenders=outcome.times(), not_run={**refused, **outcome.not_run}, time_over_plain=over)


def _long_row(bench: Bench, impl: str, length: int) -> LongRow:
    """One long sequence in a process of its own: memory beyond its own tensors, time per token."""
    one = LONG.batch * length * LONG.heads * LONG.width * 4 / 2**30
    free = psutil.virtual_memory().available / 2**30
    row = LongRow(impl=impl, length=length, tensor_gib=one)
    if LONG_TENSORS.get(impl, 10) * one > 0.8 * free:
        return replace(row, not_run=f"not enough memory: {free:.0f} GiB free")
    bench.say(f"{impl}, one sequence of {length:,} tokens")
    each = contender(impl + LEAP)
    try:
        with _worker(bench, each, LONG, length, backward=True) as worker:
            memory = worker.memory_mib()
            fresh = _paces(worker, length, bench.clock)
        with _worker(bench, each, LONG, length, backward=True, environment=KEEP_MEMORY) as worker:
            worker.time(1)  # what this call is given, the next ones are given again
            kept = _paces(worker, length, bench.clock)
    except RuntimeError as error:
        return replace(row, not_run=str(error))
    beyond = None if memory is None else memory / 1024 - 4 * one  # out and three gradients are the result
    return replace(row, beyond_gib=beyond, microseconds_a_token=fresh, microseconds_a_token_kept=kept)


def _paces(worker: Worker, length: int, clock: str) -> Spread:
    """Spread of microseconds a token over some calls, about a million tokens in all and at least three."""
    calls = min(25, max(3, 2**20 // length))
    return spread([1e6 * getattr(worker.time(1), clock) / length for _ in range(calls)])


def attention_tables(content: Mapping[str, Any]) -> list[Table]:
    """Ratios first, then milliseconds, memory, the fitted exponents, odd shapes, forms and the long sequence."""
    tables = []
    for shape in (CAUSAL, LRA):
        tables += [_ratios(content, shape), _milliseconds(content, shape), _memory(content, shape)]
    return [*tables, _exponents(content), _odd(content), _forms(content), _long(content)]


def _time_rows(content: Mapping[str, Any], shape: Shape) -> list[TimeRow]:
    return [row for row in rows_of(content, "time", TimeRow) if row.shape == shape.name]


def _memory_rows(content: Mapping[str, Any], shape: Shape) -> list[MemoryRow]:
    return [row for row in rows_of(content, "memory", MemoryRow) if row.shape == shape.name]


def _ratios(content: Mapping[str, Any], shape: Shape) -> Table:
    rows = _time_rows(content, shape)
    names = [name for name in names_of(rows) if name not in (PRODUCT, SDPA) and not name.endswith(MEMORY_KEPT)]
    lines = []
    for row in rows:
        speeds = [row.speed(name, over=SDPA) for name in names]
        cells = [f"**{ratio_text(speed)}**" if speed else "not run" for speed in speeds]
        lines.append([f"{row.length:,}", row.passes, *cells])
    title = f"{shape.name} attention, {_shape_text(shape)}: how many times as fast as SDPA, median (p20 .. p80)"
    return Table(title, ["tokens", "pass", *names], lines, _time_notes(rows))


def _milliseconds(content: Mapping[str, Any], shape: Shape) -> Table:
    rows, clock = _time_rows(content, shape), content["settings"]["clock"]
    names = [name for name in names_of(rows) if name != PRODUCT]
    lines = []
    for row in rows:
        cells = []
        for name in names:
            times, share = row.contenders.get(name), row.share_of_peak.get(name)
            peak = f", {share.median:.0%}" if share else ""
            cells.append(f"{ratio_text(times.by(clock))}{peak}" if times else "not run")
        lines.append([f"{row.length:,}", row.passes, *cells, f"{row.product_gflops.median:.0f}"])
    title = f"{shape.name} attention: milliseconds, and share of the matrix product's rate"
    return Table(title, ["tokens", "pass", *names, "matrix product, GFLOP/s"], lines)


def _memory(content: Mapping[str, Any], shape: Shape) -> Table:
    rows = _memory_rows(content, shape)
    names = list(dict.fromkeys(name for row in rows for name in (*row.memory_mib, *row.not_run)))
    lines = []
    for row in rows:
        cells = []
        for name in names:
            mib, over = row.memory_mib.get(name), row.over_sdpa.get(name)
            cells.append("not run" if mib is None else short(mib) + (f" ({over:.2f})" if over else ""))
        lines.append([f"{row.length:,}", *cells])
    title = f"{shape.name} attention: MiB at the peak of a forward + backward, gradients included (in SDPA's)"
    notes = not_run_notes((f"{row.length:,}, memory", row.not_run) for row in rows)
    return Table(title, ["tokens", *names], lines, notes)


def _exponents(content: Mapping[str, Any]) -> Table:
    lines = []
    for shape in (CAUSAL, LRA):
        for name in names_of(_time_rows(content, shape)):
            if name == PRODUCT:
                continue
            cells = []
            for what in (*PASSES.values(), "memory"):
                lengths, costs = _curve(content, shape, name, what)
                exponent = fitted_exponent(lengths, costs)
                cells.append("-" if exponent is None else f"{exponent:.2f}")
            lengths = _curve(content, shape, name, PASSES[False])[0]
            lines.append([shape.name, name, *cells, f"{lengths[0]:,.0f} .. {lengths[-1]:,.0f}" if lengths else "-"])
    title = "Fitted exponent b of cost = a x length^b"
    return Table(title, ["attention", "contender", *PASSES.values(), "memory", "over tokens"], lines)


def _curve(content: Mapping[str, Any], shape: Shape, name: str, what: str) -> tuple[list[float], list[float]]:
    """Lengths and costs of a contender: milliseconds of a pass, or MiB; from 1,024 tokens on where there are two."""
    pairs = [(length, cost) for length, cost, *_ in _points(content, shape, name, what)]
    long_ones = [pair for pair in pairs if pair[0] >= 1024]
    pairs = long_ones if len(long_ones) > 1 else pairs
    return [length for length, _ in pairs], [cost for _, cost in pairs]


def _odd(content: Mapping[str, Any]) -> Table:
    rows = rows_of(content, "odd", OddRow)
    lines = [[row.impl, *(ratio_text(row.rate_over_aligned[name]) for name in RAGGED)] for row in rows]
    title = "Odd shapes: rate per useful operation over that of N = 1,024, K = V = 64 (causal, forward + backward)"
    return Table(title, ["contender", *RAGGED], lines)


def _forms(content: Mapping[str, Any]) -> Table:
    rows, names = rows_of(content, "forms", FormRow), [name for name in FORMS if name != PLAIN]
    lines = []
    for row in rows:
        found = [row.time_over_plain.get(name) for name in names]
        cells = [ratio_text(times) if times else "refused" if name in row.not_run else "-"
                 for name, times in zip(names, found, strict=True)]  # fmt: skip
        lines.append([row.impl, *cells])
    title = "Forms: time over that of plain causal attention, N = 1,024, K = V = 64 (forward + backward)"
    return Table(title, ["contender", *names], lines, not_run_notes((row.impl, row.not_run) for row in rows))


def _long(content: Mapping[str, Any]) -> Table:
    lines = []
    for row in rows_of(content, "long", LongRow):
        if row.not_run is not None:
            cells = ["not run: " + row.not_run, "-", "-"]
        else:
            beyond = "-" if row.beyond_gib is None else f"{row.beyond_gib:.2f}"
            cells = [beyond, ratio_text(row.microseconds_a_token), ratio_text(row.microseconds_a_token_kept)]
        lines.append([row.impl + LEAP, f"{row.length:,}", f"{row.tensor_gib:.2f}", *cells])
    title = f"One long causal sequence, {_shape_text(LONG)}, forward + backward"
    sizes = ["contender", "tokens", "GiB of one tensor", "GiB beyond results and inputs"]
    return Table(title, [*sizes, "microseconds a token", "the same, memory kept"], lines)


def _shape_text(shape: Shape) -> str:
    return f"B {shape.batch}, H {shape.heads}, K = V = {shape.width}"


def _time_notes(rows: Sequence[TimeRow]) -> tuple[str, ...]:
    return not_run_notes((f"{row.length:,}, {row.passes}", row.not_run) for row in rows)


def attention_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Time and memory against length, both axes logarithmic, one pair for each shape."""
    clock = "CPU time" if content["settings"]["clock"] == "cpu" else "wall time"
    for shape in (CAUSAL, LRA):
        for what, label in ((PASSES[True], f"ms of {clock}, forward + backward"), ("memory", "MiB at the peak")):
            lines = []
            for name in names_of(_time_rows(content, shape)):
                points = _points(content, shape, name, what)
                if points and name != PRODUCT and not name.endswith(MEMORY_KEPT):
                    lines.append(Line(name, points))
            if any(len(line.points) > 1 for line in lines):
                word = "memory" if what == "memory" else "time"
                yield f"attention-{shape.name.lower()}-{word}", lines_over_length(lines, ylabel=label)


def _points(content: Mapping[str, Any], shape: Shape, name: str, what: str) -> list[tuple[float, float, float, float]]:
    """(length, median, p20, p80) of a contender."""
    if what == "memory":
        found = [(row.length, row.memory_mib.get(name)) for row in _memory_rows(content, shape)]
        return [(length, mib, mib, mib) for length, mib in found if mib]
    rows = [row for row in _time_rows(content, shape) if row.passes == what and name in row.contenders]
    return [row.contenders[name].by(content["settings"]["clock"]).at(row.length) for row in rows]


BENCHMARK = Benchmark(measure_attention, attention_tables, attention_pictures)
