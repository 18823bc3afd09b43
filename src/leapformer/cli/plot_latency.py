"""``leapformer plot latency``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import a_path
from leapformer.cli.printing import print_table
from leapformer.errors import LeapformerError

if TYPE_CHECKING:
    from leapformer.analysis.latency import Point, SentenceCounts, System

ROUNDING = 0.05  # BLEU of a log may differ so much from that in results.json


@needs(
    "plots",
    "leapformer.analysis.latency",
    "leapformer.analysis.plots",
    "leapformer.analysis.tables",
    "leapformer.tasks.simulst.scoring.curves",
)
def latency(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", parser=a_path, help="Translation runs, evaluated with --k.")
    ],
    split: Annotated[str, typer.Option(help="The split whose scores are shown.")] = "validation",
    draws: Annotated[int, typer.Option(min=0, max=20_000, help="Of the bootstrap; 0: no intervals.")] = 1000,
    output: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of the picture and the tables.")
    ] = Path("runs/latency"),
) -> None:
    """Draw BLEU against lagging of translation runs; the first is what the others are compared with."""
    from leapformer.analysis.latency import (
        bootstrap_bleu,
        check_paired,
        equal_lagging_table,
        latency_table,
        quality_latency,
        systems,
    )
    from leapformer.analysis.markdown import markdown_table
    from leapformer.analysis.plots import figure_png
    from leapformer.analysis.runs import load_run
    from leapformer.files.folders import check_output_folder
    from leapformer.files.writing import write_bytes, write_text

    check_output_folder(output)
    lines = systems([load_run(folder) for folder in folders], split=split)
    samples: dict[tuple[Path, Point], Any] = {}
    if draws:
        counts = _counts(lines)
        check_paired({_log_of(folder, split, point): own for (folder, point), own in counts.items()})
        samples = {key: bootstrap_bleu(own, draws=draws) for key, own in counts.items()}
    tables = [latency_table(lines, samples), equal_lagging_table(lines, samples)]
    for columns, rows in tables:
        if rows:
            print_table(columns, rows)
            typer.echo("")
    note = _note(lines, samples, draws)
    typer.echo(note)
    output.mkdir(parents=True, exist_ok=True)
    picture, text = (output / f"quality-latency-{split}.{kind}" for kind in ("png", "md"))
    write_bytes(picture, figure_png(quality_latency(lines)))
    write_text(text, "\n\n".join([*(markdown_table(*table) for table in tables if table[1]), note]) + "\n")
    typer.echo(f"Written to {picture} and {text}")


def _counts(lines: Sequence[System]) -> dict[tuple[Path, Point], SentenceCounts]:
    """What BLEU counts in every log that is there, by the run's folder and the point."""
    points = [(run, line, k) for line in lines for run in line.runs for k in line.points(run)]
    return {
        (run.folder, line.key(k)): _read_counts(
            _log_of(run.folder, line.split, line.key(k)), line.scores(run, k)["BLEU"]
        )
        for run, line, k in points
        if _log_of(run.folder, line.split, line.key(k)).is_file()
    }


def _log_of(folder: Path, split: str, point: Point) -> Path:
    from leapformer.tasks.simulst.scoring.curves import log_path, point_name

    return log_path(folder, split, point_name(*point) if isinstance(point, tuple) else point)


def _read_counts(path: Path, expected: float) -> SentenceCounts:
    from leapformer.analysis.latency import sentence_counts
    from leapformer.tasks.simulst.scoring.instances import read_instances

    instances = sorted(read_instances(path), key=lambda instance: instance.index)
    counts = sentence_counts([each.prediction for each in instances], [each.reference for each in instances])
    if abs(counts.score() - expected) > ROUNDING:
        raise LeapformerError(
            f"{path}: expected BLEU {expected:.2f} as results.json has it, found {counts.score():.2f}; evaluate again"
        )
    return counts


def _note(lines: Sequence[System], samples: Any, draws: int) -> str:
    """What the tables need to be understood."""
    parts = [f"{lines[0].split} split. LAAL, AL, DAL: lagging; AP: share of the source read; ± deviation over seeds."]
    if samples:
        parts.append(
            f"In brackets: 95 % of {draws:,} bootstrap draws of the sentences, paired for differences; one that holds "
            "0 shows no difference."
        )
    elif draws:
        parts.append("No logs of sentences, and so no intervals.")
    return " ".join(parts)
