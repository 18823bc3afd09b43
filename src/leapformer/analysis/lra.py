"""The table of Long-Range Arena: tasks by mechanisms, beside trivial baselines and published figures, and its page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapformer.analysis.plots import Point, figure_svg, pareto_front, quality_against_speed
from leapformer.analysis.runs import RunRecord
from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.showing import cut
from leapformer.files.writing import write_text
from leapformer.nn import by_row

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise MissingExtra("plots", package="jinja2", purpose="writing a report page") from error

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
NAMES = {mechanism.name: mechanism.label for mechanism in by_row() if mechanism.compared}
# Test accuracy in per cent of the same small model after 50,000 steps, three seeds: Skyformer, arXiv 2111.00035, table
# 1.
PUBLISHED = {
    "softmax": {"text": 61.95, "listops": 38.37, "retrieval": 80.69, "pathfinder": 65.26, "image": 40.57},
    "nystromformer": {"text": 64.83, "listops": 38.51, "retrieval": 80.52, "pathfinder": 69.48, "image": 41.30},
    "linformer": {"text": 58.93, "listops": 37.45, "retrieval": 78.19, "pathfinder": 60.93, "image": 37.96},
    "informer": {"text": 62.64, "listops": 32.53, "retrieval": 77.57, "pathfinder": 57.83, "image": 38.10},
    "performer": {"text": 64.19, "listops": 38.02, "retrieval": 80.04, "pathfinder": 66.30, "image": 41.43},
    "reformer": {"text": 62.93, "listops": 37.68, "retrieval": 78.99, "pathfinder": 66.49, "image": 48.87},
    "bigbird": {"text": 63.86, "listops": 39.25, "retrieval": 80.28, "pathfinder": 68.72, "image": 43.16},
    "skyformer": {"text": 64.70, "listops": 38.69, "retrieval": 82.06, "pathfinder": 70.73, "image": 40.77},
}
COLUMNS = [
    "attention",
    "seeds",
    "accuracy %",
    "commonest class %",
    "root operator %",
    "published %",
    "train examples/s",
    "inference examples/s",
    "MiB",
    "parameters",
    "of LeaP %",
    "impl",
]
SPLIT = "test"


@dataclass(frozen=True)
class Cell:
    """The seeds of one task and mechanism. Accuracies and baselines are shares, not per cent.

    Attributes:
        learned: whether the mean is more than two standard errors above the best trivial baseline.
    """

    task: str
    attention: str
    runs: Sequence[RunRecord]

    @property
    def accuracies(self) -> list[float]:
        return [run.split(SPLIT)["accuracy"] for run in self.runs]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def baseline(self) -> float:
        split = self.runs[0].split(SPLIT)
        return max(split["majority_accuracy"], split.get("root_operator_accuracy") or 0.0)

    @property
    def error(self) -> float:
        """Standard error of the mean: the larger of that from the test examples and that from the seeds."""
        examples = self.runs[0].split(SPLIT)["examples"]
        own = math.sqrt(self.accuracy * (1 - self.accuracy) / examples)
        seeds = statistics.stdev(self.accuracies) / math.sqrt(len(self.runs)) if len(self.runs) > 1 else 0.0
        return max(own, seeds)

    @property
    def learned(self) -> bool:
        return self.accuracy > self.baseline + 2 * self.error

    def mean(self, key: str) -> float | None:
        known = [run.results[key] for run in self.runs if run.results.get(key) is not None]
        return statistics.fmean(known) if known else None

    def text(self) -> str:
        """Accuracy in per cent with the deviation over seeds, or that nothing was learned."""
        spread = f" ± {100 * statistics.stdev(self.accuracies):.2f}" if len(self.runs) > 1 else ""
        value = f"{100 * self.accuracy:.2f}{spread}"
        return value if self.learned else f"not learned ({value})"


def check_tested(run: RunRecord) -> RunRecord:
    """The run, whose results have what a cell needs.

    Raises:
        LeapformerError: something is missing.
    """
    needed = {
        f"splits.{SPLIT}.{name}": run.split(SPLIT).get(name) for name in ("accuracy", "majority_accuracy", "examples")
    }
    needed |= {name: run.results.get(name) for name in ("parameters", "parameters_leap", "seed")}
    for name, value in needed.items():
        if value is None:
            raise LeapformerError(f"{cut(run.folder, 240)}/results.json: expected the key {name}, found none")
    return run


def task_rows(cells: Sequence[Cell], task: str) -> list[list[str]]:
    """Rows under COLUMNS for one task, best accuracy first."""
    own = sorted((cell for cell in cells if cell.task == task), key=lambda cell: -cell.accuracy)
    return [_row(cell) for cell in own]


def _row(cell: Cell) -> list[str]:
    first = cell.runs[0]
    split = first.split(SPLIT)
    root = split.get("root_operator_accuracy")
    published = PUBLISHED.get(cell.attention, {}).get(cell.task)
    share = 100 * first.results["parameters_leap"] / max(first.results["parameters"], 1)

    def number(key: str, digits: int) -> str:
        value = cell.mean(key)
        return "-" if value is None else f"{value:,.{digits}f}"

    return [
        NAMES[cell.attention],
        ", ".join(str(run.results["seed"]) for run in cell.runs),
        cell.text(),
        f"{100 * split['majority_accuracy']:.2f}",
        "-" if root is None else f"{100 * root:.2f}",
        "-" if published is None else f"{published:.2f}",
        number("examples_per_second", 1),
        number("inference_examples_per_second", 1),
        number("peak_memory_mib", 0),
        f"{first.results['parameters']:,}",
        f"{share:.2f}",
        str(first.results.get("impl", "-")),
    ]


def overview(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: one row for each mechanism, accuracy by task, and the average where every task is there."""
    tasks = [task for task in TASKS if any(cell.task == task for cell in cells)]
    rows = []
    for attention in NAMES:
        own = {cell.task: cell for cell in cells if cell.attention == attention}
        if not own:
            continue
        whole = len(own) == len(tasks) > 1
        average = f"{100 * statistics.fmean(cell.accuracy for cell in own.values()):.2f}" if whole else "-"
        rows.append([NAMES[attention], *(own[task].text() if task in own else "-" for task in tasks), average])
    return ["attention", *tasks, "average"], rows


def points(cells: Sequence[Cell], task: str, key: str = "examples_per_second") -> list[Point]:
    """Accuracy in per cent against examples a second, for the picture of one task."""
    own = [cell for cell in cells if cell.task == task]
    return [Point(NAMES[c.attention], speed, 100 * c.accuracy) for c in own if (speed := c.mean(key)) is not None]


def write_lra_page(path: str | Path, cells: Sequence[Cell], *, command: str) -> Path:
    """Write one self-contained page with the tables and a picture for each task, whole or not at all."""
    path, page = Path(path), render_lra_page(cells, command=command)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def render_lra_page(cells: Sequence[Cell], *, command: str) -> str:
    """The page as HTML; at least one cell."""
    environment = Environment(
        loader=PackageLoader("leapformer.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns, rows = overview(cells)
    first: Mapping[str, Any] = cells[0].runs[0].results
    tasks = [
        {
            "name": task,
            "rows": task_rows(cells, task),
            "front": ", ".join(point.label for point in pareto_front(points(cells, task))),
            "picture": Markup(figure_svg(quality_against_speed(points(cells, task)), prefix=f"{task}-")),
        }
        for task in TASKS
        if any(cell.task == task for cell in cells)
    ]
    return environment.get_template("lra.html.j2").render(
        columns=COLUMNS,
        overview_columns=columns,
        overview_rows=rows,
        tasks=tasks,
        machine={name: value for name, value in (first.get("machine") or {}).items() if value is not None},
        versions=first.get("versions") or {},
        git=first.get("git"),
        command=command,
    )
