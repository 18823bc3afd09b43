"""``leapformer plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from leapformer.analysis.latency import (
    Point,
    SentenceCounts,
    System,
    bootstrap_bleu,
    check_paired,
    equal_lagging_table,
    latency_table,
    quality_latency,
    sentence_counts,
    systems,
)
from leapformer.analysis.markdown import markdown_table
from leapformer.analysis.plots import figure_png, figure_svg, proportions
from leapformer.analysis.proportions import learned_proportions
from leapformer.analysis.runs import load_run
from leapformer.cli.compare import print_table
from leapformer.cli.keeping import cache_of, keep
from leapformer.errors import LeapformerError
from leapformer.files.folders import check_output_folder
from leapformer.files.showing import cut
from leapformer.files.writing import write_bytes, write_text
from leapformer.tasks.registry import load_recipe
from leapformer.tasks.simulst.scoring.curves import log_path, point_name
from leapformer.tasks.simulst.scoring.instances import read_instances
from leapformer.training.loading import load_with_tokenizer
from leapformer.training.run import Run

SAMPLE_TOKENS = 128
ROUNDING = 0.05  # BLEU of a log may differ so much from that in results.json


def plot_proportions(folder: Path, *, text: str | None, output: Path | None) -> None:
    """Write one SVG for each layer."""
    if output is not None:
        check_output_folder(output)
    run = Run(folder)
    run.recipe()
    model, tokenizer = load_with_tokenizer(run.model_path)
    ids = _start_of_validation(run, model, tokenizer) if text is None else tokenizer(text)["input_ids"]
    if not ids:
        raise LeapformerError("--text: expected at least one token, found none")
    limit = model.config.length_limit()
    if limit is not None and len(ids) > limit[0]:
        raise LeapformerError(f"--text: expected at most {limit[0]} tokens, found {len(ids)}; {limit[1]}")
    layers = learned_proportions(model, ids)
    for number, layer in enumerate(layers):
        ranges = (f"{name} {float(side.min()):.2f} to {float(side.max()):.2f}" for name, side in
                  (("queries", layer.queries), ("keys", layer.keys)))  # fmt: skip
        typer.echo(f"layer {number}: {', '.join(ranges)}")
    target = run.path / "plots" if output is None else output

    def write() -> None:
        target.mkdir(parents=True, exist_ok=True)
        for number, figure in enumerate(proportions(layers)):
            path = target / f"proportions-layer-{number}.svg"
            write_text(path, figure_svg(figure))
            typer.echo(f"Written to {path}")

    if output is None:
        keep(write, what="the pictures")
    else:
        write()


def _start_of_validation(run: Run, model: Any, tokenizer: Any) -> list[int]:
    """The first tokens of the validation set of a language model's run."""
    recipe, task = load_recipe(run.recipe_path)
    if task.name != "lm":
        raise LeapformerError(f"{cut(run.path, 240)}: expected the run of a language model, found task {task.name}")
    with cache_of(run) as cache:
        data: Any = task.prepare(recipe, cache=cache, tokenizer=tokenizer)
        data.check_model(model)
        return data.encoded("validation").tokens[:SAMPLE_TOKENS].tolist()


def plot_latency(folders: Sequence[Path], *, split: str, draws: int, output: Path) -> None:
    """Print BLEU and lagging by k and BLEU at equal lagging, and write the picture (PNG) and the tables (Markdown)."""
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
    return log_path(folder, split, point_name(*point) if isinstance(point, tuple) else point)


def _read_counts(path: Path, expected: float) -> SentenceCounts:
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
            f"In brackets: 95 % of {draws:,} bootstrap draws of the sentences, paired for differences; one that holds 0 "
            "shows no difference."
        )
    elif draws:
        parts.append("No logs of sentences, and so no intervals.")
    return " ".join(parts)
