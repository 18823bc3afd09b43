"""Quality against lagging of translation runs: the picture, the table, quality at equal lagging, and what chance may
do.

A *curve* is what `leapformer evaluate RUN --k 1,3,5` writes into results.json under "curves": for each split a list of
scores, one entry for each k of wait-k and one for k = None, the whole source read first ("offline"). Those of other
policies (`--policy align-att --frames 2,4`) are under "policy_curves"; their option stands in the place of k below.
LAAL and the other delays are in milliseconds for speech and in words for text; here they are shown in seconds and
words.

Letters: N sentences, D draws of the bootstrap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from leapformer.analysis.plots import INK, MARKERS, SERIES_COLORS, WIDTH, _legend, _style
from leapformer.analysis.runs import RunRecord, distinct_labels
from leapformer.analysis.tables import groups, mean_text
from leapformer.errors import LeapformerError, MissingExtra

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtra("plots", package="matplotlib", purpose="drawing plots") from error

if TYPE_CHECKING:
    import numpy

Point = int | tuple[str, str, int | None] | None  # of wait-k its k; else the policy, its option and the value of that
Value = TypeVar("Value", "float", "numpy.ndarray")
DRAWS = 1000
SEED = 12345  # sacrebleu's own, so that its --confidence gives the same interval
ORDER = 4  # n-grams of BLEU


class Unit(NamedTuple):
    """What delays are shown in, and what one of results.json is in it."""

    name: str
    factor: float


UNITS = {"speech": Unit("s", 1e-3), "text": Unit("words", 1.0)}


@dataclass(frozen=True)
class System:
    """One line of the picture: runs that differ in nothing but the seed, measured on one split with one policy.

    Attributes:
        label: what pictures and tables call it.
        runs: at least one.
        split: whose curves are read.
        place: of its colour and marker among the series.
        policy: the name of its line among the runs' `policy_curves`; "": wait-k, whose curve they have of their own.
    """

    label: str
    runs: Sequence[RunRecord]
    split: str
    place: int
    policy: str = ""

    @property
    def unit(self) -> Unit:
        return UNITS[self.runs[0].results["source"]]

    @property
    def option(self) -> str:
        """What its points differ in: k, or the option of another policy ("": none)."""
        return self.runs[0].policy_curves(self.split)[self.policy].option if self.policy else "k"

    @property
    def ks(self) -> list[int]:
        """The k that all of its runs were measured with, rising; of a policy without an option one, 0."""
        measured = [set(self.points(run)) for run in self.runs]
        return sorted(k for k in set.intersection(*measured) if k is not None)

    def point(self, k: int | None) -> str:
        """What tables and pictures call a point."""
        if not self.policy:
            return "offline" if k is None else str(k)
        return f"{self.option}={k}" if self.option else ""

    def key(self, k: int | None) -> Point:
        """What tells a point of a run from its others."""
        return (self.policy, self.option, k) if self.policy else k

    def points(self, run: RunRecord) -> dict[int | None, dict[str, Any]]:
        """The scores of one run by k."""
        if not self.policy:
            return {point["k"]: point for point in run.latency_curve(self.split)}
        option, points = run.policy_curves(self.split)[self.policy]
        return {point.get(option, 0): point for point in points}

    def scores(self, run: RunRecord, k: int | None) -> dict[str, Any]:
        """Of one run; empty if not measured."""
        return self.points(run).get(k, {}) if self.policy else run.scores_at(k, self.split)

    def values(self, k: int | None, name: str) -> list[float]:
        """One score of each run, delays in the unit; empty where one of them lacks it."""
        factor = self.unit.factor if name in DELAYS else 1.0
        found = [self.scores(run, k).get(name) for run in self.runs]
        known = [value * factor for value in found if value is not None and math.isfinite(value)]
        return known if len(known) == len(found) else []

    def mean(self, k: int | None, name: str) -> float | None:
        values = self.values(k, name)
        return math.fsum(values) / len(values) if values else None


class Figures(NamedTuple):
    """A column of the table: heading and decimals. Delays have the unit put behind the heading."""

    heading: str
    digits: int


DELAYS = {
    "LAAL": Figures("LAAL", 2),
    "AL": Figures("AL", 2),
    "DAL": Figures("DAL", 2),
    "StartOffset": Figures("first word", 2),
    "LAAL_CA": Figures("LAAL_CA", 2),
}
SCORES = {
    "BLEU": Figures("BLEU", 2),
    "chrF": Figures("chrF", 2),
    **DELAYS,
    "AP": Figures("AP", 3),
    "real_time_factor": Figures("real-time factor", 3),
}


def systems(runs: Sequence[RunRecord], *, split: str, by_seed: bool = False) -> list[System]:
    """The lines of a picture, in the order of the runs.

    Arguments:
        runs: translation runs.
        split: whose curves are read.
        by_seed: a line for every run; else the seeds of a recipe become one.

    Raises:
        LeapformerError: no runs, one without a curve on the split, one of speech beside one of text, or of other
            sentences.
    """
    if not runs:
        raise LeapformerError("quality and latency: expected at least one run, found none")
    for run in runs:
        source = run.results.get("source")
        if source not in UNITS:
            raise LeapformerError(
                f"{run.folder}: expected a translation run (source {' or '.join(UNITS)}), found {source}"
            )
        if not _sentences(run, split):
            raise LeapformerError(
                f"{run.folder}: no scores by k on {split}; run: leapformer evaluate {run.folder} --split {split} "
                "--k 1,3,5,7,9"
            )
        if source != runs[0].results["source"]:
            raise LeapformerError(
                f"{run.folder}: expected a source of {runs[0].results['source']} as in {runs[0].folder}, found "
                f"{source}: "
                "seconds and words have no common axis"
            )
        expected = _sentences(runs[0], split)[0]
        other = next((size for size in _sentences(run, split) if size != expected), expected)
        if other != expected:
            raise LeapformerError(
                f"{run.folder}: expected {expected} sentences of {split} as in {runs[0].folder}, found {other}"
            )
    named = zip(distinct_labels(list(runs)), ([run] for run in runs), strict=True) if by_seed else groups(runs).items()
    return [line for place, (label, members) in enumerate(named) for line in _lines(label, members, split, place)]


def _lines(label: str, runs: Sequence[RunRecord], split: str, place: int) -> list[System]:
    """The lines of one model: wait-k, and each of the other policies that a run was measured with."""
    trained = [run for run in runs if run.latency_curve(split)]
    lines = [System(label, trained, split, place)] if trained else []
    for policy in dict.fromkeys(name for run in runs for name in run.policy_curves(split)):
        members = [run for run in runs if policy in run.policy_curves(split)]
        lines.append(System(f"{label}, {policy}", members, split, place, policy))
    return lines


def _sentences(run: RunRecord, split: str) -> list[int | None]:
    """How many sentences each curve of a run is of; empty where there is no curve."""
    curves = [run.latency_curve(split), *(curve.points for curve in run.policy_curves(split).values())]
    return [points[0].get("sentences") for points in curves if points]


# ---- the picture


def quality_latency(lines: Sequence[System]) -> Figure:
    """BLEU against LAAL, and below it against LAAL with the computation where that was measured.

    Each line has a point for every k, the k of a group of points written above it; bars are standard deviations over
    seeds. The dashed lines are what the same models reach when they hear the whole source first.
    """
    axes_of = [("LAAL", "lagging, LAAL")]
    if _has_times(lines):
        axes_of.append(("LAAL_CA", "lagging with computation, LAAL_CA"))
    figure = Figure(figsize=(WIDTH, 3.3 * len(axes_of) + 0.15 * len(lines)), layout="constrained")
    panels = figure.subplots(len(axes_of), 1, squeeze=False, sharey=True)[:, 0]
    for axes, (delay, name) in zip(panels, axes_of, strict=True):
        _style(axes)
        for line in lines:
            _draw(axes, line, delay)
        for option in dict.fromkeys(line.option for line in lines):
            _write_k(axes, [line for line in lines if line.option == option], delay, option)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.set_xlabel(f"{name} ({lines[0].unit.name})")
        axes.set_ylabel("BLEU")
    handles, _ = panels[0].get_legend_handles_labels()
    if any(line.mean(None, "BLEU") is not None for line in lines):
        panels[0].add_line(
            Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="offline: the whole source first")
        )
    if handles:
        _legend(panels[0])
    return figure


def _has_times(lines: Sequence[System]) -> bool:
    """Whether lagging with the computation was measured. Of text, delays are words and computation is time: no sum."""
    speech = lines[0].unit is UNITS["speech"]
    return speech and any(line.values(k, "LAAL_CA") for line in lines for k in line.ks)


def _draw(axes: Axes, line: System, delay: str) -> None:
    color = SERIES_COLORS[line.place % len(SERIES_COLORS)]
    marker = MARKERS[line.place % len(MARKERS)]
    points = _points(line, delay)
    if points:
        laggings, qualities = [x for _, x, _ in points], [y for _, _, y in points]
        axes.plot(
            laggings,
            qualities,
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            zorder=3,
            label=line.label,
            linestyle=":" if line.policy else "-",
            markerfacecolor="white" if line.policy else color,
        )
        if len(line.runs) > 1:
            spread = {name: [_deviation(line, k, name) for k, _, _ in points] for name in ("BLEU", delay)}
            axes.errorbar(
                laggings,
                qualities,
                yerr=spread["BLEU"],
                xerr=spread[delay],
                fmt="none",
                ecolor=color,
                elinewidth=0.9,
                capsize=2,
                zorder=2.5,
            )
    ceiling = line.mean(None, "BLEU")
    if ceiling is not None:
        axes.axhline(ceiling, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        # The marker at the end tells whose it is without the colour.
        axes.plot(
            [1.0],
            [ceiling],
            transform=axes.get_yaxis_transform(),
            color=color,
            marker=marker,
            markersize=5,
            markerfacecolor="none",
            clip_on=False,
            zorder=2,
        )


def _points(line: System, delay: str) -> list[tuple[int, float, float]]:
    """(k, lagging, BLEU), means over seeds, of those k that have both."""
    found = [(k, line.mean(k, delay), line.mean(k, "BLEU")) for k in line.ks]
    return [(k, x, y) for k, x, y in found if x is not None and y is not None]


def _deviation(line: System, k: int, name: str) -> float:
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(line.values(k, name)) if len(line.runs) > 1 else 0.0


def _write_k(axes: Axes, lines: Sequence[System], delay: str, option: str) -> None:
    """k, or another option, above the points."""
    points = [(k, x, y + _deviation(line, k, "BLEU")) for line in lines for k, x, y in _points(line, delay)]
    for text, x, y in k_labels(points, option=option) if option else []:
        axes.annotate(
            text,
            (x, y),
            (-5, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
            zorder=4,
        )


def k_labels(points: Sequence[tuple[int, float, float]], *, option: str = "k") -> list[tuple[str, float, float]]:
    """Labels (text, x, y) of points (k, x, y), each over the highest of the points that it names.

    Points of one k within a twelfth of the width share one, as the systems' mostly do. So do those of several k where
    labels would cover one another: within an eighth of the width, which a label takes, and a twelfth of the height.
    """
    if not points:
        return []
    _, xs, ys = zip(*points, strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    groups: list[list[tuple[int, float, float]]] = []
    for k, x, y in sorted(points):
        if groups and groups[-1][0][0] == k and x - groups[-1][0][1] <= width / 12:
            groups[-1].append((k, x, y))
        else:
            groups.append([(k, x, y)])
    labels: list[tuple[list[int], float, float]] = []
    for group in groups:
        k, x, y = max(group, key=lambda point: point[2])
        ks, left, top = labels[-1] if labels else ([], x, y)
        if ks and k not in ks and abs(x - left) <= width / 8 and abs(y - top) <= height / 12:
            labels[-1] = ([*ks, k], *((x, y) if y > top else (left, top)))
        else:
            labels.append(([k], x, y))
    return [(", ".join(f"{option}={k}" for k in ks), x, y) for ks, x, y in labels]


# ---- tables


Cells = tuple[list[str], list[list[str]]]
# Scores of D resampled test sets by the folder of the run and the key of the point.
Draws = Mapping[tuple[Path, Point], "numpy.ndarray"]


def latency_table(lines: Sequence[System], draws: Draws | None = None) -> Cells:
    """Columns and rows: the scores of each system at each k, offline last.

    Arguments:
        lines: of `systems`; the first is the baseline.
        draws: of `bootstrap_bleu`, all from one set of sentences. Systems whose runs are all there get the 95 %
            interval of BLEU, and the others the difference from the baseline with its interval.
    """
    draws = draws or {}
    unit = lines[0].unit.name
    measured = [name for name in SCORES if any(line.values(k, name) for line in lines for k in [*line.ks, None])]
    present = [name for name in measured if name != "LAAL_CA" or _has_times(lines)]
    columns = [
        "model",
        "k",
        *(f"{SCORES[name].heading} {unit}" if name in DELAYS else SCORES[name].heading for name in present),
    ]
    rows = []
    for line in lines:
        for k in [*line.ks, *([None] if line.values(None, "BLEU") else [])]:
            cells = [_cell(line, k, name) for name in present]
            rows.append([line.label, line.point(k), *cells])
            if draws:
                rows[-1][3:3] = _chance(line, _baseline_of(line, lines), k, draws)
    if draws:
        columns[3:3] = ["95 %", f"against {lines[0].label}"]
    return columns, rows


def _cell(line: System, k: int | None, name: str) -> str:
    """A score, that of quality with its deviation over seeds; the seeds' delays are nearly the same."""
    values = line.values(k, name) if name in ("BLEU", "chrF") else [line.mean(k, name)]
    return mean_text(values, SCORES[name].digits)


def _baseline_of(line: System, lines: Sequence[System]) -> System | None:
    """The first model's line of the same policy; None where it has none."""
    return next((each for each in lines if each.place == lines[0].place and each.policy == line.policy), None)


def _chance(line: System, baseline: System | None, k: int | None, draws: Draws) -> list[str]:
    """Interval of BLEU, and difference from the baseline with its interval; "-" where not known."""
    own, difference = _mean_draws(line, k, draws), "-"
    if own is not None and baseline is not None and line is not baseline:
        base, scores = _mean_draws(baseline, k, draws), (line.mean(k, "BLEU"), baseline.mean(k, "BLEU"))
        if base is not None and scores[0] is not None and scores[1] is not None:
            difference = f"{scores[0] - scores[1]:+.2f} {_interval_text(own - base)}"
    return ["-" if own is None else _interval_text(own), difference]


def _mean_draws(line: System, k: int | None, draws: Draws) -> numpy.ndarray | None:
    """D scores, each the mean over the seeds of the system on one resampled set."""
    return _average([draws.get((run.folder, line.key(k))) for run in line.runs])


def _average(samples: Sequence[numpy.ndarray | None]) -> numpy.ndarray | None:
    """Mean of arrays [D]; None where one is missing."""
    known = [each for each in samples if each is not None]
    return sum(known[1:], start=known[0]) / len(known) if len(known) == len(samples) else None


def _interval_text(samples: numpy.ndarray) -> str:
    low, high = interval(samples)
    return f"[{low:.2f}, {high:.2f}]"


def equal_lagging_table(lines: Sequence[System], draws: Draws | None = None) -> Cells:
    """Columns and rows: BLEU at equal LAAL, each curve interpolated on straight lines between its k, and the difference
    from the first system.

    The laggings are round ones that every curve reaches: nothing is extrapolated. Curves of other policies than wait-k,
    which may be short, stand at those that they reach. Of several seeds each is interpolated for itself, then averaged.
    With `draws`, the differences have their 95 % interval (the LAAL taken as it was measured).

    Returns:
        No columns and no rows for one system, and where the curves have no lagging in common.
    """
    baseline = lines[0]
    unit = baseline.unit.name
    rows = []
    decisive = [line for line in lines if line.policy == baseline.policy]
    for lagging in common_laggings(decisive) if len(lines) > 1 else []:
        base = _qualities_at(baseline, lagging)
        for line in lines:
            own = _qualities_at(line, lagging)
            if len(own) < len(line.runs):
                continue
            difference = math.fsum(own) / len(own) - math.fsum(base) / len(base)
            cell = "-" if line is baseline else f"{difference:+.2f}"
            samples, base_samples = (_draws_at(each, lagging, draws or {}) for each in (line, baseline))
            if line is not baseline and samples is not None and base_samples is not None:
                cell += f" {_interval_text(samples - base_samples)}"
            rows.append([line.label, f"{lagging:g}", mean_text(own, 2), cell])
    return (["model", f"LAAL {unit}", "BLEU", f"against {baseline.label}"], rows) if rows else ([], [])


def common_laggings(lines: Sequence[System]) -> list[float]:
    """A handful of round laggings that the curves of all runs reach; empty where there is none."""
    curves = [_curve(run, line) for line in lines for run in line.runs]
    if not all(curves):
        return []
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if low >= high:
        return [low] if low == high else []
    ticks = [round(float(tick), 9) for tick in MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high)]
    return [tick for tick in ticks if low <= tick <= high] or [low]


def interpolate(points: Sequence[tuple[float, Value]], at: float) -> Value | None:
    """The value, a number or an array, at `at` on straight lines between points (place, value); None outside them.

    Where several points have one place, the last counts.
    """
    places = dict(points)
    ordered = sorted(places)
    if not ordered or not ordered[0] <= at <= ordered[-1]:
        return None
    right = next(place for place in ordered if place >= at)
    left = max((place for place in ordered if place <= at), default=right)
    if left == right:
        return places[left]
    share = (at - left) / (right - left)
    return (1 - share) * places[left] + share * places[right]


def _curve(run: RunRecord, line: System) -> list[tuple[float, int]]:
    """(LAAL in the unit, k) of one run, lagging rising."""
    own = replace(line, runs=[run])
    return sorted((x, k) for k, x, _ in _points(own, "LAAL"))


def _qualities_at(line: System, lagging: float) -> list[float]:
    """BLEU of each run at one lagging, inside its curve."""
    found = []
    for run in line.runs:
        curve = [(x, float(line.scores(run, k)["BLEU"])) for x, k in _curve(run, line)]
        found.append(interpolate(curve, lagging))
    return [quality for quality in found if quality is not None]


def _draws_at(line: System, lagging: float, draws: Draws) -> numpy.ndarray | None:
    """D scores at one lagging, averaged over seeds."""
    found = []
    for run in line.runs:
        curve = [(x, draws.get((run.folder, line.key(k)))) for x, k in _curve(run, line)]
        known = [(x, samples) for x, samples in curve if samples is not None]
        found.append(interpolate(known, lagging) if len(known) == len(curve) else None)
    return _average(found)


# ---- what chance may do


@dataclass(frozen=True)
class SentenceCounts:
    """What BLEU counts in each sentence, so that any set of sentences is scored by a sum.

    Attributes:
        references: N of them.
        counts: integers [N, 2 + 2 ORDER]: words of the prediction and of the reference, n-grams of the prediction that
            the reference has, n-grams of the prediction; words as sacrebleu cuts them.
    """

    references: tuple[str, ...]
    counts: numpy.ndarray

    def score(self) -> float:
        """Corpus BLEU of all sentences, sacrebleu's."""
        return _bleu(self.counts.sum(axis=0).tolist())


def sentence_counts(predictions: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> SentenceCounts:
    """Count in N sentences.

    Arguments:
        predictions, references: one of each a sentence.
        tokenize: sacrebleu's name of a tokenizer.

    Raises:
        ValueError: no sentences, or other numbers of them.
        MissingExtra: sacrebleu is not installed.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(f"expected as many predictions as references, got {len(predictions)} and {len(references)}")
    try:
        import numpy
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtra("speech", package=error.name, purpose="BLEU") from None
    # The effective order only changes the sentence's own score, which is not used.
    metric = BLEU(tokenize=tokenize, max_ngram_order=ORDER, effective_order=True, force=True)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        found = metric.sentence_score(prediction, [reference])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return SentenceCounts(tuple(references), numpy.array(rows, dtype=numpy.int64))


def bootstrap_bleu(sentences: SentenceCounts, *, draws: int = DRAWS, seed: int = SEED) -> numpy.ndarray:
    """BLEU [D] of D sets of N sentences, drawn with replacement from the N (Koehn 2004).

    Equal N, `draws` and `seed` draw the same sentences, so that the difference of two systems' results is the paired
    bootstrap of their difference.

    Arguments:
        draws: D, at least 1.
    """
    import numpy

    number = len(sentences.references)
    drawn = numpy.random.default_rng(seed).integers(number, size=(draws, number))
    times = numpy.stack([numpy.bincount(row, minlength=number) for row in drawn])
    return numpy.array([_bleu(row) for row in (times @ sentences.counts).tolist()])


def interval(samples: numpy.ndarray) -> tuple[float, float]:
    """Ends of the middle 95 % of D values: those with a fortieth of the values below and above, as sacrebleu takes
    them.
    """
    ordered = sorted(samples.tolist())
    outside = len(ordered) // 40
    return ordered[outside], ordered[-1 - outside]


def check_paired(sentences: Mapping[Path, SentenceCounts]) -> None:
    """See that all logs are of the same sentences.

    Arguments:
        sentences: by the file that they were read from.

    Raises:
        LeapformerError: one has other references than the first.
    """
    first: tuple[Path, SentenceCounts] | None = None
    for path, own in sentences.items():
        first = first or (path, own)
        if own.references != first[1].references:
            raise LeapformerError(
                f"{path}: expected the {len(first[1].references)} references of {first[0]}, found "
                f"{len(own.references)} and not the same: only equal test sets compare"
            )


def _bleu(counts: Sequence[int]) -> float:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU.compute_bleu(
        correct=list(counts[2 : 2 + ORDER]),
        total=list(counts[2 + ORDER :]),
        sys_len=counts[0],
        ref_len=counts[1],
        smooth_method="exp",
        max_ngram_order=ORDER,
    ).score
