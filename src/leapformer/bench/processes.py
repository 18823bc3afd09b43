"""`leapformer bench processes`: train steps of simulst/demo's models by threads, and by processes that share a batch.

Nothing is read: features and targets are random, of the sizes that the built-in data has. A step is what the Trainer
does from a batch on: forward, backward, clip and update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from leapformer.bench.benchmark import Bench, Benchmark
from leapformer.bench.result import Table, ratio_text, short
from leapformer.bench.rows import Compared, Spread, rows_of
from leapformer.bench.timing import timer
from leapformer.models import LeapformerForConditionalGeneration, LeapformerTranslationConfig
from leapformer.tasks.model_section import build_config
from leapformer.tasks.registry import load_recipe
from leapformer.training.arguments import build_optimizer
from leapformer.training.processes import Helpers, divide
from leapformer.training.recipes import TrainingSection

RECIPES = ("simulst/demo-transcription", "simulst/demo")
ONE = "1 thread"
FRAMES, QUICK_FRAMES = 320, 40  # of 10 ms, of an utterance
TARGETS, CTC_TARGETS = 16, 24  # tokens
K = 5


@dataclass(frozen=True, kw_only=True)
class StepRow(Compared):
    """One race of a recipe's train steps, `rows` in a batch."""

    recipe: str
    rows: int
    parameters: int
    steps_per_second: dict[str, Spread]


def measure_processes(bench: Bench) -> None:
    """For each recipe one thread, several threads, and as many processes of one thread, in one race by wall time."""
    settings, before = bench.settings, torch.get_num_threads()
    count = max(2, settings.threads)
    # Time of this process would leave out its helpers'.
    bench.result.content["settings"] |= {"threads": count, "clock": "wall"}
    for name in RECIPES:
        recipe: Any = load_recipe(name)[0]
        rows = 4 if settings.quick else recipe.training.batch_size
        batch = random_batch(rows, QUICK_FRAMES if settings.quick else FRAMES, recipe.vocabulary)
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, before)
            steps = {
                ONE: step_with_threads(fresh_model(recipe), batch, recipe.training, threads=1),
                f"{count} threads": step_with_threads(fresh_model(recipe), batch, recipe.training, threads=count),
            }
            model = fresh_model(recipe)
            helpers = Helpers(model, count - 1, threads=1, bf16=False)
            stack.callback(helpers.close)
            steps[f"{count} processes"] = step_with_helpers(model, helpers, batch, recipe.training, threads=count)
            timers = {contender: timer(step) for contender, step in steps.items()}
            outcome = bench.race(timers, name, clock="wall")
        row = StepRow(
            recipe=name,
            rows=rows,
            parameters=model.num_parameters(),
            contenders=outcome.times(),
            not_run=outcome.not_run,
            steps_per_second=outcome.a_second(1, "wall"),
            speed_over=outcome.speed_over([ONE], "wall"),
        )
        bench.result.add("steps", row)


def fresh_model(recipe: Any) -> LeapformerForConditionalGeneration:
    """A recipe's model for speech with weights of seed 0; torch's own generator is left as it was."""
    sizes = {"vocab_size": recipe.vocabulary.size, "source_vocab_size": recipe.vocabulary.source_size}
    sizes["ctc_vocab_size"] = recipe.vocabulary.source_size
    config = build_config(recipe.model, config_class=LeapformerTranslationConfig, source="speech", **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LeapformerForConditionalGeneration(config)


def random_batch(rows: int, frames: int, vocabulary: Any) -> dict[str, Any]:
    """Features [rows, frames, 80] and targets, without padding."""
    generator = torch.Generator().manual_seed(0)
    targets = min(TARGETS, frames // 8)  # CTC needs more states than symbols
    return {
        "input_features": torch.randn(rows, frames, 80, generator=generator),
        "labels": torch.randint(4, vocabulary.size, (rows, targets), generator=generator),
        "ctc_labels": torch.randint(4, vocabulary.source_size, (rows, min(CTC_TARGETS, targets)), generator=generator),
        "k": K,
    }


def step_with_threads(
    model: LeapformerForConditionalGeneration, batch: dict[str, Any], section: TrainingSection, *, threads: int
) -> Callable[[], object]:
    """A train step of one process."""
    update, items = _update(model, section), batch["labels"].numel()

    def step() -> None:
        torch.set_num_threads(threads)
        _loss(model, batch, items).backward()
        update()

    return step


def step_with_helpers(
    model: LeapformerForConditionalGeneration,
    helpers: Helpers,
    batch: dict[str, Any],
    section: TrainingSection,
    *,
    threads: int,
) -> Callable[[], object]:
    """The same step, its rows shared; the update has all threads."""
    update, items = _update(model, section), batch["labels"].numel()

    def step() -> None:
        torch.set_num_threads(threads)
        own, *others = divide(batch, helpers.parts)
        with helpers.at_work():
            begun = helpers.begin(others, items)
            _loss(model, own, items).backward()
            helpers.add(begun)
        update()

    return step


def _loss(model: LeapformerForConditionalGeneration, batch: Mapping[str, Any], items: int) -> Tensor:
    return model(**batch, num_items_in_batch=items).loss


def _update(model: LeapformerForConditionalGeneration, section: TrainingSection) -> Callable[[], None]:
    optimizer = build_optimizer(model, section)
    model.train()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip)
        optimizer.step()
        optimizer.zero_grad()

    return update


def processes_tables(content: Mapping[str, Any]) -> list[Table]:
    """Times as fast as one thread, and steps a second."""
    rows = rows_of(content, "steps", StepRow)
    names = list(rows[0].steps_per_second) if rows else []
    lines = [[row.recipe, f"{row.rows}", f"{row.parameters:,}", *(_cell(row, name) for name in names)] for row in rows]
    title = "Train steps, times as fast as one thread, and speed"
    return [Table(title, ["recipe", "rows", "parameters", *names], lines)]


def _cell(row: StepRow, name: str) -> str:
    speed, over = row.steps_per_second.get(name), row.speed(name, over=ONE)
    return "not run" if speed is None else f"**{ratio_text(over)}**, {short(speed.median)} steps/s"


def processes_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """None: three numbers are quicker read than drawn."""
    yield from ()


BENCHMARK = Benchmark(measure_processes, processes_tables, processes_pictures)
