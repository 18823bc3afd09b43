"""What a benchmark leaves behind: a JSON file that grows with every row, tables, and the choices behind them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leapformer.analysis.markdown import markdown_table
from leapformer.bench.rows import Spread, to_json
from leapformer.files.writing import write_json, write_text
from leapformer.training.machine import git_revision, machine, versions

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """Choices that all benchmarks share.

    Attributes:
        output: folder of the JSON files and pictures.
        quick: small sizes.
        lengths: in tokens, ascending; None for the benchmark's own.
        repeats: turns of the contenders.
        threads: of PyTorch, already set. With one, ratios are of processor time, which holds on a machine that has
            other work; with more, of the clock on the wall.
        limit: seconds that one call may take.
        recipe: whose model is trained.
    """

    output: Path
    quick: bool = False
    lengths: tuple[int, ...] | None = None
    repeats: int = 7
    threads: int = 1
    limit: float = 20.0
    recipe: str = "lm/wikitext2-small"

    @property
    def clock(self) -> str:
        """Which clock counts, "cpu" or "wall"."""
        return "cpu" if self.threads == 1 else "wall"

    def lengths_or(self, default: Sequence[int], quick: Sequence[int]) -> list[int]:
        """The lengths asked for, or those of the benchmark."""
        return list(self.lengths or (quick if self.quick else default))


class Result:
    """Content of one JSON file, written after every row.

    Attributes:
        content: "format", "benchmark", "finished", "machine", "versions", "git", "date", "settings", and lists of rows.
    """

    def __init__(self, benchmark: str, settings: Settings) -> None:
        settings.output.mkdir(parents=True, exist_ok=True)
        self.path = settings.output / f"{benchmark}.json"
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "benchmark": benchmark,
            "finished": False,
            "machine": machine(),
            "versions": versions(),
            "git": git_revision(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "settings": {**asdict(settings), "output": str(settings.output), "clock": settings.clock},
        }
        self.clock: str = settings.clock
        write_json(self.path, self.content)

    def add(self, section: str, row: Any) -> None:
        """Append a row, a dataclass, to a list and write the file."""
        self.content.setdefault(section, []).append(to_json(row))
        write_json(self.path, self.content)

    def finish(self) -> None:
        """Say that nothing is missing."""
        self.content["finished"] = True
        write_json(self.path, self.content)


@dataclass(frozen=True)
class Table:
    """A table of text with a title, and a line for each remark below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        parts = [f"**{self.title}**", markdown_table(self.columns, self.rows), *self.notes]
        return "\n\n".join(parts) + "\n"


def machine_line(content: Mapping[str, Any]) -> str:
    """One line: processor, threads, versions, revision, date, and the clock that counts."""
    on, settings = content["machine"], content["settings"]
    named = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    threads = f"{settings['threads']} thread" + ("s" if settings["threads"] > 1 else "")
    clock = "process CPU time" if settings["clock"] == "cpu" else "wall time"
    return (
        f"{on['processor']}, {on['system']}, {threads}, {clock}; {named}; revision {content['git'] or 'unknown'}; "
        f"{content['date']}"
    )


def write_tables(path: Path, content: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """The tables as one Markdown file, under the machine line."""
    unfinished = "" if content["finished"] else "\nInterrupted: not everything was measured.\n"
    text = "\n".join(table.markdown() for table in tables if table.rows)
    write_text(path, f"# leapformer bench {content['benchmark']}\n\n{machine_line(content)}\n{unfinished}\n{text}")


def ratio_text(values: Spread | None) -> str:
    """ "3.21 (3.10 .. 3.30)", or a dash."""
    return "-" if values is None else f"{short(values.median)} ({short(values.p20)} .. {short(values.p80)})"


def short(value: float) -> str:
    """A number with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
