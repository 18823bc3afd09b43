"""Plots show what is in the runs, and their SVG can stand in a page."""

import math
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
import torch

from leapformer.analysis.plots import (
    Line,
    figure_svg,
    figure_svg_file,
    learning_curves,
    lines_over_length,
    perplexity_by_position,
    proportions,
    quality_and_speed,
    ranked,
)
from leapformer.analysis.proportions import LayerProportions
from leapformer.analysis.runs import load_run
from tests.analysis.builders import write_run


@pytest.fixture
def runs(tmp_path):
    return [load_run(write_run(tmp_path, name, perplexity=value)) for name, value in (("leap", 310), ("softmax", 305))]


def labelled_lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_learning_curves_hold_every_evaluation(runs):
    lines = labelled_lines(learning_curves(runs))
    assert list(lines) == ["LeaPformer", "softmax"]
    steps, losses = runs[0].curve("eval_loss")
    assert lines["LeaPformer"].get_xdata().tolist() == steps
    assert lines["LeaPformer"].get_ydata().tolist() == losses


def test_lines_over_length_are_logarithmic_with_lengths_as_people_say_them():
    points = [(512, 1.0, 0.9, 1.1), (4096, 8.0, 7.0, 9.0), (1048576, 2048.0, 2000.0, 2100.0)]
    figure = lines_over_length([Line(f"line {n}", points) for n in range(8)], ylabel="ms")
    (axes,) = figure.axes
    lines = labelled_lines(figure)
    assert len(lines) == 8 and lines["line 0"].get_xdata().tolist() == [512, 4096, 1048576]
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_ylabel() == "ms (log scale)"
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(looks) == 8  # more lines than colours are still told apart
    ticks = [axes.xaxis.get_major_formatter()(length, 0) for length in (512, 4096, 1048576)]
    assert ticks == ["512", "4k", "1M"]


def test_ranked_values_have_the_largest_on_top_and_say_it():
    values = [("slow", 1.5, 1.0, 2.0), ("fast", 1234.0, 1200.0, 1300.0), ("ours", 30.0, 29.0, 31.0)]
    (axes,) = ranked(values, title="train step", xlabel="examples a second", marked="ours").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["slow", "ours", "fast"]
    assert [text.get_text() for text in axes.texts] == ["1.5", "30", "1,234"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "examples a second (log scale)"
    dots = axes.get_lines()[1::2]
    assert [dot.get_xdata()[0] for dot in dots] == [1.5, 30.0, 1234.0]
    assert dots[1].get_color() != dots[0].get_color() == dots[2].get_color()


def test_perplexity_by_position_averages_over_doubling_ranges(runs):
    line = labelled_lines(perplexity_by_position(runs))["LeaPformer"]
    assert line.get_xdata().tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 255]
    rows = runs[0].results["perplexity_by_position"]
    expected = math.exp(sum(math.log(row["perplexity"]) for row in rows[4:8]) / 4)
    assert line.get_ydata()[3] == pytest.approx(expected)


def test_quality_and_speed_has_a_point_per_run(runs):
    points = labelled_lines(quality_and_speed(runs))
    assert {label: (line.get_xdata()[0], line.get_ydata()[0]) for label, line in points.items()} == {
        "LeaPformer": (pytest.approx(10.3102), pytest.approx(math.log2(310) * 0.15)),
        "softmax": (pytest.approx(8.7709), pytest.approx(math.log2(305) * 0.15)),
    }


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (4, 2)])
def test_proportions_have_a_panel_per_head(heads, key_heads):
    layer = LayerProportions("layer", torch.rand(6, heads), torch.rand(6, key_heads))
    (figure,) = proportions([layer])
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == heads
    queries, keys = panels[-1].get_lines()
    assert queries.get_ydata().tolist() == layer.queries[:, -1].tolist()
    assert keys.get_ydata().tolist() == layer.keys[:, -1].tolist()


def test_svg_is_whole_follows_the_page_and_loads_nothing(runs):
    before = dict(matplotlib.rcParams)
    svg = figure_svg(learning_curves(runs), prefix="one-")
    assert dict(matplotlib.rcParams) == before
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert "viewBox" in root.attrib and "width" not in root.attrib
    assert "var(--series-1, " in svg and "currentColor" in svg
    assert "http" not in svg
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    assert ids and all(name.startswith("one-") for name in ids)
    references = [element.attrib["href"] for element in root.iter() if "href" in element.attrib]
    assert references and all(reference[1:] in ids for reference in references)


def test_long_labels_and_nearly_equal_values_leave_room_for_the_plot(tmp_path):
    rows = [{"start": start, "end": start + 16, "tokens": 9, "perplexity": 220.0 + start / 99} for start in (0, 16, 32)]
    changes = {"perplexity_by_position": rows, "variant": "a long name of a variant"}
    runs = [load_run(write_run(tmp_path, name, **changes)) for name in ("leap", "cosformer", "softmax")]
    figure = perplexity_by_position(runs)
    figure_svg(figure)
    (axes,) = figure.axes
    assert axes.get_position().width > 0.7
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


def test_a_run_without_events_gives_an_empty_plot_and_no_error(tmp_path):
    folder = write_run(tmp_path, "leap", splits={}, perplexity_by_position=[])
    folder.joinpath("metrics.jsonl").unlink()
    run = load_run(folder)
    for plot in (learning_curves, quality_and_speed):
        assert figure_svg(plot([run])).startswith("<svg")


def test_a_file_of_its_own_is_whole_svg(runs):
    content = figure_svg_file(learning_curves(runs)).decode()
    root = ElementTree.fromstring(content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox") and ">training step<" in content
