"""What a grid shows: means, paired differences and their errors, held against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest

from leapformer.analysis.ablation import (
    ablation,
    ablation_csv,
    ablation_json,
    ablation_markdown,
    ablation_picture,
    ablation_rows,
    chance_of_two_errors,
    verdict,
)
from leapformer.analysis.runs import RunRecord
from leapformer.analysis.tables import mean_and_error
from leapformer.errors import LeapformerError
from leapformer.training.results import LOSS, Metric

from .builders import curve_point, results, translation_results


def run(bits: float, /, *, seed: int = 0, **changes) -> RunRecord:
    content = results("leap", perplexity=300.0, task="lm", seed=seed, **changes)
    content["splits"]["validation"]["bits_per_byte"] = bits
    return RunRecord(folder=Path(f"run-{seed}"), results=content)


def seeds(*bits: float, **changes) -> list[RunRecord]:
    return [run(value, seed=seed, **changes) for seed, value in enumerate(bits)]


GRID = {
    "softmax": seeds(2.0, 2.5, 3.0, parameters=1_000, parameters_leap=0, seconds=10.0, steps=400, state_bytes=4_096),
    "leap": seeds(1.9, 2.3, 2.7, parameters=1_250, parameters_leap=50, seconds=30.0, steps=400, state_bytes=1_024),
    "linear": seeds(2.1, 2.4, 3.1),
    "single": seeds(1.0),
    "nothing": [],
}


def test_a_mean_and_its_standard_error():
    # Deviations -0.5, 0, 0.5: variance 0.5 / 2, standard deviation 0.5, divided by the root of three.
    assert mean_and_error([2.0, 2.5, 3.0]) == pytest.approx((2.5, 0.5 / math.sqrt(3)))
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    mean, error = mean_and_error([7.0])
    assert mean == 7.0 and math.isnan(error)


def test_differences_are_taken_seed_by_seed():
    cells = {cell.name: cell for cell in ablation(GRID, baseline="softmax").cells}
    leap = cells["leap"]
    # -0.1, -0.2 and -0.3: mean -0.2, standard deviation 0.1.
    assert (leap.difference, leap.difference_error) == pytest.approx((-0.2, 0.1 / math.sqrt(3)))
    assert (leap.pairs, leap.verdict) == (3, "better")
    assert (leap.mean, leap.error) == pytest.approx((2.3, 0.4 / math.sqrt(3)))
    assert (leap.milliseconds, leap.parameters, leap.parameters_leap, leap.state_bytes) == (75.0, 1_250, 50, 1_024)
    # 0.1, -0.1 and 0.1: mean 1/30, squares of the deviations 1/225, 4/225, 1/225, so a variance of 1/75.
    linear = cells["linear"]
    assert (linear.difference, linear.difference_error) == pytest.approx((1 / 30, math.sqrt(1 / 75 / 3)))
    assert (linear.verdict, linear.state_bytes) == ("none", None)
    single = cells["single"]
    assert (single.difference, single.difference_error, single.verdict) == (-1.0, None, "one seed")
    assert (single.mean, single.error) == (1.0, None)
    assert cells["softmax"].verdict == "baseline" and cells["softmax"].difference is None
    nothing = cells["nothing"]
    assert (nothing.mean, nothing.parameters, nothing.verdict, nothing.values) == (None, None, "not measured", {})


def test_only_seeds_in_common_are_compared():
    cells = {"a": [run(2.0, seed=0), run(3.0, seed=1)], "b": [run(1.5, seed=1), run(9.0, seed=2)]}
    b = ablation(cells, baseline="a").cells[1]
    assert (b.pairs, b.difference, b.verdict) == (1, -1.5, "one seed")
    cells = {"a": [run(2.0, seed=0)], "b": [run(1.5, seed=1)]}
    assert ablation(cells, baseline="a").cells[1].verdict == "not measured"
    assert ablation({"a": [], "b": [run(1.5)]}, baseline="a").cells[1].verdict == "not measured"


@pytest.mark.parametrize(
    ("difference", "error", "better", "expected"),
    [
        (-0.3, 0.1, "lower", "better"),
        (-0.3, 0.1, "higher", "worse"),
        (0.3, 0.1, "lower", "worse"),
        (0.3, 0.1, "higher", "better"),
        (0.25, 0.125, "lower", "none"),  # at two standard errors
        (0.0, 0.0, "lower", "none"),
        (0.3, None, "lower", "one seed"),
        (None, None, "lower", "not measured"),
    ],
)
def test_verdicts(difference, error, better, expected):
    assert verdict(difference, error, metric=Metric("x", "x", 1, better=better)) == expected


def test_the_chance_of_a_false_alarm_is_that_of_students_t():
    # One degree of freedom is Cauchy's distribution; two: 1 - 2 / sqrt(2 + 4).
    assert chance_of_two_errors(2) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert chance_of_two_errors(3) == pytest.approx(1 - 2 / math.sqrt(6))
    # Integrals of the density, from its definition.
    for pairs in (4, 5, 8, 11):
        assert chance_of_two_errors(pairs) == pytest.approx(1 - 2 * integral_of_density(pairs - 1), abs=1e-6)


def integral_of_density(freedom: int, *, intervals: int = 2_000) -> float:
    """Student's density from 0 to 2 by Simpson's rule."""
    factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    width = 2 / intervals
    total = 0.0
    for place in range(intervals + 1):
        weight = 1 if place in (0, intervals) else 4 if place % 2 else 2
        total += weight * (1 + (place * width) ** 2 / freedom) ** (-(freedom + 1) / 2)
    return factor * total * width / 3


def test_the_table_says_what_the_numbers_allow():
    found = ablation(GRID, baseline="softmax")
    columns, rows = ablation_rows(found)
    assert columns == ["cell", "seeds", "bits per byte", "difference", "parameters", "ms/step", "state KiB"]
    assert rows == [
        ["softmax", "3", "2.5000 ± 0.2887", "baseline", "1,000", "25.0", "4.0"],
        ["leap", "3", "2.3000 ± 0.2309", "better -0.2000 ± 0.0577", "1,250", "75.0", "1.0"],
        ["linear", "3", "2.5333 ± 0.2963", "none (+0.0333 ± 0.0667)", "412,345", "233.5", "-"],
        ["single", "1", "1.0000", "one seed (-1.0000)", "412,345", "233.5", "-"],
        ["nothing", "0", "-", "-", "-", "-", "-"],
    ]
    text = ablation_markdown(found)
    assert "| leap | 3 | 2.3000 ± 0.2309 | better -0.2000 ± 0.0577 |" in text
    assert "bits per byte of the validation split, lower is better" in text
    # Three seeds: 1 - 2 / sqrt(6) = 0.18 for each of the two cells that have as many pairs.
    assert "over 3 seeds passes two standard errors in 18 of 100 cases (here: 0.4 of 2)" in text


def test_a_name_with_a_bar_stays_in_its_column():
    assert "| a\\|b | 1 |" in ablation_markdown(ablation({"a|b": seeds(1.0)}, baseline="a|b"))


def test_without_states_there_is_no_column_of_them():
    found = ablation({"a": seeds(1.0, 1.5)}, baseline="a")
    assert ablation_rows(found)[0][-1] == "ms/step" and "state" not in ablation_markdown(found)
    assert len(ablation_picture(found).axes) == 2


def test_all_numbers_are_in_the_files():
    found = ablation(GRID, baseline="softmax")
    content = ablation_json(found)
    assert content["metric"] == {"key": "bits_per_byte", "heading": "bits per byte", "better": "lower", "factor": 1.0}
    assert content["baseline"] == "softmax" and content["split"] == "validation"
    assert content["cells"][1]["values"] == {"0": 1.9, "1": 2.3, "2": 2.7}
    assert content["cells"][1]["difference"] == found.cells[1].difference
    rows = list(csv.DictReader(io.StringIO(ablation_csv(found))))
    assert [row["name"] for row in rows] == list(GRID)
    assert float(rows[1]["difference"]) == found.cells[1].difference and rows[0]["difference"] == ""
    assert (rows[1]["seed 1"], rows[3]["seed 1"], rows[1]["verdict"]) == ("2.3", "", "better")


def accuracy_run(share: float, seed: int) -> RunRecord:
    content = results("leap", perplexity=2.0, task="lra", seed=seed)
    content["splits"]["validation"] = {"loss": 1.0, "accuracy": share, "majority_accuracy": 0.5}
    return RunRecord(folder=Path(f"run-{seed}"), results=content)


def test_the_headline_of_the_task_decides_with_its_direction_and_format():
    cells = {
        "few": [accuracy_run(0.50, 0), accuracy_run(0.52, 1)],
        "many": [accuracy_run(0.60, 0), accuracy_run(0.63, 1)],
    }
    columns, rows = ablation_rows(ablation(cells, baseline="few"))
    assert columns[2] == "accuracy %"
    # 10 and 11 points more: mean 10.5, standard deviation 0.5 sqrt(2), divided by sqrt(2).
    assert rows[1][2:4] == ["61.500 ± 1.500", "better +10.500 ± 0.500"]


def translation(bleu: float | None, seed: int) -> RunRecord:
    points = None if bleu is None else [curve_point(5, bleu, 1800)]
    content = translation_results("leap", points=points, task="simulst", seed=seed)
    return RunRecord(folder=Path(f"run-{seed}"), results=content)


def test_what_stands_in_for_the_headline_does_so_for_all_or_none():
    found = ablation({"a": [translation(25.0, 0)], "b": [translation(27.0, 0)]}, baseline="a")
    assert found.metric.key == "BLEU" and found.cells[1].difference == 2.0
    found = ablation({"a": [translation(25.0, 0)], "b": [translation(27.0, 0)]}, baseline="a", metric="loss")
    assert found.metric == LOSS and found.cells[1].difference == 0.0
    found = ablation({"a": [translation(25.0, 0)], "b": [translation(None, 0)]}, baseline="a")
    assert found.metric.key == LOSS.key and found.cells[1].difference == 0.0


def test_faults():
    with pytest.raises(LeapformerError, match="expected at least one finished run"):
        ablation({"a": []}, baseline="a")
    lacking = run(1.0)
    del lacking.results["splits"]["validation"]["bits_per_byte"]
    with pytest.raises(LeapformerError, match="metric: expected one of bits_per_byte, loss, .*, found 'los'"):
        ablation(GRID, baseline="leap", metric="los")
    with pytest.raises(LeapformerError, match="run-0/results.json: expected bits per byte of the validation split"):
        ablation({"a": [lacking]}, baseline="a")


# ---- the picture


def test_the_picture_has_quality_with_bars_against_each_cost():
    figure = ablation_picture(ablation(GRID, baseline="softmax"))
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "parameters (log scale)",
        "milliseconds per training step (log scale)",
        "state, KiB",
    ]
    first, _, state = figure.axes
    assert first.get_ylabel() == "bits per byte (lower is better)"
    bars = [container.lines for container in first.containers]
    assert [points.get_xdata()[0] for points, _, _ in bars] == [1_000, 1_250, 412_345, 412_345]
    assert [points.get_ydata()[0] for points, _, _ in bars] == pytest.approx([2.5, 2.3, 7.6 / 3, 1.0])
    low, high = bars[0][2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((2.5 - 0.5 / math.sqrt(3), 2.5 + 0.5 / math.sqrt(3)))
    assert [text.get_text() for text in first.texts] == ["softmax", "leap", "linear", "single"]
    assert [text.get_text() for text in state.texts] == ["softmax", "leap"]


def test_names_cover_neither_one_another_nor_a_point():
    """Twelve cells of one size, whose points stand in one column with a name each."""
    cells = {f"learning_rate={place}e-3": seeds(2 + 0.02 * place, 2 + 0.021 * place) for place in range(12)}
    figure = ablation_picture(ablation(cells, baseline="learning_rate=0e-3"))
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 12
        overlapping = [(a, b) for a in range(12) for b in range(a) if boxes[a].overlaps(boxes[b])]
        points = [axes.transData.transform(c.lines[0].get_xydata()[0]) for c in axes.containers]
        covered = [box for box in boxes for point in points if box.contains(*point)]
        frame = axes.get_window_extent()
        outside = [box for box in boxes if box.x0 < frame.x0 or box.x1 > frame.x1]
        assert (overlapping, covered, outside) == ([], [], [])
