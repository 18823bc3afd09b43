"""Plots of runs and of learned proportions, as matplotlib figures and as SVG that follows a page's colours.

The figures are made without pyplot, so no global state is touched. They are drawn narrow (a phone's width) with text at
reading size, and grow with the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leapformer.errors import MissingExtra

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
    from matplotlib.transforms import Bbox
except ImportError as error:
    raise MissingExtra("plots", package="matplotlib", purpose="drawing plots") from error

from leapformer.analysis.runs import RunRecord, distinct_labels

if TYPE_CHECKING:
    from leapformer.analysis.proportions import LayerProportions

# Told apart by eye with any common colour blindness, and by line style and marker without colour.
SERIES_COLORS = ("#2a78d6", "#eb6834", "#1baa78", "#9a5bd2", "#c7931a", "#d6478f")
INK = "#23272d"
GRID = "#d5d8dc"
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH = 4.3
RESOLUTION = 160  # dots per inch of pictures that are no SVG


def learning_curves(runs: Sequence[RunRecord]) -> Figure:
    """Validation loss over training steps, one line per run, the training loss thin behind it."""
    figure, axes = _figure(height=3.3)
    validation_losses: list[float] = []
    for place, (run, label) in enumerate(zip(runs, distinct_labels(list(runs)), strict=True)):
        color = _color(place)
        axes.plot(*_smooth(*run.curve("loss")), color=color, linewidth=0.8, alpha=0.45)
        steps, losses = run.curve("eval_loss")
        validation_losses += losses
        axes.plot(
            steps,
            losses,
            color=color,
            linestyle=_cycle(LINE_STYLES, place),
            marker=_cycle(MARKERS, place),
            markersize=5,
            label=label,
        )
    if validation_losses:
        # The first steps of training would flatten all the rest.
        axes.set_ylim(top=max(validation_losses) + 0.25 * (max(validation_losses) - min(validation_losses)) + 0.02)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _legend(axes)
    return figure


def perplexity_by_position(runs: Sequence[RunRecord]) -> Figure:
    """Perplexity per token over the position inside a block: how much a model gains from a longer past."""
    figure, axes = _figure(height=3.3)
    for place, (run, label) in enumerate(zip(runs, distinct_labels(list(runs)), strict=True)):
        rows = run.results.get("perplexity_by_position") or []
        positions, values = _doubling_ranges([row for row in rows if row["perplexity"] is not None])
        axes.plot(
            positions,
            values,
            color=_color(place),
            linestyle=_cycle(LINE_STYLES, place),
            marker=_cycle(MARKERS, place),
            markersize=5,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.set_xlabel("tokens of context, up to (log scale)")
    axes.set_ylabel("perplexity per token (log scale)")
    _legend(axes)
    return figure


def quality_and_speed(runs: Sequence[RunRecord]) -> Figure:
    """Bits per byte against training speed, one point per run: lower and further right is better."""
    figure, axes = _figure(height=3.0)
    for place, (run, label) in enumerate(zip(runs, distinct_labels(list(runs)), strict=True)):
        speed, quality = run.results.get("tokens_per_second"), run.split().get("bits_per_byte")
        if speed is None or quality is None:
            continue
        axes.plot(
            [speed / 1000],
            [quality],
            color=_color(place),
            marker=_cycle(MARKERS, place),
            markersize=8,
            linestyle="none",
            label=label,
        )
    axes.margins(0.25)
    axes.set_xlabel("training speed (thousand tokens per second)")
    axes.set_ylabel("bits per byte")
    _legend(axes)
    return figure


@dataclass(frozen=True)
class Point:
    """One mechanism: examples a second, and accuracy in per cent."""

    label: str
    speed: float
    quality: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one and equals in the other, slowest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speed, -p.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front[::-1]


def quality_against_speed(points: Sequence[Point]) -> Figure:
    """Accuracy against examples a second (log scale over a wide range), each point with its name, the Pareto front as a
    line.
    """
    figure, axes = _figure(height=3.6)
    front = pareto_front(points)
    axes.plot([p.speed for p in front], [p.quality for p in front], color=GRID, linewidth=2, zorder=1)
    for place, point in enumerate(points):
        best = point in front
        axes.plot(
            [point.speed],
            [point.quality],
            color=_color(place),
            marker=_cycle(MARKERS, place),
            markersize=8,
            markerfacecolor=_color(place) if best else "none",
            linestyle="none",
            zorder=2,
        )
        axes.annotate(point.label, (point.speed, point.quality), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.margins(0.2)
    speeds = [point.speed for point in points]
    if max(speeds) > 4 * min(speeds):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("training examples per second (log scale)")
    else:  # a logarithmic axis would have one tick
        axes.set_xlabel("training examples per second")
    axes.set_ylabel("test accuracy (%)")
    return figure


@dataclass(frozen=True)
class Line:
    """One line over lengths; each point is (length, value, low, high), low and high drawn as a band."""

    label: str
    points: Sequence[tuple[float, float, float, float]]


def lines_over_length(lines: Sequence[Line], *, xlabel: str = "tokens", ylabel: str) -> Figure:
    """Values against length with both axes logarithmic, so that cost a x length^b is a straight line of slope b."""
    figure, axes = _figure(height=3.6)
    for place, line in enumerate(lines):
        lengths, values, low, high = zip(*line.points, strict=True)
        # Where colours come round again, the line style does not.
        style = _cycle(LINE_STYLES, place + place // len(SERIES_COLORS))
        axes.fill_between(lengths, low, high, color=_color(place), alpha=0.18, linewidth=0)
        axes.plot(
            lengths,
            values,
            color=_color(place),
            linestyle=style,
            marker=_cycle(MARKERS, place),
            markersize=5,
            label=line.label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _length_text(value)))
    axes.set_xlabel(f"{xlabel} (log scale)")
    axes.set_ylabel(f"{ylabel} (log scale)")
    _legend(axes)
    return figure


def ranked(values: Sequence[tuple[str, float, float, float]], *, title: str, xlabel: str, marked: str) -> Figure:
    """Named values with their p20 and p80, the largest on top: dots on a logarithmic axis, `marked` in a colour of its
    own.
    """
    ordered = sorted(values, key=lambda value: value[1])
    figure, axes = _figure(height=1.1 + 0.26 * len(ordered))
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    for place, (name, value, low, high) in enumerate(ordered):
        color = _color(1 if name == marked else 0)
        axes.plot([low, high], [place, place], color=color, linewidth=3, alpha=0.35)
        axes.plot([value], [place], color=color, marker="D" if name == marked else "o", markersize=6)
        label = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axes.annotate(label, (high, place), (6, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(ordered)), [name for name, *_ in ordered])
    axes.set_xscale("log")
    axes.margins(x=0.14)
    left, right = axes.get_xlim()
    axes.set_xticks(_round_numbers(left, right))
    axes.set_xlim(left, right)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{xlabel} (log scale)")
    return figure


def _length_text(length: float) -> str:
    """512, 4k, 1M: powers of two in the way people say them."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if length >= size:
            return f"{length / size:g}{letter}"
    return f"{length:g}"


def proportions(layers: Sequence[LayerProportions]) -> list[Figure]:
    """Learned proportions along the tokens of a text: one figure per layer, one panel per head, queries and keys."""
    return [_layer_proportions(layer) for layer in layers]


@dataclass(frozen=True)
class Panel:
    """Costs of the cells of a grid, in their order, None where one is not known; cells beside one another stay so."""

    xlabel: str
    costs: Sequence[float | None]


def quality_against_costs(
    cells: Sequence[tuple[str, float, float | None]], panels: Sequence[Panel], *, ylabel: str
) -> Figure:
    """The quality of named cells, with bars of one standard error, against a cost in each panel.

    Arguments:
        cells: name, quality and standard error, None where it is not known.
        panels: one below the other.
        ylabel: of the quality, with its direction.
    """
    rows = len(panels)
    figure = Figure(figsize=(1.5 * WIDTH, 0.4 + (2.9 + 0.12 * max(0, len(cells) - 6)) * rows), layout="constrained")
    every = figure.subplots(rows, 1, squeeze=False).flat
    for axes, panel in zip(every, panels, strict=True):
        _style(axes)
        for place, ((_, quality, error), cost) in enumerate(zip(cells, panel.costs, strict=True)):
            if cost is None:
                continue
            axes.errorbar(
                [cost],
                [quality],
                yerr=error,
                color=_color(place),
                marker=_cycle(MARKERS, place + place // len(SERIES_COLORS)),
                markersize=7,
                linestyle="none",
                capsize=3,
                elinewidth=1.2,
            )
        _cost_axis(axes, panel)
        axes.set_ylabel(ylabel)
    figure.draw_without_rendering()  # places of labels depend on where the axes end up
    figure.set_layout_engine("none")
    for axes, panel in zip(figure.axes, panels, strict=True):
        known = [(n, c, q, e or 0.0) for (n, q, e), c in zip(cells, panel.costs, strict=True) if c is not None]
        _label_points(axes, known)
    return figure


def _cost_axis(axes: Axes, panel: Panel) -> None:
    """Linear over a narrow range, logarithmic over a wide one, with room for labels at the sides."""
    costs = [cost for cost in panel.costs if cost is not None and cost > 0]
    wide = len(costs) > 1 and max(costs) > 4 * min(costs)
    axes.set_xlabel(f"{panel.xlabel} (log scale)" if wide else panel.xlabel)
    axes.margins(x=0.3, y=0.2)
    if wide:
        axes.set_xscale("log")
        left, right = axes.get_xlim()
        axes.set_xticks(_round_numbers(left, right))
        axes.set_xlim(left, right)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if costs and max(costs) - min(costs) < 1e-3 * max(costs):  # all alike: no ticks finer than the difference
        middle = max(costs)
        axes.set_xlim(0.9 * middle, 1.1 * middle)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _amount(value)))


def _amount(value: float) -> str:
    """1.2M, 450k, 12.5: numbers as people say them."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _label_points(axes: Axes, points: Sequence[tuple[str, float, float, float]]) -> None:
    """Write a name beside each point (name, x, y, half of its bar), where it covers no other name, point or bar.

    Places farther away, with a thin line to the point, are tried after those beside it; where all are taken, the one
    that covers least is used all the same.
    """
    figure: Any = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [_mark_box(axes, *place, radius=5 * figure.dpi / 72) for _, *place in points]
    for name, x, y, _ in points:
        tries: list[tuple[int, Any, Bbox]] = []
        for offset in _label_offsets():
            text = _label(axes, name, (x, y), offset)
            box = text.get_window_extent(renderer)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            tries.append((sum(box.overlaps(other) for other in taken) + 3 * outside, text, box))
            if tries[-1][0] == 0:
                break
        _, best, box = min(tries, key=lambda tried: tried[0])
        for _, text, _ in tries:
            if text is not best:
                text.remove()
        taken.append(box)


def _mark_box(axes: Axes, x: float, y: float, error: float, *, radius: float) -> Bbox:
    """Where a point with its bar is, in dots."""
    across, middle = axes.transData.transform((x, y))
    low, high = (axes.transData.transform((x, y + shift))[1] for shift in (-error, error))
    return Bbox.from_extents(across - radius, min(low, middle - radius), across + radius, max(high, middle + radius))


def _label(axes: Axes, name: str, point: tuple[float, float], offset: tuple[float, float]) -> Any:
    """A name at an offset from its point, with a line between them where it is far."""
    right, up = offset
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 4}
    return axes.annotate(
        name.replace("$", r"\$"),  # a name is no formula
        point,
        offset,
        textcoords="offset points",
        ha="left" if right > 0 else "right" if right < 0 else "center",
        va="center" if right else "bottom" if up > 0 else "top",
        fontsize=8,
        color=INK,
        arrowprops=line if abs(up) > 12 else None,
    )


def _label_offsets() -> list[tuple[float, float]]:
    """Where the name of a point may stand, in points to the right of it and above it, the best first."""
    beside = [(9.0, 0.0), (-9.0, 0.0), (9.0, 9.0), (9.0, -9.0), (-9.0, 9.0), (-9.0, -9.0), (0.0, 9.0), (0.0, -9.0)]
    farther = [(side * 16.0, up * far) for far in (20.0, 32.0, 44.0, 56.0) for up in (1, -1) for side in (1, -1)]
    return [*beside, *farther]


def figure_svg(figure: Figure, *, prefix: str = "") -> str:
    """The figure as an inline `<svg>` element.

    Text stays text, the ink follows `currentColor`, and the series and the grid follow the CSS variables `--series-1`,
    `--series-2`, ... and `--grid`, with the figure's own colours where a page sets none.

    Arguments:
        figure: a figure of this module.
        prefix: put before every id, so that several figures can share a page.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "leapformer"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(GRID, f"var(--grid, {GRID})")
    for place, color in enumerate(SERIES_COLORS, start=1):
        svg = svg.replace(color, f"var(--series-{place}, {color})")
    # Inside HTML the namespaces are implied, and an id is unique in the page.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    opening, rest = svg.split(">", 1)
    # Without a size of its own it takes the width it is given, in the proportions of its viewBox.
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest


def figure_svg_file(figure: Figure) -> bytes:
    """The figure as an SVG file of its own, on white; its text stays text."""
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "leapformer"}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def figure_png(figure: Figure) -> bytes:
    """The figure as a picture, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION, facecolor="white")
    return buffer.getvalue()


def _layer_proportions(layer: LayerProportions) -> Figure:
    heads = max(layer.queries.shape[1], layer.keys.shape[1])
    running = layer.steps is not None
    sides = (
        [("queries and keys", layer.keys, 0)] if running else [("queries", layer.queries, 0), ("keys", layer.keys, 1)]
    )
    one, what = ("clock", "turns") if running else ("head", "proportion")
    columns = 1 if heads == 1 else 2
    rows = math.ceil(heads / columns)
    figure = Figure(figsize=(WIDTH, 0.75 + 1.25 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.set_visible(False)
            continue
        _style(axes)
        # A module shared by grouped keys has fewer key heads than query heads.
        for side, values, place in sides:
            column = values[:, head * values.shape[1] // heads].tolist()
            axes.plot(range(len(column)), column, color=_color(place), linewidth=1.0, label=side)
        if layer.steps is None:
            axes.set_ylim(-0.03, 1.03)
            axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])
        else:
            axes.set_yscale("symlog", linthresh=0.1)  # clocks differ by powers of ten
        axes.set_title(f"{one} {head + 1}", fontsize=9, color=INK, loc="left", pad=2)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    figure.supxlabel("token", fontsize=9, color=INK)
    figure.supylabel(what, fontsize=9, color=INK)
    return figure


def _doubling_ranges(rows: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """Last position (from 1) and perplexity of ranges that double in length, out of finer ranges by position.

    Arguments:
        rows: "start", "end" (excluded), "tokens" and "perplexity" each, in order.
    """
    ends: list[float] = []
    perplexities: list[float] = []
    nats = tokens = 0.0
    limit = rows[0]["end"] if rows else 0
    for place, row in enumerate(rows):
        nats += row["tokens"] * math.log(row["perplexity"])
        tokens += row["tokens"]
        if row["end"] >= limit or place + 1 == len(rows):
            ends.append(row["end"])
            perplexities.append(math.exp(nats / tokens))
            nats = tokens = 0.0
            limit = 2 * row["end"]
    return ends, perplexities


def _smooth(steps: list[float], values: list[float], *, window: int = 5) -> tuple[list[float], list[float]]:
    """Centred moving average, shorter at both ends."""
    half = window // 2
    slices = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return steps, [sum(part) / len(part) for part in slices]


def _figure(*, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_linewidth(0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(9.5)


def _plain_ticks(axes: Axes) -> None:
    """Numbers as people write them on log axes, not powers."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    ticks = _round_numbers(low, high)
    axes.set_yticks(ticks if len(ticks) > 1 else MaxNLocator(nbins=4).tick_values(low, high))
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _round_numbers(low: float, high: float) -> list[float]:
    """The 1-2-5 series (1-1.5-2-3-5-7 over less than one decade) between two positive numbers."""
    steps = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            [label.replace("$", r"\$") for label in labels],  # the name of a run is no formula
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=_columns_that_fit(labels),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            borderaxespad=0.2,
            columnspacing=1.2,
        )


def _columns_that_fit(labels: Sequence[str], *, characters: int = 48) -> int:
    """Columns of a legend as wide as a figure; a handle and its spaces take about six characters."""
    longest = max(len(label) for label in labels) + 6
    return max(1, min(len(labels), characters // longest))


def _color(place: int) -> str:
    return SERIES_COLORS[place % len(SERIES_COLORS)]


def _cycle(choices: Sequence[Any], place: int) -> Any:
    return choices[place % len(choices)]
