"""What a task says of its results: the figures of tables and pages, which of them it is judged by, its line after a
training.

Plain data beside the task (`leapformer.tasks.NAME.results`), so that showing a run needs neither torch nor the run's
data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown


@dataclass(frozen=True)
class Metric:
    """A figure of a run: where results.json has it, and how it is told.

    Attributes:
        key: its name there.
        heading: of its column.
        digits: decimals.
        place: it is one of a split, of the whole run, or of the curve of wait-k at `k` (None: the whole source read
            first).
        factor: what it is multiplied by before it is shown.
        unit: put behind a value on a page, and behind a difference of two runs.
        better: the direction.
        note: a few words below the heading on a page.
        said: a sentence's words for it, "{}" in the place of the value.
        source: None, or the kind of source that runs must have, or they have no such figure.
        instead: what stands in its place where a run lacks it.
    """

    key: str
    heading: str
    digits: int
    place: Literal["split", "run", "curve"] = "split"
    k: int | None = None
    factor: float = 1.0
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    note: str = ""
    said: str = "{}"
    source: str | None = None
    instead: Metric | None = None


@dataclass(frozen=True)
class Page:
    """What a report shows of runs of a task.

    Attributes:
        metrics: the columns before those that every run has.
        headline: what the best run is chosen by, and told with.
        aside: put behind the headline in brackets, where it is known.
        explanation: HTML below the table.
        has_lagging: whether quality is drawn against lagging.
        has_speed: whether bits per byte are drawn against the speed of training.
    """

    metrics: tuple[Metric, ...]
    headline: Metric
    aside: Metric | None = None
    explanation: str = ""
    has_lagging: bool = False
    has_speed: bool = False


LOSS = Metric("loss", "loss", 4, unit="nats/token")
# Of the runs whose model keeps one while it goes through a text.
STATE = Metric("state_bytes", "state KiB", 1, place="run", factor=1 / 1024)
# Of every task, behind its own columns.
OF_EVERY_RUN = (
    Metric("tokens_per_second", "tokens/s", 0, place="run"),
    Metric("examples_per_second", "examples/s", 1, place="run"),
    Metric("peak_memory_mib", "MiB", 0, place="run"),
)


@dataclass(frozen=True)
class TaskResults:
    """What the runs of a task have in results.json.

    Attributes:
        unit: what the loss is a mean over, in the plural: "tokens" or "examples".
        headline: what a run is judged by.
        columns: of a table of runs; those that no run has are left out.
        compared: what paired seeds are compared by; a table has the best of the first one on top.
        line: what is said of results.json after a training; None: the headline, the loss and the speed.
        page: of a report; None: the columns and the headline.
    """

    unit: Literal["tokens", "examples"]
    headline: Metric
    columns: tuple[Metric, ...]
    compared: tuple[Metric, ...] = (LOSS,)
    line: Callable[[Mapping[str, Any]], str] | None = None
    page: Page | None = None

    def metric(self, key: str | None) -> Metric:
        """The figure of this name that runs can be judged by; None: the headline.

        Raises:
            LeapformerError: there is none.
        """
        known = {each.key: each for each in reversed((self.headline, *self.compared, *self.columns))}
        if key is None:
            return self.headline
        if key not in known:
            raise LeapformerError(f"metric: expected one of {', '.join(sorted(known))}, found {shown(key)}")
        return known[key]

    def describe(self, results: Mapping[str, Any]) -> str:
        """The main figures of a finished training in one line."""
        return self.line(results) if self.line is not None else self._line(results)

    def page_or_default(self) -> Page:
        return self.page or Page(metrics=self.columns, headline=self.headline)

    def _line(self, results: Mapping[str, Any]) -> str:
        metrics, headline = results["splits"]["validation"], self.headline
        parts = [f"{headline.heading} {metrics[headline.key] * headline.factor:.{headline.digits}f}{headline.unit}"]
        if headline.key != "loss":
            parts.append(f"loss {metrics['loss']:.4f} nats")
        return f"{', '.join(parts)}; {results[f'{self.unit}_per_second']:.1f} {self.unit}/s"
