"""`leapformer bench overhead`: which share of a train step and of a decoding step the LeaP modules cost.

The share of the paper's modules is looked at twice: the modules alone, at the model's own sizes, over the step; and the
step's difference to that of cosFormer, which has the same attention with proportions of position, so nothing but the
modules is missing. What running proportions cost is the difference to the same gated model without a re-weighting.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.benchmark import Bench, Benchmark
from leapformer.bench.result import Table
from leapformer.bench.rows import Raced, Spread, rows_of, spread
from leapformer.bench.timing import timer
from leapformer.bench.training import fresh_model, generation_step, random_ids, train_step
from leapformer.models import LeapformerConfig, LeapformerForCausalLM
from leapformer.nn import LeapModule
from leapformer.training.recipes import TrainingSection

LENGTHS = (512, 4096, 16384, 65536)
QUICK_LENGTHS = (512, 1024)
SIZES = {
    "1 M": {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "10 M": {"vocab_size": 8192, "hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 5},
    "100 M": {"vocab_size": 16384, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
QUICK_SIZES = ("1 M",)
PROMPT = 64  # tokens before a decoding step, whose cost does not depend on them
LEAP, COSFORMER, MODULES = "LeaPformer", "cosFormer", "modules alone"
GATED, RUNNING = "linear (gated)", "LeaPformer (gated, running proportions)"
KINDS: dict[str, dict[str, Any]] = {
    LEAP: {"attention": "leap"},
    COSFORMER: {"attention": "cosformer"},
    GATED: {"attention": "linear", "variant": "gated"},
    RUNNING: {"attention": "leap", "variant": "gated", "proportion": "running"},
}
RATE = 50e9  # operations a second, low, to guess beforehand whether a step is too long
STEP, BLOCK, DECODING = "train step", "one block", "decoding step"


@dataclass(frozen=True, kw_only=True)
class ShareRow(Raced):
    """One race, and which share of a LeaPformer's step the LeaP modules take.

    Attributes:
        size: one of SIZES, with so many parameters.
        length: tokens; None for a decoding step, which costs the same after any number of them.
        what: STEP, BLOCK or DECODING, or "nothing".
        modules_alone: over the whole.
        difference: to cosFormer's, over the whole.
        running: what a step with running proportions takes beyond that of the gated model without, over the latter.
    """

    size: str
    parameters: int
    length: int | None
    what: str
    modules_alone: Spread | None = None
    difference: Spread | None = None
    running: Spread | None = None


def measure_overhead(bench: Bench) -> None:
    """Every size by every length with one sequence a step, and a decoding step of every size.

    A train step that would take more than the limit, or more memory than there is, is replaced by forward and backward
    of one of its blocks; without the embedding, the output layer and the optimizer the share there is an upper bound.
    """
    settings = bench.settings
    for size in QUICK_SIZES if settings.quick else SIZES:
        for length in settings.lengths_or(LENGTHS, QUICK_LENGTHS):
            models = _models(size, length)
            free = psutil.virtual_memory().available
            what, runs = _step_or_block(models, length, settings.limit, free)
            row = ShareRow(size=size, parameters=models[LEAP].num_parameters(), length=length, what=what)
            if runs:
                row = _raced(bench, row, runs, f"{size} parameters, {what}, {length:,} tokens")
            else:
                row = replace(row, what="nothing", not_run={"a step or a block": what})
            bench.result.add("shares", row)
            del models, runs
            gc.collect()
        models = _models(size, PROMPT)
        prompt = random_ids(1, PROMPT, vocab_size=models[LEAP].config.vocab_size)
        runs = {name: generation_step(model, prompt) for name, model in models.items()}
        runs[MODULES] = _modules_alone(leap_modules(models[LEAP]), models[LEAP].config, 1, backward=False)
        row = ShareRow(size=size, parameters=models[LEAP].num_parameters(), length=None, what=DECODING)
        bench.result.add("shares", _raced(bench, row, runs, f"{size} parameters, {DECODING}"))


def leap_modules(model: torch.nn.Module) -> list[LeapModule]:
    """The LeaP modules of a model, two for each layer."""
    return [module for module in model.modules() if isinstance(module, LeapModule)]


def _models(size: str, length: int) -> dict[str, LeapformerForCausalLM]:
    """The model of a size with each kind of proportions, and without any."""
    fields: dict[str, Any] = {**SIZES[size], "max_position_embeddings": 2 * length}
    return {name: fresh_model(LeapformerConfig(**fields, **kind)) for name, kind in KINDS.items()}


def _step_or_block(
    models: Mapping[str, LeapformerForCausalLM], length: int, limit: float, free: float
) -> tuple[str, dict[str, Callable[[], object]]]:
    """What is measured at this size: a train step, else a block, else nothing and why."""
    config = models[LEAP].config
    operations = 6 * models[LEAP].num_parameters() * length
    # About 24 activations of the width of the model in every layer, and three of the width of the vocabulary.
    in_block = 4 * length * 24 * config.hidden_size
    in_step = config.num_hidden_layers * in_block + 12 * length * config.vocab_size
    if operations / RATE <= limit and in_step <= 0.6 * free:
        ids = random_ids(1, length, vocab_size=config.vocab_size)
        runs: dict[str, Callable[[], object]] = {
            name: train_step(model, ids, TrainingSection()) for name, model in models.items()
        }
        runs[MODULES] = _modules_alone(leap_modules(models[LEAP]), config, length, backward=True)
        return STEP, runs
    blocks = {name: model.model.blocks[0] for name, model in models.items()}
    block_operations = 6 * sum(p.numel() for p in blocks[LEAP].parameters()) * length
    # A block is let run three times as long: there is nothing smaller to go to.
    if block_operations / RATE > 3 * limit or in_block > 0.6 * free:
        return f"about {block_operations / RATE:.0f} s and {in_block / 2**30:.1f} GiB a block", {}
    runs = {name: _block_step(block, length, config.hidden_size) for name, block in blocks.items()}
    runs[MODULES] = _modules_alone(leap_modules(blocks[LEAP]), config, length, backward=True)
    return BLOCK, runs


def _block_step(block: torch.nn.Module, length: int, width: int) -> Callable[[], object]:
    """Forward and backward of one block on random hidden states [1, T, D], with gradients of input and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, width, generator=generator).requires_grad_()
    cotangent = torch.randn(1, length, width, generator=generator)
    leaves = [x, *block.parameters()]
    positions = torch.arange(length)[None]
    return lambda: torch.autograd.grad(block(x, position_ids=positions)[0], leaves, cotangent)


def _modules_alone(
    modules: list[LeapModule], config: LeapformerConfig, length: int, *, backward: bool
) -> Callable[[], object]:
    """All the LeaP modules given, on random features [1, T, H, K]; with backward, gradients of features and weights."""
    heads = config.num_attention_heads
    size = (1, length, heads, config.hidden_size // heads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*size, generator=generator).relu().requires_grad_(backward)
    cotangent = torch.randn(*size[:3], generator=generator)

    def forward() -> None:
        with torch.no_grad():
            for module in modules:
                module(x)

    def both() -> None:
        for module in modules:
            torch.autograd.grad(module(x), [x, *module.parameters()], cotangent)

    return both if backward else forward


def _raced(bench: Bench, row: ShareRow, runs: Mapping[str, Callable[[], object]], label: str) -> ShareRow:
    """The row with its times, and the shares of a LeaPformer's step, turn by turn."""
    timers = {name: timer(run) for name, run in runs.items()}
    outcome = bench.race(timers, label, limit=3 * bench.settings.limit)
    alone, others = outcome.ratios(MODULES, LEAP, bench.clock), outcome.ratios(COSFORMER, LEAP, bench.clock)
    running = outcome.ratios(RUNNING, GATED, bench.clock)
    return replace(
        row,
        contenders=outcome.times(),
        not_run=outcome.not_run,
        modules_alone=spread(alone) if alone else None,
        difference=spread([1 - ratio for ratio in others]) if others else None,
        running=spread([ratio - 1 for ratio in running]) if running else None,
    )


def overhead_tables(content: Mapping[str, Any]) -> list[Table]:
    """One row for each size and length; the decoding step of a size at any length."""
    clock = content["settings"]["clock"]
    lines, notes = [], []
    for row in rows_of(content, "shares", ShareRow):
        at = "any" if row.length is None else f"{row.length:,}"
        notes += [
            f"Not run: {row.size} parameters at {at} tokens: {n} ({reason})." for n, reason in row.not_run.items()
        ]
        if LEAP not in row.contenders:
            continue
        step = row.contenders[LEAP].by(clock).median
        bound = "<= " if row.what == BLOCK else ""
        cells = [bound + _percent(share) for share in (row.modules_alone, row.difference, row.running)]
        lines.append([row.size, at, row.what, *cells, f"{step:,.1f}"])
    title = "Share of the LeaP modules in a step, median (p20 .. p80); <= where one block stands for the whole"
    columns = [
        "parameters",
        "tokens",
        "of",
        "modules alone",
        "difference to cosFormer",
        "running proportions",
        "ms of a LeaPformer's",
    ]
    notes.append(
        "Running proportions: what they add to the gated model without a re-weighting, as a share of its step."
    )
    return [Table(title, columns, lines, tuple(notes))]


def _percent(share: Spread | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share.median:.1f} % ({100 * share.p20:.1f} .. {100 * share.p80:.1f})"


def overhead_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The modules alone as a share of a train step against length, one line for each size."""
    rows = rows_of(content, "shares", ShareRow)
    lines = []
    for size in SIZES:
        found = [(row.length, row.modules_alone) for row in rows if row.size == size]
        points = [share.times(100).at(length) for length, share in found if length is not None and share is not None]
        if points:
            lines.append(Line(f"{size} parameters", points))
    if any(len(line.points) > 1 for line in lines):
        yield "overhead", lines_over_length(lines, ylabel="% of a train step")


BENCHMARK = Benchmark(measure_overhead, overhead_tables, overhead_pictures)
