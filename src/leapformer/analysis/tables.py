"""One table over several runs: quality, speed, memory, parameters, and what the seeds allow to say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from leapformer.analysis.runs import RunRecord
from leapformer.errors import LeapformerError

# Metrics of a split and figures of a run, as columns: key, heading, digits, factor. Those that no run has are left out.
# Losses in nats per token or example; memory in MiB.
_SPLIT = (
    ("loss", "loss", 4, 1.0), ("bits_per_byte", "bits/byte", 4, 1.0), ("word_perplexity", "word ppl", 1, 1.0),
    ("accuracy", "accuracy %", 2, 100.0), ("majority_accuracy", "commonest class %", 2, 100.0),
    ("root_operator_accuracy", "root operator %", 2, 100.0),
)  # fmt: skip
_RUN = (
    ("tokens_per_second", "tokens/s", 0, 1.0), ("examples_per_second", "examples/s", 1, 1.0),
    ("peak_memory_mib", "MiB", 0, 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """columns and rows of text, best loss first, the counted baselines last.

    runs: rows of the single runs, where a row of the table stands for several. notes: one line per paired difference.
    """

    columns: list[str]
    rows: list[list[str]]
    runs: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def comparison(runs: Sequence[RunRecord], *, split: str = "validation") -> Comparison:
    """Group runs that differ in nothing but the seed, and compare the groups.

    Raises:
        LeapformerError: no runs, or one that was not evaluated on the split.
    """
    if not runs:
        raise LeapformerError("compare: expected at least one run, found none")
    for run in runs:
        if not run.split(split):
            raise LeapformerError(
                f"{run.folder}: not evaluated on {split}; run: leapformer evaluate {run.folder} --split {split}"
            )
    ordered = sorted(_groups(runs).items(), key=lambda item: _mean([run.split(split)["loss"] for run in item[1]]))
    present = _present(runs, split)
    rows = [_row(name, members, split, present) for name, members in ordered]
    single = [_row(run.folder.name, [run], split, present) for _, members in ordered for run in members]
    several = single if len(single) > len(ordered) else []
    columns = [
        "model", "seeds", *(heading for _, heading, *_ in present.split), *(heading for _, heading, *_ in present.run),
        "parameters", "of LeaP",
    ]  # fmt: skip
    return Comparison(columns, rows + _baseline_rows(runs, columns), several, _paired_notes(ordered, split))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a - b over paired values and its standard error (nan for one pair)."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return _mean(differences), error


def _groups(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by label; where one label stands for several recipes, each recipe is a group of its own."""
    groups: dict[tuple[str, str], dict[Any, RunRecord]] = {}
    for run in runs:
        members = groups.setdefault((run.label, str(run.results.get("recipe_fingerprint", ""))), {})
        seed = run.results.get("seed")
        if seed in members:
            raise LeapformerError(
                f"{run.folder}: expected each seed of a recipe once, found seed {seed} of {run.label} also in "
                f"{members[seed].folder}"
            )
        members[seed] = run
    labels = [label for label, _ in groups]
    names = {
        key: key[0] if labels.count(key[0]) == 1 else f"{key[0]}, {_recipe_of(members)} {key[1][:6]}"
        for key, members in groups.items()
    }
    return {names[key]: list(members.values()) for key, members in groups.items()}


def _recipe_of(members: Mapping[Any, RunRecord]) -> str:
    return str(next(iter(members.values())).results.get("recipe", ""))


class _Columns(NamedTuple):
    split: list[tuple[str, str, int, float]]
    run: list[tuple[str, str, int, float]]


def _present(runs: Sequence[RunRecord], split: str) -> _Columns:
    """The columns that some run has a value for; memory and speed always have one."""
    return _Columns(
        [column for column in _SPLIT if any(run.split(split).get(column[0]) is not None for run in runs)],
        [column for column in _RUN if any(column[0] in run.results for run in runs)],
    )


def _row(name: str, members: Sequence[RunRecord], split: str, present: _Columns) -> list[str]:
    def column(values: Sequence[float | None], digits: int, factor: float) -> str:
        known = [value * factor for value in values if value is not None]
        if not known:
            return "-"
        deviation = f" ± {_plain(statistics.stdev(known), digits)}" if len(known) > 1 else ""
        return f"{_plain(_mean(known), digits)}{deviation}"

    first = members[0].results
    seeds = ", ".join(str(seed) for seed in sorted({run.results.get("seed") for run in members}, key=str))
    return [
        name,
        seeds,
        *(column([run.split(split).get(key) for run in members], digits, by) for key, _, digits, by in present.split),
        *(column([run.results.get(key) for run in members], digits, by) for key, _, digits, by in present.run),
        f"{first.get('parameters', 0):,}",
        f"{first.get('parameters_leap', 0):,}",
    ]


def _baseline_rows(runs: Sequence[RunRecord], columns: Sequence[str]) -> list[list[str]]:
    """The counted baselines, where all runs have the same."""
    found = {tuple(sorted((run.results.get("baselines") or {}).items())) for run in runs}
    if len(found) != 1:
        return []
    names = {key: key.removesuffix("_word_perplexity").replace("_", " ") for key, _ in next(iter(found))}
    return [
        [f"counted {names[key]}", *(_plain(value, 1) if column == "word ppl" else "" for column in columns[1:])]
        for key, value in sorted(next(iter(found)), key=lambda item: item[1])
        if key.endswith("word_perplexity")
    ]


def _paired_notes(groups: Sequence[tuple[str, Sequence[RunRecord]]], split: str) -> list[str]:
    """Each pair of groups with at least two seeds in common; under two standard errors there is no difference."""
    notes = []
    for (name, members), (other, others) in combinations(groups, 2):
        losses = {run.results.get("seed"): run.split(split)["loss"] for run in members}
        other_losses = {run.results.get("seed"): run.split(split)["loss"] for run in others}
        seeds = sorted(losses.keys() & other_losses.keys(), key=str)
        if len(seeds) < 2:
            continue
        mean, error = paired_difference([losses[s] for s in seeds], [other_losses[s] for s in seeds])
        verdict = "no difference" if abs(mean) < 2 * error else f"{name if mean < 0 else other} is better"
        notes.append(
            f"{name} - {other}: {mean:+.4f} nats/token, standard error {error:.4f} over {len(seeds)} paired seeds: {verdict}"
        )
    return notes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(value: float, digits: int) -> str:
    """A number with `digits` decimals; word perplexities of a poor byte model are beyond reading that way."""
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.2e}"
