"""`leapformer bench training`: whole train steps and generation steps of a recipe's model, by attention.

Nothing is read: the tokens are random, so a recipe needs no data. B blocks of T tokens; a step is forward, backward, clip
and update, as the Trainer does them, without the Trainer's own work between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.result import Result, Say, Settings, Table, ratio_text, short
from leapformer.bench.timing import race, spread, timer
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
TOP = 12  # operators of a profile


def measure_training(settings: Settings, result: Result, say: Say) -> None:
    """Train steps by block length at equal tokens a step, then steps of generation, then where the time goes."""
    recipe = settings.recipe
    own = check_recipe(recipe)
    block = own.data.block_size
    lengths = sorted(set(settings.lengths_or([block, *(n for n in LENGTHS if n > block)], (block,))))
    for length in lengths:
        models = {name: build_model(recipe, overrides, length=length) for name, overrides in CONTENDERS.items()}
        tokens = max(length, own.training.batch_size * block)
        ids = random_ids(tokens // length, length, vocab_size=models[SOFTMAX].config.vocab_size)
        runs = {name: train_step(model, ids, own.training) for name, model in models.items()}
        row = _row("training", length, ids.numel(), runs, settings, say)
        result.add("steps", {**row, "parameters": {name: model.num_parameters() for name, model in models.items()}})
        if length == lengths[0] and not settings.quick:
            for name, run in runs.items():
                say(f"profile of a train step: {name}")
                result.add("profiles", {"step": STEPS["training"], "contender": name, **where_time_goes(run)})
        runs = {name: generation_step(model, ids[:1]) for name, model in models.items()}
        result.add("steps", _row("generation", length, 1, runs, settings, say))
        if length == lengths[0] and not settings.quick:
            for name, run in runs.items():
                say(f"profile of a generation step: {name}")
                result.add("profiles", {"step": STEPS["generation"], "contender": name, **where_time_goes(run)})
        del models, runs


def _row(
    kind: str, length: int, tokens: int, runs: Mapping[str, Callable[[], object]], settings: Settings, say: Say
) -> dict[str, Any]:
    outcome = race(
        {name: timer(run) for name, run in runs.items()},
        repeats=settings.repeats,
        clock=settings.clock,
        limit=settings.limit,
        turn=lambda name: say(f"{STEPS[kind]}, {length:,} tokens: {name}"),
    )
    speeds = {name: spread([tokens / s for s in outcome.seconds(name, settings.clock)]) for name in outcome.samples}
    over = {name: spread(ratios) for name in speeds if (ratios := outcome.ratios(SOFTMAX, name, settings.clock))}
    return {
        "kind": kind,
        "length": length,
        "tokens": tokens,
        "contenders": outcome.as_dict(),
        "not_run": outcome.not_run,
        "tokens_per_second": speeds,
        "speed_over": {SOFTMAX: over},
    }


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
    """One step of a model on tokens [B, T]: loss, gradients, clip, update, schedule. `labels`: the tokens, unless given."""
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


def where_time_goes(run: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of one call by operator, without what an operator calls in turn, the costly ones first."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    rows = [{"operator": e.key, "calls": e.count, "ms": e.self_cpu_time_total / 1e3} for e in events[:TOP]]
    return {"operators": rows, "all_ms": sum(e.self_cpu_time_total for e in events) / 1e3}


def training_tables(content: Mapping[str, Any]) -> list[Table]:
    """Times as fast as softmax and tokens a second, for both kinds of step, and the profiles."""
    tables = []
    for kind, label in STEPS.items():
        rows = [row for row in content.get("steps", []) if row["kind"] == kind]
        lines = []
        for row in rows:
            cells = []
            for name in CONTENDERS:
                ratio, speed = row["speed_over"][SOFTMAX].get(name), row["tokens_per_second"].get(name)
                text = "not run" if speed is None else f"{short(speed['median'])} tokens/s"
                cells.append(f"**{ratio_text(ratio)}**, {text}" if ratio else text)
            lines.append([f"{row['length']:,}", f"{row['tokens']:,}", *cells])
        notes = tuple(
            f"Not run at {row['length']:,}: {name} ({reason})." for row in rows for name, reason in row["not_run"].items()
        )  # fmt: skip
        title = f"{content['settings']['recipe']}: {label}, times as fast as softmax, and speed"
        length = "block length" if kind == "training" else "tokens before"
        tables.append(Table(title, [length, "tokens a step", *CONTENDERS], lines, notes))
    for row in content.get("profiles", []):
        lines = [
            [o["operator"], f"{o['calls']:,}", short(o["ms"]), f"{o['ms'] / row['all_ms']:.0%}"] for o in row["operators"]
        ]  # fmt: skip
        title = f"Where a {row['step']} of {row['contender']} spends its time ({short(row['all_ms'])} ms in operators)"
        tables.append(Table(title, ["operator", "calls", "ms", "share"], lines))
    return tables


def training_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Tokens a second against the block length."""
    rows = [row for row in content.get("steps", []) if row["kind"] == "training"]
    lines = []
    for name in CONTENDERS:
        speeds = [(row["length"], row["tokens_per_second"][name]) for row in rows if name in row["tokens_per_second"]]
        if speeds:
            lines.append(Line(name, [(length, s["median"], s["p20"], s["p80"]) for length, s in speeds]))
    if any(len(line.points) > 1 for line in lines):
        yield "training", lines_over_length(lines, xlabel="tokens of a block", ylabel="tokens a second")
