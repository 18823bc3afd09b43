"""What a grid of trainings shows: each cell's quality over its seeds, its cost, and the paired difference from one."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from leapformer.analysis.markdown import markdown_table
from leapformer.analysis.plots import Figure, Panel, quality_against_costs
from leapformer.analysis.runs import RunRecord
from leapformer.analysis.tables import by_seed, mean_and_error, paired_difference, sign
from leapformer.errors import LeapformerError
from leapformer.training.results import STATE, Metric

SPLIT = "validation"
Verdict = Literal["baseline", "better", "worse", "none", "one seed", "not measured"]


@dataclass(frozen=True)
class CellFigures:
    """One cell of a grid. What is not known is None.

    Attributes:
        values: the headline metric by seed.
        mean, error: of them; the standard error of the mean needs two.
        pairs: how many seeds it has in common with the baseline.
        difference, difference_error: from the baseline seed by seed, mean and standard error.
        parameters, parameters_leap: of the model, and those of them that LeaP adds.
        milliseconds: of a training step, mean over the seeds.
        state_bytes: what the model keeps of one text of the length that it is trained with.
    """

    name: str
    values: dict[str, float]
    mean: float | None
    error: float | None
    pairs: int
    difference: float | None
    difference_error: float | None
    verdict: Verdict
    parameters: int | None
    parameters_leap: int | None
    milliseconds: float | None
    state_bytes: float | None


@dataclass(frozen=True)
class Ablation:
    """The cells of a grid in its order, by the headline metric of their task."""

    metric: Metric
    baseline: str
    cells: list[CellFigures]


def ablation(cells: Mapping[str, Sequence[RunRecord]], *, baseline: str, metric: str | None = None) -> Ablation:
    """Compare the cells of a grid by one figure.

    Arguments:
        cells: the finished runs of each, every seed once.
        baseline: the one whose differences from the others are taken.
        metric: the figure's key; None: what their task is judged by.

    Raises:
        LeapformerError: no run is finished, or they have no such figure in common.
    """
    runs = [run for members in cells.values() for run in members]
    if not runs:
        raise LeapformerError("ablate: expected at least one finished run, found none")
    chosen = _common_metric(runs, runs[0].declared.metric(metric))
    reference = by_seed(cells[baseline], chosen, SPLIT)
    return Ablation(
        chosen,
        baseline,
        [_figures(name, members, chosen, None if name == baseline else reference) for name, members in cells.items()],
    )


def _common_metric(runs: Sequence[RunRecord], wanted: Metric) -> Metric:
    """The figure, or what stands in for it where not every run has it."""
    metric: Metric | None = wanted
    while metric is not None:
        alone = replace(metric, instead=None)
        if all(run.value(alone, SPLIT) is not None for run in runs):
            return alone
        metric = metric.instead
    lacking = next(run for run in runs if run.figure(wanted, SPLIT) is None)
    raise LeapformerError(f"{lacking.folder}/results.json: expected {wanted.heading} of the {SPLIT} split, found none")


def _figures(
    name: str, members: Sequence[RunRecord], metric: Metric, reference: Mapping[Any, float] | None
) -> CellFigures:
    values = by_seed(members, metric, SPLIT)
    mean, error = _known(mean_and_error(list(values.values()))) if values else (None, None)
    seeds = sorted(values.keys() & reference.keys(), key=str) if reference is not None else []
    difference: tuple[float | None, float | None] = (None, None)
    if reference is not None and seeds:
        difference = _known(paired_difference([values[s] for s in seeds], [reference[s] for s in seeds]))
    first = members[0].results if members else {}
    return CellFigures(
        name=name,
        values={str(seed): values[seed] for seed in sorted(values, key=str)},
        mean=mean,
        error=error,
        pairs=len(seeds),
        difference=difference[0],
        difference_error=difference[1],
        verdict="baseline" if reference is None else verdict(*difference, metric=metric),
        parameters=first.get("parameters"),
        parameters_leap=first.get("parameters_leap"),
        milliseconds=_mean([_milliseconds(run) for run in members]),
        state_bytes=_mean([run.results.get(STATE.key) for run in members]),
    )


def verdict(difference: float | None, error: float | None, *, metric: Metric) -> Verdict:
    """What a paired difference allows to say: nothing under two standard errors, or with one pair."""
    if difference is None:
        return "not measured"
    if error is None:
        return "one seed"
    if abs(difference) <= 2 * error:
        return "none"
    return "better" if difference * sign(metric) < 0 else "worse"


def chance_of_two_errors(pairs: int) -> float:
    """How often the mean of so many normal differences whose expectation is 0 lies beyond two standard errors.

    That is P(|t| > 2) of Student's distribution with `pairs` - 1 degrees of freedom (Abramowitz and Stegun 26.7.3 and
    26.7.4).

    Arguments:
        pairs: at least 2.
    """
    freedom = pairs - 1
    angle = math.atan(2 / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for step in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * step + 2) / (2 * step + 3) if odd else cosine**2 * (2 * step + 1) / (2 * step + 2)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 1 - inside


def _known(pair: tuple[float, float]) -> tuple[float, float | None]:
    return pair[0], None if math.isnan(pair[1]) else pair[1]


def _milliseconds(run: RunRecord) -> float | None:
    seconds, steps = run.results.get("seconds"), run.results.get("steps")
    return 1000 * seconds / steps if seconds is not None and steps else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# ---- as text


def ablation_markdown(found: Ablation) -> str:
    """The table, and the lines below it that it needs to be understood."""
    columns, rows = ablation_rows(found)
    notes = "\n".join(ablation_notes(found))
    return f"{markdown_table(columns, [[_in_table(cell) for cell in row] for row in rows])}\n\n{notes}\n"


def ablation_rows(found: Ablation) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of text, in the order of the grid."""
    metric = found.metric
    state = any(cell.state_bytes is not None for cell in found.cells)
    columns = ["cell", "seeds", metric.heading, "difference", "parameters", "ms/step"]
    rows = []
    for cell in found.cells:
        row = [
            cell.name,
            str(len(cell.values)),
            _with_error(cell.mean, cell.error, metric.digits + 1),
            difference_text(cell, metric),
            "-" if cell.parameters is None else f"{cell.parameters:,}",
            "-" if cell.milliseconds is None else f"{cell.milliseconds:,.1f}",
        ]
        if state:
            shown = None if cell.state_bytes is None else cell.state_bytes * STATE.factor
            row.append("-" if shown is None else f"{shown:,.{STATE.digits}f}")
        rows.append(row)
    return [*columns, STATE.heading] if state else columns, rows


def difference_text(cell: CellFigures, metric: Metric) -> str:
    """ "better -0.120 ± 0.030", "none (+0.010 ± 0.020)", "one seed (-0.120)", "baseline", or "-"."""
    if cell.verdict in ("baseline", "not measured"):
        return "baseline" if cell.verdict == "baseline" else "-"
    number = _with_error(cell.difference, cell.difference_error, metric.digits + 1, signed=True)
    return f"{cell.verdict} {number}" if cell.verdict in ("better", "worse") else f"{cell.verdict} ({number})"


def ablation_notes(found: Ablation) -> list[str]:
    """What the figures are, and how far the differences can be trusted."""
    way = f"{found.metric.better} is better"
    lines = [
        f"{found.metric.heading} of the {SPLIT} split, {way}: mean ± standard error over the seeds. difference: from "
        f"{found.baseline}, seed by seed; none: under two standard errors. ms/step: of training, slower where runs of "
        "the grid shared the machine."
    ]
    if any(cell.state_bytes is not None for cell in found.cells):
        lines[0] += f" {STATE.heading}: kept of one text of the length that was trained with."
    pairs = [cell.pairs for cell in found.cells if cell.pairs > 1]
    if pairs:
        expected = sum(map(chance_of_two_errors, pairs))
        lines.append(
            f"By chance alone, a difference over {min(pairs)} seeds passes two standard errors in "
            f"{100 * chance_of_two_errors(min(pairs)):.0f} of 100 cases (here: {expected:.1f} of {len(pairs)}); more "
            "seeds make that rarer."
        )
    return lines


def _with_error(value: float | None, error: float | None, digits: int, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    number = f"{value:{'+' if signed else ''}.{digits}f}"
    return number if error is None else f"{number} ± {error:.{digits}f}"


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")


# ---- as a picture


def ablation_picture(found: Ablation) -> Figure:
    """Quality against parameters, against the time of a training step, and, where it is known, against the state."""
    cells = [cell for cell in found.cells if cell.mean is not None]
    panels = [
        Panel("parameters", [cell.parameters for cell in cells]),
        Panel("milliseconds per training step", [cell.milliseconds for cell in cells]),
    ]
    states = [None if cell.state_bytes is None else cell.state_bytes * STATE.factor for cell in cells]
    if any(state is not None for state in states):
        panels.append(Panel("state, KiB", states))
    return quality_against_costs(
        [(cell.name, cell.mean, cell.error) for cell in cells if cell.mean is not None],
        panels,
        ylabel=f"{found.metric.heading} ({found.metric.better} is better)",
    )


# ---- in full


def ablation_json(found: Ablation) -> dict[str, Any]:
    """All numbers, unrounded."""
    metric = found.metric
    return {
        "metric": {"key": metric.key, "heading": metric.heading, "better": metric.better, "factor": metric.factor},
        "split": SPLIT,
        "baseline": found.baseline,
        "cells": [asdict(cell) for cell in found.cells],
    }


def ablation_csv(found: Ablation) -> str:
    """All numbers, unrounded: a row for each cell, the seeds' values in columns of their own at the end."""
    seeds = sorted({seed for cell in found.cells for seed in cell.values}, key=int)
    rows = [{key: value for key, value in asdict(cell).items() if key != "values"} for cell in found.cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], *(f"seed {seed}" for seed in seeds)], lineterminator="\n")
    writer.writeheader()
    for row, cell in zip(rows, found.cells, strict=True):
        writer.writerow({**row, **{f"seed {seed}": value for seed, value in cell.values.items()}})
    return text.getvalue()
