"""One of the benchmarks of `leapformer bench`, and what it is given while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from leapformer.bench.result import Result, Settings, Table
from leapformer.bench.timing import Race, Timer, race
from leapformer.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from leapformer.bench.contenders import Contender

# Each is a module of this package with a `BENCHMARK`, in the order in which "all" runs them.
NAMES = ("attention", "decoding", "training", "overhead", "processes", "lra", "streaming")
LIMIT, QUICK_LIMIT = 20.0, 1.0


@dataclass(frozen=True)
class Bench:
    """A benchmark that is running.

    Attributes:
        settings: the choices of whoever started it.
        result: takes its rows.
        say: is told what is measured next; the progress line listens.
        others: contenders beside those that every installation has; `attention` takes them.
    """

    settings: Settings
    result: Result
    say: Callable[[str], None]
    others: Sequence[Contender] = ()

    @property
    def clock(self) -> str:
        """Which clock counts, "cpu" or "wall"."""
        return self.settings.clock

    def race(
        self, timers: Mapping[str, Timer], label: str, *, limit: float | None = None, clock: str | None = None
    ) -> Race:
        """Contenders take turns as the settings say, but for a `limit` or a `clock` of this race's own."""
        return race(
            timers,
            repeats=self.settings.repeats,
            clock=clock or self.clock,
            limit=self.settings.limit if limit is None else limit,
            turn=lambda name: self.say(f"{label}: {name}"),
        )


@dataclass(frozen=True)
class Benchmark:
    """What a module of this package offers under the name `BENCHMARK`.

    Attributes:
        measure: adds the rows, each as soon as it is there.
        tables, pictures: of a result's content, whole or not; pictures with the names of their files.
        check: raises LeapformerError for what it can't do, before anything is measured.
        limit: seconds that one call may take, unless the user says otherwise.
    """

    measure: Callable[[Bench], None]
    tables: Callable[[Mapping[str, Any]], list[Table]]
    pictures: Callable[[Mapping[str, Any]], Iterator[tuple[str, Figure]]]
    check: Callable[[Settings], object] = lambda settings: None
    limit: float = LIMIT


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of one of NAMES.

    Raises:
        MissingExtra: a package that it needs is not installed.
    """
    try:
        return import_module(f"leapformer.bench.{name}").BENCHMARK
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("leapformer"):
            raise
        raise MissingExtra("plots", package=error.name, purpose="this command") from error
