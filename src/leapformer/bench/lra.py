"""`leapformer bench lra`: the small model of the Long-Range Arena with every mechanism: examples a second, and memory.

Nothing is read: the tokens are random, without padding. A train step is forward, backward, clip and update with the
model's dropout; inference is a forward pass without gradients. Peak memory is that of a step in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure

from leapformer.analysis.plots import ranked
from leapformer.analysis.runs import ATTENTION_NAMES
from leapformer.bench.benchmark import Bench, Benchmark
from leapformer.bench.result import Table, ratio_text, short
from leapformer.bench.rows import Compared, Spread, not_run_notes, rows_of
from leapformer.bench.timing import timer
from leapformer.bench.training import random_ids, train_step
from leapformer.bench.worker import call_memory_mib, end_me_first, how_it_ended
from leapformer.models import LeapformerConfig, LeapformerForSequenceClassification
from leapformer.nn import REGISTRY
from leapformer.training.recipes import TrainingSection

SOFTMAX, COSFORMER, LEAP = (ATTENTION_NAMES[kind] for kind in ("softmax", "cosformer", "leap"))
# torch's fast softmax attention on a processor takes no dropout of weights, so softmax is measured in both ways.
NO_DROPOUT = "softmax, no dropout"
CONTENDERS: dict[str, dict[str, Any]] = {
    SOFTMAX: {"attention": "softmax"},
    NO_DROPOUT: {"attention": "softmax", "attention_dropout": 0.0},
    **{name: {"attention": kind} for kind, name in ATTENTION_NAMES.items() if REGISTRY[kind].compared},
}
QUICK_MEMORY = (SOFTMAX, LEAP)  # a process each
SMALL_MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "positions": "learned",
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "num_labels": 2,
    "leap_hidden": 8,
}
LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096), (128, 256)
EXAMPLES = 4  # of a step
WARM_UP = 128  # tokens of the step that loads everything before memory is looked at
STEPS = {"training": "train step", "inference": "inference"}


@dataclass(frozen=True, kw_only=True)
class SpeedRow(Compared):
    """One race of train steps or of inference.

    Attributes:
        kind: one of STEPS.
        examples: of a step, each of `length` tokens.
        parameters: of each model.
        impl: which implementation of linear attention ran.
    """

    kind: str
    length: int
    examples: int
    examples_per_second: dict[str, Spread]
    parameters: dict[str, int]
    impl: str


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """MiB that a contender's step needs at its peak, by kind and length (as text); empty where `not_run` says why."""

    contender: str
    mib: dict[str, dict[str, float | None]] = field(default_factory=dict)
    not_run: str | None = None


def measure_lra(bench: Bench) -> None:
    """Train steps and inference by length, all contenders in one race; then the memory of each."""
    settings = bench.settings
    lengths = settings.lengths_or(LENGTHS, QUICK_LENGTHS)
    for length in lengths:
        models = {name: small_model(name, length) for name in CONTENDERS}
        for kind in STEPS:
            bench.result.add("speed", _speed_row(bench, kind, length, models))
        del models
    for name in QUICK_MEMORY if settings.quick else CONTENDERS:
        bench.say(f"memory: {name}")
        bench.result.add("memory", memory_apart(name, lengths, settings.threads))


def _speed_row(
    bench: Bench, kind: str, length: int, models: Mapping[str, LeapformerForSequenceClassification]
) -> SpeedRow:
    timers = {name: timer(step_of(model, kind, length)) for name, model in models.items()}
    outcome = bench.race(timers, f"{STEPS[kind]}, {length:,} tokens")
    return SpeedRow(
        kind=kind,
        length=length,
        examples=EXAMPLES,
        contenders=outcome.times(),
        not_run=outcome.not_run,
        examples_per_second=outcome.a_second(EXAMPLES, bench.clock),
        speed_over=outcome.speed_over([SOFTMAX, NO_DROPOUT, COSFORMER], bench.clock),
        parameters={name: model.num_parameters() for name, model in models.items()},
        impl=implementation(),
    )


def small_model(name: str, length: int) -> LeapformerForSequenceClassification:
    """A contender's model for `length` tokens, weights of seed 0; torch's own generator is left as it was."""
    fields = {**SMALL_MODEL, **CONTENDERS[name], "max_position_embeddings": length}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LeapformerForSequenceClassification(LeapformerConfig(**fields))


def step_of(model: LeapformerForSequenceClassification, kind: str, length: int) -> Callable[[], object]:
    """One train step or forward pass on EXAMPLES sequences of `length` tokens."""
    ids = random_ids(EXAMPLES, length, vocab_size=model.config.vocab_size)
    if kind == "training":
        step = train_step(model, ids, TrainingSection(weight_decay=0), labels=torch.arange(EXAMPLES) % 2)
        return lambda: (model.train(), step())

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(ids)

    return forward


def implementation() -> str:
    """Which implementation of linear attention "auto" is here, on the processor."""
    from leapformer.ops import available_impls

    return "native" if not available_impls()["native"] else "torch"


def memory_apart(name: str, lengths: list[int], threads: int) -> MemoryRow:
    """The memory of a contender's steps, measured in a process of its own."""
    job = json.dumps({"name": name, "lengths": lengths, "threads": threads})
    command = [sys.executable, "-m", "leapformer.bench.lra", job]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return MemoryRow(contender=name, not_run=how_it_ended(ran.returncode, ran.stderr))
    return MemoryRow(contender=name, mib=json.loads(ran.stdout))


def memory_of_steps(name: str, lengths: list[int]) -> dict[str, dict[str, float | None]]:
    """MiB by which this process grows at most in a step, by kind and length."""
    for kind in STEPS:
        step_of(small_model(name, WARM_UP), kind, WARM_UP)()
    return {kind: {str(n): call_memory_mib(step_of(small_model(name, n), kind, n)) for n in lengths} for kind in STEPS}


def lra_tables(content: Mapping[str, Any]) -> list[Table]:
    """Examples a second and times as fast as softmax, memory, and what LeaPformer's training is over two others."""
    tables = []
    for kind, label in STEPS.items():
        rows = _speed_rows(content, kind)
        lines = [[name, *(_cell(row, name) for row in rows)] for name in CONTENDERS]
        notes = not_run_notes((f"{row.length:,}", row.not_run) for row in rows)
        title = f"Small model of the Long-Range Arena, {label}: examples a second (times as fast as softmax)"
        if rows:
            tables.append(Table(title, ["attention", *(f"{row.length:,}" for row in rows)], lines, notes))
    tables += [*_memory_tables(content), _leap_table(content)]
    return tables


def _speed_rows(content: Mapping[str, Any], kind: str) -> list[SpeedRow]:
    return [row for row in rows_of(content, "speed", SpeedRow) if row.kind == kind]


def _cell(row: SpeedRow, name: str) -> str:
    speed, over = row.examples_per_second.get(name), row.speed(name, over=SOFTMAX)
    if speed is None:
        return "not run"
    return short(speed.median) + (f" (**{short(over.median)}**)" if over else "")


def _memory_tables(content: Mapping[str, Any]) -> Iterator[Table]:
    rows = rows_of(content, "memory", MemoryRow)
    notes = tuple(f"Not run: {row.contender} ({row.not_run})." for row in rows if row.not_run)
    for kind, label in STEPS.items():
        found = {row.contender: row.mib.get(kind, {}) for row in rows}
        lengths = sorted({int(n) for mib in found.values() for n in mib})
        lines = [[name, *(_mib(mib.get(str(n))) for n in lengths)] for name, mib in found.items()]
        if lengths:
            title = f"Peak memory, {label} of {EXAMPLES} examples, MiB"
            yield Table(title, ["attention", *(f"{n:,}" for n in lengths)], lines, notes)


def _mib(value: float | None) -> str:
    return "-" if value is None else short(value)


def _leap_table(content: Mapping[str, Any]) -> Table:
    rows, others = _speed_rows(content, "training"), [COSFORMER, SOFTMAX, NO_DROPOUT]
    lines = [[f"{row.length:,}", *(ratio_text(row.speed(LEAP, over=other)) for other in others)] for row in rows]
    title = f"LeaPformer's training, times as fast as others ({rows[0].impl if rows else 'no'} kernel)"
    return Table(title, ["tokens", *others], lines)


def lra_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Examples a second at the longest length, for train steps and for inference."""
    for kind, label in STEPS.items():
        row = max(_speed_rows(content, kind), key=lambda row: row.length, default=None)
        if row and row.examples_per_second:
            values = [(name, s.median, s.p20, s.p80) for name, s in row.examples_per_second.items()]
            title = f"{label}, {row.length:,} tokens"
            yield f"lra-{kind}", ranked(values, title=title, xlabel="examples a second", marked=LEAP)


BENCHMARK = Benchmark(measure_lra, lra_tables, lra_pictures)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    end_me_first()
    print(json.dumps(memory_of_steps(asked["name"], asked["lengths"])))
