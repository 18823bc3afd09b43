"""`leapformer bench training`: whole train steps and generation steps of a recipe's model, by attention.

Nothing is read: the tokens are random, so a recipe needs no data. B blocks of T tokens; a step is forward, backward,
clip and update, as the Trainer does them, without the Trainer's own work between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.benchmark import Bench, Benchmark
from leapformer.bench.profiles import profile_of, profile_tables
from leapformer.bench.result import Table, ratio_text, short
from leapformer.bench.rows import Compared, Spread, not_run_notes, rows_of
from leapformer.bench.timing import timer
from leapformer.errors import LeapformerError
from leapformer.files.showing import cut, shown
from leapformer.models import LeapformerCache, LeapformerConfig, LeapformerForCausalLM
from leapformer.tasks.registry import load_recipe
from leapformer.training.arguments import build_optimizer, build_schedule
from leapformer.training.recipes import TrainingSection

SOFTMAX = "softmax"
CONTENDERS = {
    SOFTMAX: ("attention=softmax", "variant=paper"),
    "cosFormer": ("attention=cosformer", "variant=paper"),
    "LeaPformer": ("attention=leap", "variant=paper"),
    "LeaPformer (gated)": ("attention=leap", "variant=gated"),
}
LENGTHS = (256, 1024, 4096)
STEPS = {"training": "train step", "generation": "generation step"}


@dataclass(frozen=True, kw_only=True)
class StepRow(Compared):
    """One race of train steps or of generation steps.

    Attributes:
        kind: one of STEPS.
        length: of a block; for generation, of what comes before.
        tokens: that a step predicts.
        parameters: of each model; told with its train steps.
    """

    kind: str
    length: int
    tokens: int
    tokens_per_second: dict[str, Spread]
    parameters: dict[str, int] | None = None


def measure_training(bench: Bench) -> None:
    """Train steps by block length at equal tokens a step, then steps of generation, then where the time goes."""
    recipe, settings = bench.settings.recipe, bench.settings
    own = check_recipe(recipe)
    block = own.data.block_size
    lengths = sorted(set(settings.lengths_or([block, *(n for n in LENGTHS if n > block)], (block,))))
    for length in lengths:
        models = {name: build_model(recipe, overrides, length=length) for name, overrides in CONTENDERS.items()}
        tokens = max(length, own.training.batch_size * block)
        ids = random_ids(tokens // length, length, vocab_size=models[SOFTMAX].config.vocab_size)
        profiled = length == lengths[0] and not settings.quick
        runs = {name: train_step(model, ids, own.training) for name, model in models.items()}
        row = _row(bench, "training", length, ids.numel(), runs)
        parameters = {name: model.num_parameters() for name, model in models.items()}
        bench.result.add("steps", replace(row, parameters=parameters))
        _add_profiles(bench, "training", runs if profiled else {})
        runs = {name: generation_step(model, ids[:1]) for name, model in models.items()}
        bench.result.add("steps", _row(bench, "generation", length, 1, runs))
        _add_profiles(bench, "generation", runs if profiled else {})
        del models, runs


def _row(bench: Bench, kind: str, length: int, tokens: int, runs: Mapping[str, Callable[[], object]]) -> StepRow:
    timers = {name: timer(run) for name, run in runs.items()}
    outcome = bench.race(timers, f"{STEPS[kind]}, {length:,} tokens")
    return StepRow(
        kind=kind,
        length=length,
        tokens=tokens,
        contenders=outcome.times(),
        not_run=outcome.not_run,
        tokens_per_second=outcome.a_second(tokens, bench.clock),
        speed_over=outcome.speed_over([SOFTMAX], bench.clock),
    )


def _add_profiles(bench: Bench, kind: str, runs: Mapping[str, Callable[[], object]]) -> None:
    for name, run in runs.items():
        bench.say(f"profile of a {STEPS[kind]}: {name}")
        bench.result.add("profiles", profile_of(run, step=STEPS[kind], contender=name))


def build_model(recipe: str, overrides: Sequence[str], *, length: int) -> LeapformerForCausalLM:
    """A recipe's model with fresh weights that takes `length` tokens; torch's own generator is left as it was."""
    content: Any = load_recipe(recipe, overrides)[0]
    fields: dict[str, Any] = {**content.model}
    fields["max_position_embeddings"] = max(2 * length, fields.get("max_position_embeddings", 0))
    return fresh_model(LeapformerConfig(**fields, vocab_size=_vocab_size(content)))


def fresh_model(config: LeapformerConfig) -> LeapformerForCausalLM:
    """A model with weights of seed 0, drawn without touching torch's own generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LeapformerForCausalLM(config)


def check_recipe(reference: str) -> Any:
    """The recipe of a language model.

    Raises:
        LeapformerError: it is of another task, or its vocabulary is only known from its text.
    """
    recipe, _ = load_recipe(reference)
    if recipe.task != "lm":
        raise LeapformerError(
            f"--recipe {cut(reference, 240)}: expected a language model's, found one of task {shown(recipe.task)}"
        )
    _vocab_size(recipe)
    return recipe


def _vocab_size(recipe: Any) -> int:
    section = recipe.tokenizer
    if section.kind == "word" and section.vocab_size is None:
        raise LeapformerError(
            f"--recipe {recipe.name}: its vocabulary is every word of its text, which is not read here; expected a "
            "recipe with tokenizer.vocab_size, or with a bpe or bytes tokenizer"
        )
    return section.vocab_size or {"bytes": 257, "bpe": 2048}[section.kind]


def random_ids(rows: int, length: int, *, vocab_size: int) -> torch.Tensor:
    """Random tokens [rows, length]."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def train_step(
    model: Any, ids: torch.Tensor, section: TrainingSection, *, labels: torch.Tensor | None = None
) -> Callable[[], object]:
    """One step of a model on tokens [B, T]: loss, gradients, clip, update, schedule. `labels`: else the tokens."""
    labels = ids if labels is None else labels
    optimizer = build_optimizer(model, section)
    schedule = build_schedule(optimizer, section)
    model.train()

    def step() -> None:
        model(ids, labels=labels).loss.backward()
        if section.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def generation_step(model: Any, prompt: torch.Tensor) -> Callable[[], object]:
    """One more token after a prompt [1, T]; softmax's cache grows a little from call to call, as it does in use."""
    model.eval()
    cache = LeapformerCache(model.config.num_hidden_layers)
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, limit = prompt[:, -1:], model.config.max_position_embeddings
    start = cache.snapshot()

    def step() -> None:
        if cache.get_seq_length() >= limit:  # cosFormer takes no more
            cache.restore(start)
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)

    return step


def training_tables(content: Mapping[str, Any]) -> list[Table]:
    """Times as fast as softmax and tokens a second, for both kinds of step, and the profiles."""
    tables = []
    for kind, label in STEPS.items():
        rows = [row for row in rows_of(content, "steps", StepRow) if row.kind == kind]
        lines = []
        for row in rows:
            cells = []
            for name in CONTENDERS:
                ratio, speed = row.speed(name, over=SOFTMAX), row.tokens_per_second.get(name)
                text = "not run" if speed is None else f"{short(speed.median)} tokens/s"
                cells.append(f"**{ratio_text(ratio)}**, {text}" if ratio else text)
            lines.append([f"{row.length:,}", f"{row.tokens:,}", *cells])
        notes = not_run_notes((f"{row.length:,}", row.not_run) for row in rows)
        title = f"{content['settings']['recipe']}: {label}, times as fast as softmax, and speed"
        length = "block length" if kind == "training" else "tokens before"
        tables.append(Table(title, [length, "tokens a step", *CONTENDERS], lines, notes))
    return [*tables, *profile_tables(content)]


def training_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Tokens a second against the block length."""
    rows = [row for row in rows_of(content, "steps", StepRow) if row.kind == "training"]
    lines = []
    for name in CONTENDERS:
        points = [row.tokens_per_second[name].at(row.length) for row in rows if name in row.tokens_per_second]
        if points:
            lines.append(Line(name, points))
    if any(len(line.points) > 1 for line in lines):
        yield "training", lines_over_length(lines, xlabel="tokens of a block", ylabel="tokens a second")


BENCHMARK = Benchmark(
    measure_training, training_tables, training_pictures, check=lambda settings: check_recipe(settings.recipe)
)
