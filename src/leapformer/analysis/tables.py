"""One table over several runs: quality, speed, memory, parameters, and what the seeds allow to say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from leapformer.analysis.runs import RunRecord
from leapformer.errors import LeapformerError

# Losses in nats per token; memory in MiB.
COLUMNS = ["model", "seeds", "loss", "bits/byte", "word ppl", "tokens/s", "MiB", "parameters", "of LeaP"]


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
    rows = [_row(name, members, split) for name, members in ordered]
    single = [_row(run.folder.name, [run], split) for _, members in ordered for run in members]
    several = single if len(single) > len(ordered) else []
    return Comparison(COLUMNS, rows + _baseline_rows(runs), several, _paired_notes(ordered, split))


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


def _row(name: str, members: Sequence[RunRecord], split: str) -> list[str]:
    def column(values: Sequence[float | None], digits: int) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        deviation = f" ± {_plain(statistics.stdev(known), digits)}" if len(known) > 1 else ""
        return f"{_plain(_mean(known), digits)}{deviation}"

    def of_split(key: str) -> list[float | None]:
        return [run.split(split).get(key) for run in members]

    def of_run(key: str) -> list[float | None]:
        return [run.results.get(key) for run in members]

    first = members[0].results
    seeds = ", ".join(str(seed) for seed in sorted({run.results.get("seed") for run in members}, key=str))
    return [
        name,
        seeds,
        column(of_split("loss"), 4),
        column(of_split("bits_per_byte"), 4),
        column(of_split("word_perplexity"), 1),
        column(of_run("tokens_per_second"), 0),
        column(of_run("peak_memory_mib"), 0),
        f"{first.get('parameters', 0):,}",
        f"{first.get('parameters_leap', 0):,}",
    ]


def _baseline_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """The counted baselines, where all runs have the same."""
    found = {tuple(sorted((run.results.get("baselines") or {}).items())) for run in runs}
    if len(found) != 1:
        return []
    names = {key: key.removesuffix("_word_perplexity").replace("_", " ") for key, _ in next(iter(found))}
    return [
        [f"counted {names[key]}", "", "", "", _plain(value, 1), "", "", "", ""]
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
