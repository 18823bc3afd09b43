"""`leapformer bench decoding`: one token of one layer's attention, by the length of what came before it.

Letters: B batch, H heads, K key and value width, S tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.benchmark import Bench, Benchmark
from leapformer.bench.contenders import SDPA, cpu_impls
from leapformer.bench.result import Table, ratio_text, short
from leapformer.bench.rows import Compared, not_run_notes, rows_of
from leapformer.bench.timing import fitted_exponent, timer
from leapformer.ops import LeapWeights, LinearState, cosine_factors, leap_attention, linear_state, proportion

B, H, K, HIDDEN = 1, 8, 64, 16
CONTEXTS = (1024, 4096, 16384, 65536, 262144, 1048576)
QUICK_CONTEXTS = (1024, 8192, 65536)
PIECE = 16384  # tokens that a state takes up at once
CACHED = f"{SDPA} with a cache"


@dataclass(frozen=True, kw_only=True)
class StepRow(Compared):
    """One race after so many tokens of context, and what is kept of them: by our state, and by SDPA's cache."""

    context: int
    state_kib: float
    cache_kib: float


class Token(NamedTuple):
    """Query, key and value of one token, [B, 1, H, K] each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def measure_decoding(bench: Bench) -> None:
    """One race for each context. Ours start from a state that has taken up as many tokens as SDPA's cache holds."""
    generator = torch.Generator().manual_seed(0)
    weights = [_leap_weights(generator) for _ in range(2)]
    state, taken = None, 0
    for context in bench.settings.lengths_or(CONTEXTS, QUICK_CONTEXTS):
        bench.say(f"decoding, {context:,} tokens of context: reading them")
        while taken < context:
            piece = min(PIECE, context - taken)
            state, taken = _take_up(state, weights[1], piece, generator), taken + piece
        assert state is not None
        token = Token(*(torch.randn(B, 1, H, K, generator=generator) for _ in range(3)))
        bench.result.add("steps", _step_row(bench, context, token, weights, state))


def _step_row(bench: Bench, context: int, token: Token, weights: list[LeapWeights], state: LinearState) -> StepRow:
    runs = {impl: _our_step(impl, token, weights, state) for impl in cpu_impls()}
    not_run = {}
    needed, free = 2 * B * H * K * context * 4, psutil.virtual_memory().available
    if needed > 0.6 * free:
        not_run[CACHED] = f"a cache of {needed / 2**30:.1f} GiB, {free / 2**30:.1f} free"
    else:
        runs[CACHED] = _sdpa_step(token, context)
    timers = {name: timer(run) for name, run in runs.items()}
    outcome = bench.race(timers, f"decoding, {context:,} tokens of context")
    return StepRow(
        context=context,
        contenders=outcome.times(),
        not_run={**not_run, **outcome.not_run},
        speed_over=outcome.speed_over([CACHED, "torch"], bench.clock),
        state_kib=sum(x.numel() * x.element_size() for x in (state.kv, state.z)) / 2**10,
        cache_kib=needed / 2**10,
    )


def _our_step(impl: str, token: Token, weights: list[LeapWeights], state: LinearState) -> Callable[[], object]:
    """LeaP modules, read-out and new state of one token, from the projections on; the state is updated in place."""
    own = state.clone()
    keywords: dict[str, Any] = {"visible": "causal", "initial_state": own, "update_state": True, "impl": impl}

    def step() -> object:
        with torch.no_grad():
            return leap_attention(*token, *weights, **keywords)

    return step


def _sdpa_step(token: Token, context: int) -> Callable[[], object]:
    """The new key and value go into the last place of a cache that is there already, so nothing is copied."""
    keys, values = torch.randn(2, B, H, context, K)
    query, key, value = (x.transpose(1, 2) for x in token)

    def step() -> object:
        with torch.no_grad():
            keys[:, :, -1:], values[:, :, -1:] = key, value
            return F.scaled_dot_product_attention(query, keys, values)

    return step


def _take_up(state: LinearState | None, weights: LeapWeights, tokens: int, generator: torch.Generator) -> LinearState:
    k, v = torch.randn(2, B, tokens, H, K, generator=generator)
    with torch.no_grad():
        keys = k.relu()
        return linear_state(keys, v, cosine_factors(proportion(keys, weights)), initial_state=state)


def _leap_weights(generator: torch.Generator) -> LeapWeights:
    sizes = ((1, HIDDEN, K), (1, HIDDEN), (1, HIDDEN), (1,))
    return LeapWeights(*(torch.randn(*size, generator=generator) / K**0.5 for size in sizes))


def decoding_tables(content: Mapping[str, Any]) -> list[Table]:
    """How many times as fast as the cache, microseconds, and what is kept; the fitted exponents."""
    rows, clock = rows_of(content, "steps", StepRow), content["settings"]["clock"]
    names = _names(rows)
    ours = [name for name in names if name != CACHED]
    lines = []
    for row in rows:
        speeds = [row.speed(name, over=CACHED) for name in ours]
        cells = [f"**{ratio_text(speed)}**" if speed else "-" for speed in speeds]
        times = [_microseconds(row, name, clock) for name in names]
        lines.append([f"{row.context:,}", *cells, *times, short(row.state_kib), short(row.cache_kib)])
    speed_columns, time_columns = [f"{name}: x {CACHED}" for name in ours], [f"{name}, us" for name in names]
    columns = ["context", *speed_columns, *time_columns, "state, KiB", "cache, KiB"]
    notes = not_run_notes((f"{row.context:,}", row.not_run) for row in rows)
    title = f"One decoding step of a layer's attention, LeaP modules included, B {B}, H {H}, K = V = {K}"
    exponents = []
    for name in names:
        points = _points(rows, name, clock)
        exponent = fitted_exponent([point[0] for point in points], [point[1] for point in points])
        exponents.append([name, "-" if exponent is None else f"{exponent:.2f}"])
    return [
        Table(title, columns, lines, notes),
        Table("Fitted exponent b of time = a x context^b", ["contender", "b"], exponents),
    ]


def decoding_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Microseconds of a step against the context, both axes logarithmic."""
    rows, clock = rows_of(content, "steps", StepRow), content["settings"]["clock"]
    lines = [Line(name, _points(rows, name, clock)) for name in _names(rows)]
    if any(len(line.points) > 1 for line in lines):
        yield "decoding", lines_over_length(lines, xlabel="tokens of context", ylabel="µs of one step")


def _names(rows: list[StepRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.contenders))


def _microseconds(row: StepRow, name: str, clock: str) -> str:
    return ratio_text(row.contenders[name].by(clock).times(1e3)) if name in row.contenders else "not run"


def _points(rows: list[StepRow], name: str, clock: str) -> list[tuple[float, float, float, float]]:
    found = [row for row in rows if name in row.contenders]
    return [row.contenders[name].by(clock).times(1e3).at(row.context) for row in found]


BENCHMARK = Benchmark(measure_decoding, decoding_tables, decoding_pictures)
