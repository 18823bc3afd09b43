"""`leapformer bench processes`: train steps of the models of simulst/demo by threads, and by processes that share a batch.

Nothing is read: features and targets are random, of the sizes that the built-in data has. A step is what the Trainer does
from a batch on: forward, backward, clip and update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from leapformer.bench.result import Result, Say, Settings, Table, ratio_text, short
from leapformer.bench.timing import race, spread, timer
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


def measure_processes(settings: Settings, result: Result, say: Say) -> None:
    """For each recipe one thread, several threads, and as many processes of one thread, in one race by the clock on the wall."""
    count, before = max(2, settings.threads), torch.get_num_threads()
    # Time of this process would leave out its helpers'.
    result.content["settings"] |= {"threads": count, "clock": "wall"}
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
            outcome = race(
                {contender: timer(step) for contender, step in steps.items()},
                repeats=settings.repeats,
                clock="wall",
                limit=settings.limit,
                turn=lambda contender, name=name: say(f"{name}: {contender}"),
            )
        speeds = {each: spread([1 / s for s in outcome.seconds(each, "wall")]) for each in outcome.samples}
        over = {each: spread(ratios) for each in speeds if (ratios := outcome.ratios(ONE, each, "wall"))}
        row = {"recipe": name, "rows": rows, "parameters": model.num_parameters(), "contenders": outcome.as_dict()}
        result.add("steps", {**row, "not_run": outcome.not_run, "steps_per_second": speeds, "speed_over": {ONE: over}})


def fresh_model(recipe: Any) -> LeapformerForConditionalGeneration:
    """A recipe's model for speech with weights of seed 0; torch's own generator is left as it was."""
    sizes = {"vocab_size": recipe.vocabulary.size, "source_vocab_size": recipe.vocabulary.source_size}
    config = build_config(
        recipe.model, config_class=LeapformerTranslationConfig, source="speech",
        ctc_vocab_size=recipe.vocabulary.source_size, **sizes,
    )  # fmt: skip
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
    model: LeapformerForConditionalGeneration, helpers: Helpers, batch: dict[str, Any], section: TrainingSection, *,
    threads: int,
) -> Callable[[], object]:  # fmt: skip
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
    lines, names = [], list(content["steps"][0]["steps_per_second"]) if content.get("steps") else []
    for row in content.get("steps", []):
        cells = [_cell(row, name) for name in names]
        lines.append([row["recipe"], f"{row['rows']}", f"{row['parameters']:,}", *cells])
    return [
        Table("Train steps, times as fast as one thread, and speed", ["recipe", "rows", "parameters", *names], lines)
    ]


def _cell(row: Mapping[str, Any], name: str) -> str:
    speed, over = row["steps_per_second"].get(name), row["speed_over"][ONE].get(name)
    return "not run" if speed is None else f"**{ratio_text(over)}**, {short(speed['median'])} steps/s"


def processes_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """None: three numbers are quicker read than drawn."""
    yield from ()
