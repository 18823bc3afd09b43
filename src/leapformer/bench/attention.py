"""`leapformer bench attention`: time and memory of attention against length, and the rows of the acceptance table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.contenders import (
    CAUSAL,
    LEAP,
    LONG,
    LRA,
    QUADRATIC,
    RESEARCH,
    SDPA,
    Shape,
    build,
    bytes_needed,
    contenders_for,
    cpu_impls,
    useful_flops,
)
from leapformer.bench.result import Result, Say, Settings, Table, ratio_text, short
from leapformer.bench.timing import Race, Timer, fitted_exponent, race, spread, timer
from leapformer.bench.worker import KEEP_MEMORY, Worker

PRODUCT, KEPT = "matrix product", f"{RESEARCH}, memory kept"
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


def measure_attention(settings: Settings, result: Result, say: Say) -> None:
    """Time first, then memory, odd shapes and one long sequence. Every row is written as soon as it is there."""
    for shape in (CAUSAL, LRA):
        seen: dict[tuple[str, bool], tuple[int, float]] = {}
        for length in settings.lengths_or(LENGTHS[shape.name], QUICK_LENGTHS[shape.name]):
            for backward in (False, True):
                result.add("time", _time_row(shape, length, backward, settings, seen, say))
    for shape in (CAUSAL, LRA):
        lengths = settings.lengths_or(LENGTHS[shape.name], QUICK_LENGTHS[shape.name])
        for length in lengths[-1:] if settings.quick else lengths:
            result.add("memory", _memory_row(shape, length, settings, result, say))
    for impl in cpu_impls():
        result.add("odd", _odd_row(impl, settings, say))
    if not settings.quick and settings.lengths is None:
        for impl in cpu_impls():
            for length in LONG_LENGTHS:
                result.add("long", _long_row(impl, length, settings, say))


def _time_row(
    shape: Shape, length: int, backward: bool, settings: Settings, seen: dict[tuple[str, bool], tuple[int, float]], say: Say
) -> dict[str, Any]:  # fmt: skip
    """One race. `seen`: the last length and seconds of each contender and direction, updated."""
    names, not_run = contenders_for(shape)
    expected = {}
    for name in list(names):
        needed, free = bytes_needed(name, shape, length, backward=backward), psutil.virtual_memory().available
        if needed > 0.7 * free:
            not_run[name] = f"about {needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} free"
            names.remove(name)
        elif (name, backward) in seen:
            before, seconds = seen[name, backward]
            expected[name] = seconds * (length / before) ** (2 if name in QUADRATIC and shape.visible != "all" else 1)
    with ExitStack() as stack:
        timers: dict[str, Timer] = {}
        for name in names:
            if expected.get(name, 0.0) <= settings.limit:
                timers[name] = timer(build(name, shape, length, backward=backward))
            else:
                not_run[name] = f"about {expected[name]:.3g} s a call, over the limit of {settings.limit:g} s"
        if shape.leap:
            worker = Worker(
                RESEARCH, shape, length, backward=backward, threads=settings.threads, environment=KEEP_MEMORY
            )
            timers[KEPT] = stack.enter_context(worker).time
        timers[PRODUCT] = timer(_product())
        outcome = race(
            timers,
            repeats=settings.repeats,
            clock=settings.clock,
            limit=settings.limit,
            turn=lambda name: say(f"{shape.name} attention, {length:,} tokens, {PASSES[backward]}: {name}"),
        )
    for name in outcome.samples:
        seen[name, backward] = length, spread(outcome.seconds(name, settings.clock))["median"]
    return {
        "shape": shape.name,
        "length": length,
        "pass": PASSES[backward],
        "contenders": outcome.as_dict(),
        "not_run": {**not_run, **outcome.not_run},
        **_compared(shape, length, backward, outcome, settings.clock),
    }


def _product() -> Any:
    """The machine's own yardstick: one square product of float32 matrices."""
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    return lambda: torch.mm(a, b)


def _compared(shape: Shape, length: int, backward: bool, outcome: Race, clock: str) -> dict[str, Any]:
    """Ratios turn by turn: speed over SDPA and over the research code, share of the matrix product's rate."""
    useful = useful_flops(shape, length, backward=backward)
    ours = [impl + suffix for impl in cpu_impls() for suffix in ("", LEAP)]
    peak = {}
    for name in ours:
        ratios = outcome.ratios(PRODUCT, name, clock)
        if ratios:
            peak[name] = spread([useful / (2 * PRODUCT_SIZE**3) * ratio for ratio in ratios])
    against = {
        other: {name: spread(ratios) for name in outcome.samples if (ratios := outcome.ratios(other, name, clock))}
        for other in (SDPA, RESEARCH, KEPT)
        if other in outcome.samples
    }
    product = spread([2 * PRODUCT_SIZE**3 / seconds / 1e9 for seconds in outcome.seconds(PRODUCT, clock)])
    return {"speed_over": against, "share_of_peak": peak, "product_gflops": product}


def _memory_row(shape: Shape, length: int, settings: Settings, result: Result, say: Say) -> dict[str, Any]:
    """Peak memory of one forward + backward of every contender that was timed at this length."""
    (timed,) = result.rows("time", shape=shape.name, length=length, **{"pass": PASSES[True]})
    found: dict[str, float | None] = {}
    not_run = dict(timed["not_run"])
    for name in timed["contenders"]:
        if name in (PRODUCT, KEPT):
            continue
        say(f"{shape.name} attention, {length:,} tokens, memory: {name}")
        with Worker(name, shape, length, backward=True, threads=settings.threads) as worker:
            try:
                found[name] = worker.memory_mib()
            except RuntimeError as error:
                found[name], not_run[name] = None, str(error)
    over = {name: mib / found[SDPA] for name, mib in found.items() if mib is not None and found.get(SDPA)}  # type: ignore[operator]
    return {"shape": shape.name, "length": length, "memory_mib": found, "over_sdpa": over, "not_run": not_run}


def _odd_row(impl: str, settings: Settings, say: Say) -> dict[str, Any]:
    """Rate per useful operation of odd shapes over that of the aligned one, forward + backward, in one race."""
    shapes = {"aligned": ALIGNED, **RAGGED}
    timers = {name: timer(build(impl, *shape, backward=True)) for name, shape in shapes.items()}
    outcome = race(
        timers, repeats=settings.repeats, clock=settings.clock, turn=lambda name: say(f"{impl}, odd shapes: {name}")
    )
    rates = {}
    for name, (shape, length) in RAGGED.items():
        work = useful_flops(shape, length, backward=True) / useful_flops(*ALIGNED, backward=True)
        rates[name] = spread([work * ratio for ratio in outcome.ratios("aligned", name, settings.clock)])
    return {"impl": impl, "contenders": outcome.as_dict(), "rate_over_aligned": rates}


def _long_row(impl: str, length: int, settings: Settings, say: Say) -> dict[str, Any]:
    """Forward + backward of one long sequence in a process of its own: memory beyond its own tensors, time per token."""
    one = LONG.batch * length * LONG.heads * LONG.width * 4 / 2**30
    free = psutil.virtual_memory().available / 2**30
    row: dict[str, Any] = {"impl": impl, "length": length, "tensor_gib": one}
    if LONG_TENSORS.get(impl, 10) * one > 0.8 * free:
        return {**row, "not_run": f"not enough memory: {free:.0f} GiB free"}
    say(f"{impl}, one sequence of {length:,} tokens")
    try:
        with Worker(impl + LEAP, LONG, length, backward=True, threads=settings.threads) as worker:
            memory = worker.memory_mib()
            fresh = _paces(worker, length, settings)
        with Worker(
            impl + LEAP, LONG, length, backward=True, threads=settings.threads, environment=KEEP_MEMORY
        ) as worker:
            worker.time(1)  # what this call is given, the next ones are given again
            kept = _paces(worker, length, settings)
    except RuntimeError as error:
        return {**row, "not_run": str(error)}
    beyond = None if memory is None else memory / 1024 - 4 * one  # out and three gradients are the result
    return {**row, "beyond_gib": beyond, "microseconds_a_token": fresh, "microseconds_a_token_kept": kept}


def _paces(worker: Worker, length: int, settings: Settings) -> dict[str, float]:
    """Spread of microseconds a token over some calls, about a million tokens in all and at least three."""
    calls = min(25, max(3, 2**20 // length))
    return spread([1e6 * getattr(worker.time(1), settings.clock) / length for _ in range(calls)])


def attention_tables(content: Mapping[str, Any]) -> list[Table]:
    """Ratios first, then milliseconds, memory, the fitted exponents, odd shapes and the long sequence."""
    tables = []
    for shape in (CAUSAL, LRA):
        tables += [_ratios(content, shape), _milliseconds(content, shape), _memory(content, shape)]
    return [*tables, _exponents(content), _odd(content), _long(content)]


def _rows(content: Mapping[str, Any], section: str, shape: Shape) -> list[dict[str, Any]]:
    return [row for row in content.get(section, []) if row["shape"] == shape.name]


def _names(rows: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in (*row[key], *row["not_run"])))


def _ratios(content: Mapping[str, Any], shape: Shape) -> Table:
    rows = _rows(content, "time", shape)
    names = [name for name in _names(rows, "contenders") if name not in (PRODUCT, SDPA, KEPT)]
    lines = []
    for row in rows:
        over = row["speed_over"].get(SDPA, {})
        cells = [f"**{ratio_text(over[name])}**" if name in over else "not run" for name in names]
        lines.append([f"{row['length']:,}", row["pass"], *cells])
    title = f"{shape.name} attention, {_shape_text(shape)}: how many times as fast as SDPA, median (p20 .. p80)"
    return Table(title, ["tokens", "pass", *names], lines, _not_run_notes(rows))


def _milliseconds(content: Mapping[str, Any], shape: Shape) -> Table:
    rows, clock = _rows(content, "time", shape), content["settings"]["clock"]
    names = [name for name in _names(rows, "contenders") if name != PRODUCT]
    lines = []
    for row in rows:
        cells = []
        for name in names:
            times = row["contenders"].get(name)
            share = row["share_of_peak"].get(name)
            peak = f", {share['median']:.0%}" if share else ""
            cells.append(f"{ratio_text(times[f'{clock}_ms'])}{peak}" if times else "not run")
        lines.append([f"{row['length']:,}", row["pass"], *cells, f"{row['product_gflops']['median']:.0f}"])
    title = f"{shape.name} attention: milliseconds, and share of the matrix product's rate"
    return Table(title, ["tokens", "pass", *names, "matrix product, GFLOP/s"], lines)


def _memory(content: Mapping[str, Any], shape: Shape) -> Table:
    rows = _rows(content, "memory", shape)
    names = _names(rows, "memory_mib")
    lines = []
    for row in rows:
        cells = []
        for name in names:
            mib, over = row["memory_mib"].get(name), row["over_sdpa"].get(name)
            cells.append("not run" if mib is None else short(mib) + (f" ({over:.2f})" if over else ""))
        lines.append([f"{row['length']:,}", *cells])
    title = f"{shape.name} attention: MiB at the peak of a forward + backward, gradients included (in SDPA's)"
    return Table(title, ["tokens", *names], lines, _not_run_notes(rows))


def _exponents(content: Mapping[str, Any]) -> Table:
    lines = []
    for shape in (CAUSAL, LRA):
        for name in _names(_rows(content, "time", shape), "contenders"):
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
    """Lengths and costs of a contender: milliseconds of a pass, or MiB; fitted from 1,024 tokens on where there are two."""
    pairs = [(length, cost) for length, cost, *_ in _points(content, shape, name, what)]
    long_ones = [pair for pair in pairs if pair[0] >= 1024]
    pairs = long_ones if len(long_ones) > 1 else pairs
    return [length for length, _ in pairs], [cost for _, cost in pairs]


def _odd(content: Mapping[str, Any]) -> Table:
    rows = content.get("odd", [])
    lines = [[row["impl"], *(ratio_text(row["rate_over_aligned"][name]) for name in RAGGED)] for row in rows]
    title = "Odd shapes: rate per useful operation over that of N = 1,024, K = V = 64 (causal, forward + backward)"
    return Table(title, ["contender", *RAGGED], lines)


def _long(content: Mapping[str, Any]) -> Table:
    lines = []
    for row in content.get("long", []):
        if "not_run" in row:
            cells = ["not run: " + row["not_run"], "-", "-"]
        else:
            beyond = "-" if row["beyond_gib"] is None else f"{row['beyond_gib']:.2f}"
            cells = [beyond, ratio_text(row["microseconds_a_token"]), ratio_text(row["microseconds_a_token_kept"])]
        lines.append([row["impl"] + LEAP, f"{row['length']:,}", f"{row['tensor_gib']:.2f}", *cells])
    title = f"One long causal sequence, {_shape_text(LONG)}, forward + backward"
    columns = [
        "contender", "tokens", "GiB of one tensor", "GiB beyond results and inputs", "microseconds a token",
        "the same, memory kept",
    ]  # fmt: skip
    return Table(title, columns, lines)


def _shape_text(shape: Shape) -> str:
    return f"B {shape.batch}, H {shape.heads}, K = V = {shape.width}"


def _not_run_notes(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(
        f"Not run at {row['length']:,}, {row.get('pass', 'memory')}: {name} ({reason})."
        for row in rows
        for name, reason in row["not_run"].items()
    )


def attention_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Time and memory against length, both axes logarithmic, one pair for each shape."""
    clock = "CPU time" if content["settings"]["clock"] == "cpu" else "wall time"
    for shape in (CAUSAL, LRA):
        for what, label in ((PASSES[True], f"ms of {clock}, forward + backward"), ("memory", "MiB at the peak")):
            lines = []
            for name in _names(_rows(content, "time", shape), "contenders"):
                points = _points(content, shape, name, what)
                if points and name not in (PRODUCT, KEPT):
                    lines.append(Line(name, points))
            if any(len(line.points) > 1 for line in lines):
                word = "memory" if what == "memory" else "time"
                yield f"attention-{shape.name.lower()}-{word}", lines_over_length(lines, ylabel=label)


def _points(content: Mapping[str, Any], shape: Shape, name: str, what: str) -> list[tuple[float, float, float, float]]:
    """(length, median, p20, p80) of a contender."""
    clock = content["settings"]["clock"]
    if what == "memory":
        rows = [(row["length"], row["memory_mib"].get(name)) for row in _rows(content, "memory", shape)]
        return [(length, mib, mib, mib) for length, mib in rows if mib]
    points = []
    for row in _rows(content, "time", shape):
        if row["pass"] == what and name in row["contenders"]:
            times = row["contenders"][name][f"{clock}_ms"]
            points.append((row["length"], times["median"], times["p20"], times["p80"]))
    return points


__all__ = ["attention_pictures", "attention_tables", "measure_attention"]
