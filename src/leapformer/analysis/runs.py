"""A finished or running training run, read back from its folder: results.json and metrics.jsonl."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from leapformer.errors import LeapformerError
from leapformer.files.run_folder import RunFolder
from leapformer.files.showing import cut
from leapformer.nn import by_row
from leapformer.tasks.registry import TASKS, get_results, task_of
from leapformer.training.results import Metric, TaskResults

# What a reader recognises; the configuration's own words stay in results.json.
ATTENTION_NAMES = {mechanism.name: mechanism.label for mechanism in by_row()}
# Where a translation model has attention, in the order of results.json, as in "softmax/softmax/leap".
PLACES = ("encoder", "decoder", "cross")


class PolicyCurve(NamedTuple):
    """Scores of a translation model with a policy: `points`, one for each value of its `option` ("": it has none)."""

    option: str
    points: list[dict[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """What one run folder says about its run.

    Attributes:
        folder: where it was read from.
        results: the object in results.json, with the types of `files.records.ResultsRecord`.
        events: the rows of metrics.jsonl in order, one per log or evaluation.
    """

    folder: Path
    results: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run: that in results.json, else that of the folder."""
        return str(self.results.get("name") or self.folder.name)

    @property
    def label(self) -> str:
        """What plots and tables call it: the attention, with the variant and an added convolution where there is
        one.
        """
        return self._model + self._convolution

    @property
    def _model(self) -> str:
        attention, variant = self.results.get("attention", ""), self.results.get("variant") or "paper"
        parts = attention if isinstance(attention, list) else [attention]
        label = "+".join(dict.fromkeys(_attention_name(str(part)) for part in parts)) or self.name
        return label if variant == "paper" else f"{label} ({variant})"

    @property
    def _convolution(self) -> str:
        """That which was added; other variants than the paper's say how wide theirs is by their name."""
        convolution, variant = self.results.get("conv_width"), self.results.get("variant") or "paper"
        return f" + convolution {convolution}" if convolution and variant == "paper" else ""

    @property
    def declared(self) -> TaskResults:
        """What its task says of the figures that it has.

        Raises:
            LeapformerError: results.json names a task that is not there.
        """
        try:
            return get_results(task_of(self.results))
        except LeapformerError as error:
            raise LeapformerError(f"{cut(self.folder, 240)}/results.json: {error}") from None

    def figure(self, metric: Metric, split: str = "validation") -> tuple[Metric, float] | None:
        """A figure as it is shown, with the metric that stood in where it was not measured; None where nothing was."""
        if metric.source is None or self.results.get("source") == metric.source:
            held = {"split": self.split(split), "run": self.results}
            found = held[metric.place] if metric.place in held else self.scores_at(metric.k, split)
            value = found.get(metric.key)
            if value is not None:
                return metric, value if metric.factor == 1 else value * metric.factor
        return None if metric.instead is None else self.figure(metric.instead, split)

    def value(self, metric: Metric, split: str = "validation") -> float | None:
        """As `figure`, the number alone."""
        found = self.figure(metric, split)
        return None if found is None else found[1]

    def split(self, name: str = "validation") -> dict[str, Any]:
        """Results on one split of the data (empty when it wasn't evaluated)."""
        return self.results.get("splits", {}).get(name) or {}

    def curve(self, quantity: str) -> tuple[list[float], list[float]]:
        """Steps and values of every event that holds `quantity`, such as "loss" or "eval_loss"."""
        rows = [row for row in self.events if isinstance(row.get(quantity), int | float)]
        return [float(row["step"]) for row in rows], [float(row[quantity]) for row in rows]

    def latency_curve(self, split: str = "validation") -> list[dict[str, Any]]:
        """Scores of a translation model for each k, k rising and the offline ones (k None) last; empty if not
        measured.
        """
        points = self.results.get("curves", {}).get(split) or []
        return sorted(points, key=lambda point: math.inf if point["k"] is None else point["k"])

    def policy_curves(self, split: str = "validation") -> dict[str, PolicyCurve]:
        """Scores with policies other than wait-k, by the policy and what is fixed of it; empty if not measured."""
        lines = self.results.get("policy_curves", {}).get(split) or []
        return {line["label"]: PolicyCurve(line["option"], line["points"]) for line in lines}

    def scores_at(self, k: int | None, split: str = "validation") -> dict[str, Any]:
        """Scores at one k (None: offline), from the curve or else the evaluation after training; empty if not
        measured.
        """
        own = self.split(split)
        evaluated = [own] if "BLEU" in own and "k" in own else []
        return next((point for point in [*self.latency_curve(split), *evaluated] if point["k"] == k), {})


def load_run(folder: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        LeapformerError: no results.json (the run has not finished), or it is damaged. A damaged row of metrics.jsonl is
            left out.
    """
    run = RunFolder(folder)
    if not os.path.lexists(run.results_path):
        raise LeapformerError(f"{cut(run.path, 240)}: expected a finished run with results.json, found none")
    return RunRecord(folder=run.path, results=run.results(), events=run.metrics())


def declarations(runs: Sequence[RunRecord]) -> list[TaskResults]:
    """What the tasks of some runs declare, each once, in the order of the registry.

    Raises:
        LeapformerError: a run is of a task that is not there.
    """
    found = {task_of(run.results): run.declared for run in runs}
    return [found[name] for name in TASKS if name in found]


def common_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Labels of runs that stand beside one another: a convolution that all of them have tells none from another."""
    differ = len(runs) == 1 or len({run._convolution for run in runs}) > 1
    return [run.label if differ else run._model for run in runs]


def distinct_labels(runs: Sequence[RunRecord]) -> list[str]:
    """`common_labels`, with the seed, and if need be the name, added where two would read the same."""
    labels = common_labels(runs)
    for extra in (lambda run: f" seed {run.results.get('seed')}", lambda run: f" [{run.name}]"):
        repeated = {label for label in labels if labels.count(label) > 1}
        labels = [label + extra(run) if label in repeated else label for label, run in zip(labels, runs, strict=True)]
    return labels


def _attention_name(kinds: str) -> str:
    """One kind's name; of three places that two agree on, theirs and the odd one with its place."""
    names = [ATTENTION_NAMES.get(kind, kind) for kind in kinds.split("/")]
    if len(names) != len(PLACES) or len(set(names)) == len(PLACES):
        return "/".join(names)
    common = max(names, key=names.count)
    odd = [f"{place} {name}" for place, name in zip(PLACES, names, strict=True) if name != common]
    return ", ".join([common, *odd])
