"""One self-contained HTML page about runs: curves, table, perplexity by position, proportions, samples, machine.

Everything is inside the page: styles, plots (SVG) and text. It loads nothing, and reads on a phone and in the dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from leapformer.analysis.latency import System, equal_lagging_table, latency_table, quality_latency, systems
from leapformer.analysis.plots import (
    figure_svg,
    learning_curves,
    perplexity_by_position,
    proportions,
    quality_and_speed,
)
from leapformer.analysis.proportions import LayerProportions
from leapformer.analysis.runs import RunRecord, declarations, distinct_labels
from leapformer.errors import MissingExtra
from leapformer.files.records import without_unknown
from leapformer.files.writing import write_text
from leapformer.training.results import LOSS, Metric, Page

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise MissingExtra("plots", package="jinja2", purpose="writing a report page") from error

# Shades of the strips that show proportions on the text itself.
SHADES = 10
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class GeneratedSample:
    """Text that a model wrote.

    Attributes:
        model: what the page calls the model.
        prompt: what it was given.
        continuation: what it wrote.
        settings: how, such as "sampled, temperature 0.8".
    """

    model: str
    prompt: str
    continuation: str
    settings: str


@dataclass(frozen=True)
class TextProportions:
    """Learned proportions on a sample text.

    Attributes:
        model: what the page calls the model.
        tokens: the text's T tokens as strings.
        layers: from `learned_proportions`, on the same tokens.
    """

    model: str
    tokens: list[str]
    layers: list[LayerProportions]


class PageColumn(NamedTuple):
    """A column of the comparison table: heading, a few words below it, and a run's cell on a split (None: empty)."""

    heading: str
    note: str
    text: Callable[[RunRecord, str], str | None]


@dataclass(frozen=True)
class TableRow:
    """One row of the comparison table; cells are ready to read, and None leaves a cell empty."""

    label: str
    cells: list[str | None]
    series: int | None = None
    best: bool = False


def write_report(
    path: str | Path,
    runs: Sequence[RunRecord],
    *,
    title: str,
    split: str = "validation",
    samples: Sequence[GeneratedSample] = (),
    text_proportions: TextProportions | None = None,
    command: str | None = None,
    note: str = "",
) -> Path:
    """Write the page of `render_report` to `path`, whole or not at all, and return the path."""
    path = Path(path)
    page = render_report(
        runs, title=title, split=split, samples=samples, text_proportions=text_proportions, command=command, note=note
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def render_report(
    runs: Sequence[RunRecord],
    *,
    title: str,
    split: str = "validation",
    samples: Sequence[GeneratedSample] = (),
    text_proportions: TextProportions | None = None,
    command: str | None = None,
    note: str = "",
) -> str:
    """The page as HTML.

    Arguments:
        runs: what to compare, in the order of the table; at least one.
        title: the heading.
        split: whose figures are shown.
        samples: generated text to show.
        text_proportions: learned proportions to show.
        command: the command that makes the page again.
        note: what a reader should know about the comparison, such as what the runs have in common.

    Raises:
        ValueError: no runs.
        LeapformerError: translation runs that have no common axis of lagging.
    """
    if not runs:
        raise ValueError("runs: expected at least one, found none")
    page = _page_of(runs)
    columns = _columns(runs, page, split)
    environment = Environment(
        loader=PackageLoader("leapformer.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first = runs[0].results
    return environment.get_template("report.html.j2").render(
        title=title,
        summary=_summary(runs, page, split),
        columns=[(column.heading, column.note) for column in columns],
        rows=_table_rows(runs, page, columns, split),
        explanation=Markup(page.explanation),  # noqa: S704 - written by a task
        latency=_latency(runs, split) if page.has_lagging else None,
        learning_curves=_inline(figure_svg(learning_curves(runs), prefix="curves-")),
        by_position=_inline(figure_svg(perplexity_by_position(runs), prefix="position-"))
        if any(run.results.get("perplexity_by_position") for run in runs)
        else None,
        quality_and_speed=_inline(figure_svg(quality_and_speed(runs), prefix="speed-")) if page.has_speed else None,
        layers=_layers(text_proportions) if text_proportions else [],
        text_proportions=text_proportions,
        samples=samples,
        machine={name: value for name, value in (first.get("machine") or {}).items() if value is not None},
        versions=first.get("versions") or {},
        git=first.get("git"),
        recipe=first.get("recipe"),
        split=runs[0].split(split),
        split_name=split,
        command=command,
        note=note,
    )


def _page_of(runs: Sequence[RunRecord]) -> Page:
    """Of their task; runs of several tasks have the loss in common."""
    tasks = declarations(runs)
    return tasks[0].page_or_default() if len(tasks) == 1 else Page(metrics=(LOSS,), headline=LOSS)


def _columns(runs: Sequence[RunRecord], page: Page, split: str) -> list[PageColumn]:
    """Those of the page's task, and behind them those of every run; none of which no run knows anything."""
    unit = declarations(runs)[0].unit
    own = [PageColumn(each.heading, each.note, partial(_cell, metric=each)) for each in page.metrics]
    columns = [
        *own,
        PageColumn(
            f"{unit} per second",
            "training",
            lambda run, split: _number(run.results.get(f"{unit}_per_second"), digits=0),
        ),
        PageColumn("training time", "min:s", lambda run, split: _minutes(run.results.get("seconds"))),
        PageColumn("parameters", "all", lambda run, split: _number(run.results.get("parameters"), digits=0)),
        PageColumn("LeaP modules", "share of them", lambda run, split: _leap_share(run)),
    ]
    return [column for column in columns if any(column.text(run, split) is not None for run in runs)]


def _cell(run: RunRecord, split: str, *, metric: Metric) -> str | None:
    found = run.figure(metric, split)
    if found is None:
        return None
    metric, value = found
    return " ".join(filter(None, [_number(value, digits=metric.digits), metric.unit]))


def _said(run: RunRecord, split: str, metric: Metric) -> str | None:
    """A figure in the words of a sentence."""
    found = run.figure(metric, split)
    return None if found is None else found[0].said.format(_number(found[1], digits=found[0].digits))


def _quality(run: RunRecord, split: str, page: Page) -> float:
    """What the best run is chosen by, lower being better."""
    found = run.figure(page.headline, split)
    if found is None:
        return math.inf
    metric, value = found
    return value if metric.better == "lower" else -value


def _leap_share(run: RunRecord) -> str | None:
    parameters, leap = run.results.get("parameters"), run.results.get("parameters_leap") or 0
    return f"{leap / parameters:.2%}" if parameters and leap else None


def _table_rows(runs: Sequence[RunRecord], page: Page, columns: Sequence[PageColumn], split: str) -> list[TableRow]:
    """One row per run, then the counted baselines."""
    values = [_quality(run, split, page) for run in runs]
    rows = []
    for place, (run, label) in enumerate(zip(runs, distinct_labels(list(runs)), strict=True)):
        cells = [column.text(run, split) for column in columns]
        best = values[place] == min(values) and len(runs) > 1
        rows.append(TableRow(label=label, cells=cells, series=place % 6 + 1, best=best))
    empty = [None] * (len(columns) - 2)
    return rows + [
        TableRow(label=f"{name}, counted", cells=[_number(perplexity), _number(bits, digits=3), *empty])
        for name, perplexity, bits in _baselines(runs[0], split)
    ]


def _baselines(run: RunRecord, split: str) -> list[tuple[str, float, float | None]]:
    """Name, word perplexity and bits per byte of the counted baselines, the best first."""
    suffix = "_word_perplexity"
    found = {key.removesuffix(suffix): value for key, value in without_unknown(run.results.get("baselines")).items()}
    words, size = run.split(split).get("words"), run.split(split).get("bytes")
    bits_per_nat = words / size / math.log(2) if words and size else None
    return [
        (name.replace("_", " "), value, bits_per_nat and math.log(value) * bits_per_nat)
        for name, value in sorted(found.items(), key=lambda item: item[1])
    ]


def _summary(runs: Sequence[RunRecord], page: Page, split: str) -> str:
    """The outcome in one sentence."""
    value, place = min((_quality(run, split, page), place) for place, run in enumerate(runs))
    best, label = runs[place], distinct_labels(list(runs))[place]
    said = _said(best, split, page.headline)
    if said is None:
        return f"{len(runs)} runs, none of them evaluated."
    aside = _aside(best, split, page)
    return f"Best on the {split} text: {label} with {said}{f' ({aside})' if aside else ''}."


def _aside(run: RunRecord, split: str, page: Page) -> str | None:
    """What stands beside the headline: the page's own figure, or what was counted without training."""
    if page.aside is not None:
        return _said(run, split, page.aside)
    bits = next((bits for name, _, bits in _baselines(run, split) if name == "bigram"), None)
    return f"a bigram counted from the training text: {_number(bits, digits=3)}" if bits is not None else None


def _latency(runs: Sequence[RunRecord], split: str) -> dict[str, Any] | None:
    """Picture and tables of those runs that were translated with at several k; None where none was."""
    measured = [run for run in runs if run.latency_curve(split) or run.policy_curves(split)]
    if not measured:
        return None
    # A line for each run, in the colours of the table above.
    lines = systems(measured, split=split, by_seed=True)
    labels = distinct_labels(list(runs))
    lines = [_as_in_the_table(line, runs.index(line.runs[0]), labels) for line in lines]
    return {
        "picture": _inline(figure_svg(quality_latency(lines), prefix="latency-")),
        "tables": [table for table in (latency_table(lines), equal_lagging_table(lines)) if table[1]],
    }


def _as_in_the_table(line: System, place: int, labels: Sequence[str]) -> System:
    return replace(line, label=", ".join([labels[place], *([line.policy] if line.policy else [])]), place=place)


def _layers(shown: TextProportions) -> list[dict[str, Any]]:
    """Plot and strips of every layer."""
    return [
        {
            "number": number,
            "plot": _inline(figure_svg(figure, prefix=f"layer{number}-")),
            "strips": _strips(layer, shown.tokens),
            "running": layer.steps is not None,
            "range": f"{_extreme(layer, min):.2f} to {_extreme(layer, max):.2f}",
        }
        for number, (layer, figure) in enumerate(zip(shown.layers, proportions(shown.layers), strict=True), start=1)
    ]


def _strips(layer: LayerProportions, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Each head's text, token by token with its shade from 0 to SHADES - 1: for queries and for keys, or the steps."""
    strips, sides = [], {"queries": layer.queries, "keys": layer.keys}
    for side, values in (sides if layer.steps is None else {"steps": layer.steps}).items():
        if values.shape[0] != len(tokens):
            raise ValueError(f"tokens: expected {values.shape[0]}, one per proportion, found {len(tokens)}")
        for head, column in enumerate(values.T.tolist(), start=1):
            shades = [min(SHADES - 1, int(value * SHADES)) for value in column]
            strips.append({"label": f"head {head}, {side}", "tokens": list(zip(tokens, shades, strict=True))})
    return strips


def _extreme(layer: LayerProportions, choose: Any) -> float:
    sides = (layer.queries, layer.keys) if layer.steps is None else (layer.steps,)
    return choose(float(choose(values.flatten().tolist())) for values in sides)


def _inline(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704 - drawn by this package


def _number(value: float | None, *, digits: int = 1) -> str | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return "infinite"
    if value < 1e6 or digits == 0:
        return f"{value:,.{0 if value >= 1000 else digits}f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _minutes(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
