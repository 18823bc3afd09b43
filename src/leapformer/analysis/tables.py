"""One table over several runs: quality, speed, memory, parameters, and what the seeds allow to say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from leapformer.analysis.runs import RunRecord, common_labels, declarations
from leapformer.errors import LeapformerError
from leapformer.files.records import without_unknown
from leapformer.training.results import OF_EVERY_RUN, Metric


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
        if not (run.split(split) or run.latency_curve(split) or run.policy_curves(split)):
            raise LeapformerError(
                f"{run.folder}: not evaluated on {split}; run: leapformer evaluate {run.folder} --split {split}"
            )
    ordered = sorted(groups(runs).items(), key=lambda item: _rank(item[1], split))
    declared = [column for task in declarations(runs) for column in task.columns]
    present = [
        column
        for column in dict.fromkeys([*declared, *OF_EVERY_RUN])
        if any(run.value(column, split) is not None for run in runs)
    ]
    rows = [_row(name, members, split, present) for name, members in ordered]
    single = [_row(run.folder.name, [run], split, present) for _, members in ordered for run in members]
    several = single if len(single) > len(ordered) else []
    columns = ["model", "seeds", *(column.heading for column in present), "parameters", "of LeaP"]
    return Comparison(columns, rows + _baseline_rows(runs, columns), several, _paired_notes(ordered, split))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a - b over paired values and its standard error (nan for one pair)."""
    return mean_and_error([x - y for x, y in zip(a, b, strict=True)])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return _mean(values), error


def groups(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by label, in the order of their first; where a label stands for several recipes, each is a group of its own.

    Raises:
        LeapformerError: one seed of a recipe twice.
    """
    found: dict[tuple[str, str], dict[Any, RunRecord]] = {}
    for run, label in zip(runs, common_labels(runs), strict=True):
        members = found.setdefault((label, str(run.results.get("recipe_fingerprint", ""))), {})
        seed = run.results.get("seed")
        if seed in members:
            raise LeapformerError(
                f"{run.folder}: expected each seed of a recipe once, found seed {seed} of {label} also in "
                f"{members[seed].folder}"
            )
        members[seed] = run
    labels = [label for label, _ in found]
    names = {
        key: key[0] if labels.count(key[0]) == 1 else f"{key[0]}, {_recipe_of(members)} {key[1][:6]}"
        for key, members in found.items()
    }
    return {names[key]: list(members.values()) for key, members in found.items()}


def _recipe_of(members: Mapping[Any, RunRecord]) -> str:
    return str(next(iter(members.values())).results.get("recipe", ""))


def _rank(members: Sequence[RunRecord], split: str) -> float:
    """Mean of what their task compares first, such as the loss, lower being better; those without it come last."""
    metric = members[0].declared.compared[0]
    values = [run.value(metric, split) for run in members]
    known = [value * sign(metric) for value in values if value is not None]
    return _mean(known) if len(known) == len(members) else math.inf


def sign(metric: Metric) -> int:
    """What makes lower the better."""
    return 1 if metric.better == "lower" else -1


def _row(name: str, members: Sequence[RunRecord], split: str, columns: Sequence[Metric]) -> list[str]:
    first = members[0].results
    seeds = ", ".join(str(seed) for seed in sorted({run.results.get("seed") for run in members}, key=str))
    return [
        name,
        seeds,
        *(mean_text([run.value(column, split) for run in members], column.digits) for column in columns),
        f"{first.get('parameters', 0):,}",
        f"{first.get('parameters_leap', 0):,}",
    ]


def mean_text(values: Sequence[float | None], digits: int) -> str:
    """Mean and, of several, standard deviation of the values that are known; "-" of none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {_plain(statistics.stdev(known), digits)}" if len(known) > 1 else ""
    return f"{_plain(_mean(known), digits)}{deviation}"


def _baseline_rows(runs: Sequence[RunRecord], columns: Sequence[str]) -> list[list[str]]:
    """The counted baselines, where all runs have the same."""
    found = {tuple(sorted(without_unknown(run.results.get("baselines")).items())) for run in runs}
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
        compared = [metric for task in declarations([*members, *others]) for metric in task.compared]
        for metric in dict.fromkeys(compared):
            values, other_values = by_seed(members, metric, split), by_seed(others, metric, split)
            seeds = sorted(values.keys() & other_values.keys(), key=str)
            if len(seeds) < 2:
                continue
            mean, error = paired_difference([values[s] for s in seeds], [other_values[s] for s in seeds])
            verdict = (
                "no difference" if abs(mean) <= 2 * error else f"{name if mean * sign(metric) < 0 else other} is better"
            )
            notes.append(
                f"{name} - {other}: {mean:+.{metric.digits}f} {metric.unit}, standard error {error:.{metric.digits}f} "
                "over "
                f"{len(seeds)} paired seeds: {verdict}"
            )
    return notes


def by_seed(members: Sequence[RunRecord], metric: Metric, split: str) -> dict[Any, float]:
    """A figure of runs by their seeds, of those that have it."""
    values = {run.results.get("seed"): run.value(metric, split) for run in members}
    return {seed: value for seed, value in values.items() if value is not None}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(value: float, digits: int) -> str:
    """A number with `digits` decimals; word perplexities of a poor byte model are beyond reading that way."""
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.2e}"
