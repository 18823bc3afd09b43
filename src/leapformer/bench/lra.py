"""`leapformer bench lra`: the small model of the Long-Range Arena with every mechanism: examples a second, and memory.

Nothing is read: the tokens are random, without padding. A train step is forward, backward, clip and update with the model's
dropout; inference is a forward pass without gradients. Peak memory is that of a step in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure

from leapformer.analysis.plots import ranked
from leapformer.analysis.runs import ATTENTION_NAMES
from leapformer.bench.result import Result, Say, Settings, Table, ratio_text, short
from leapformer.bench.timing import race, spread, timer
from leapformer.bench.training import random_ids, train_step
from leapformer.bench.worker import call_memory_mib, end_me_first, how_it_ended
from leapformer.models import LeapformerConfig, LeapformerForSequenceClassification
from leapformer.training.recipes import TrainingSection

SOFTMAX, COSFORMER, LEAP = (ATTENTION_NAMES[kind] for kind in ("softmax", "cosformer", "leap"))
# torch's fast softmax attention on a processor takes no dropout of weights, so softmax is measured in both ways.
NO_DROPOUT = "softmax, no dropout"
CONTENDERS: dict[str, dict[str, Any]] = {
    SOFTMAX: {"attention": "softmax"},
    NO_DROPOUT: {"attention": "softmax", "attention_dropout": 0.0},
    **{name: {"attention": kind} for kind, name in ATTENTION_NAMES.items() if kind not in ("softmax", "linear")},
}
QUICK_MEMORY = (SOFTMAX, LEAP)  # a process each
SMALL_MODEL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "hidden_act": "gelu", "positions": "learned", "hidden_dropout": 0.1, "attention_dropout": 0.1, "num_labels": 2,
    "leap_hidden": 8,
}  # fmt: skip
LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096), (128, 256)
EXAMPLES = 4  # of a step
WARM_UP = 128  # tokens of the step that loads everything before memory is looked at
STEPS = {"training": "train step", "inference": "inference"}


def measure_lra(settings: Settings, result: Result, say: Say) -> None:
    """Train steps and inference by length, all contenders in one race; then the memory of each."""
    lengths = settings.lengths_or(LENGTHS, QUICK_LENGTHS)
    for length in lengths:
        models = {name: small_model(name, length) for name in CONTENDERS}
        for kind in STEPS:
            runs = {name: step_of(model, kind, length) for name, model in models.items()}
            outcome = race(
                {name: timer(run) for name, run in runs.items()},
                repeats=settings.repeats,
                clock=settings.clock,
                limit=settings.limit,
                turn=lambda name, kind=kind, length=length: say(f"{STEPS[kind]}, {length:,} tokens: {name}"),
            )
            speeds = {
                name: spread([EXAMPLES / s for s in outcome.seconds(name, settings.clock)]) for name in outcome.samples
            }
            over = {
                slow: {name: spread(outcome.ratios(slow, name, settings.clock)) for name in speeds}
                for slow in (SOFTMAX, NO_DROPOUT, COSFORMER)
                if slow in speeds
            }
            row = {"kind": kind, "length": length, "examples": EXAMPLES, "contenders": outcome.as_dict()}
            parameters = {name: model.num_parameters() for name, model in models.items()}
            result.add("speed", {**row, "not_run": outcome.not_run, "examples_per_second": speeds, "speed_over": over,
                                 "parameters": parameters, "impl": implementation()})  # fmt: skip
        del models, runs
    for name in QUICK_MEMORY if settings.quick else CONTENDERS:
        say(f"memory: {name}")
        result.add("memory", {"contender": name, **_memory_apart(name, lengths, settings.threads)})


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


def _memory_apart(name: str, lengths: list[int], threads: int) -> dict[str, Any]:
    """ "mib": MiB that a step needs at its peak, by kind and length, measured in a process of its own; where that died it is
    empty, and "not_run" says why."""
    job = json.dumps({"name": name, "lengths": lengths, "threads": threads})
    command = [sys.executable, "-m", "leapformer.bench.lra", job]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"mib": {}, "not_run": how_it_ended(ran.returncode, ran.stderr)}
    return {"mib": json.loads(ran.stdout), "not_run": None}


def memory_of_steps(name: str, lengths: list[int]) -> dict[str, dict[str, float | None]]:
    """MiB by which this process grows at most in a step, by kind and length."""
    for kind in STEPS:
        step_of(small_model(name, WARM_UP), kind, WARM_UP)()
    return {kind: {str(n): call_memory_mib(step_of(small_model(name, n), kind, n)) for n in lengths} for kind in STEPS}


def lra_tables(content: Mapping[str, Any]) -> list[Table]:
    """Examples a second and times as fast as softmax, memory, and what LeaPformer's training is over two others."""
    tables = []
    for kind, label in STEPS.items():
        rows = [row for row in content.get("speed", []) if row["kind"] == kind]
        lines = [[name, *(_cell(row, name) for row in rows)] for name in CONTENDERS]
        notes = tuple(
            f"Not run at {row['length']:,}: {name} ({reason})." for row in rows for name, reason in row["not_run"].items()
        )  # fmt: skip
        title = f"Small model of the Long-Range Arena, {label}: examples a second (times as fast as softmax)"
        if rows:
            tables.append(Table(title, ["attention", *(f"{row['length']:,}" for row in rows)], lines, notes))
    tables += [*_memory_tables(content), _leap_table(content)]
    return tables


def _cell(row: Mapping[str, Any], name: str) -> str:
    speed, over = row["examples_per_second"].get(name), row["speed_over"].get(SOFTMAX, {}).get(name)
    if speed is None:
        return "not run"
    return short(speed["median"]) + (f" (**{short(over['median'])}**)" if over else "")


def _memory_tables(content: Mapping[str, Any]) -> Iterator[Table]:
    rows = content.get("memory", [])
    notes = tuple(f"Not run: {row['contender']} ({row['not_run']})." for row in rows if row["not_run"])
    for kind, label in STEPS.items():
        found = {row["contender"]: row["mib"].get(kind, {}) for row in rows}
        lengths = sorted({int(n) for mib in found.values() for n in mib})
        lines = [
            [name, *("-" if mib.get(str(n)) is None else short(mib[str(n)]) for n in lengths)] for name, mib in found.items()
        ]  # fmt: skip
        if lengths:
            title = f"Peak memory, {label} of {EXAMPLES} examples, MiB"
            yield Table(title, ["attention", *(f"{n:,}" for n in lengths)], lines, notes)


def _leap_table(content: Mapping[str, Any]) -> Table:
    rows = [row for row in content.get("speed", []) if row["kind"] == "training"]
    lines = [
        [f"{row['length']:,}", *(ratio_text(row["speed_over"].get(o, {}).get(LEAP)) for o in (COSFORMER, SOFTMAX, NO_DROPOUT))]
        for row in rows
    ]  # fmt: skip
    title = f"LeaPformer's training, times as fast as others ({rows[0]['impl'] if rows else 'no'} kernel)"
    return Table(title, ["tokens", COSFORMER, SOFTMAX, NO_DROPOUT], lines)


def lra_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Examples a second at the longest length, for train steps and for inference."""
    for kind, label in STEPS.items():
        rows = [row for row in content.get("speed", []) if row["kind"] == kind]
        row = max(rows, key=lambda row: row["length"], default=None)
        if row and row["examples_per_second"]:
            values = [(name, s["median"], s["p20"], s["p80"]) for name, s in row["examples_per_second"].items()]
            title = f"{label}, {row['length']:,} tokens"
            yield f"lra-{kind}", ranked(values, title=title, xlabel="examples a second", marked=LEAP)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    end_me_first()
    print(json.dumps(memory_of_steps(asked["name"], asked["lengths"])))
