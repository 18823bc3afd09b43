"""``leapformer plot``."""

from __future__ import annotations

from pathlib import Path

import typer

from leapformer.analysis.plots import figure_svg, proportions
from leapformer.analysis.proportions import learned_proportions
from leapformer.tasks.registry import load_recipe
from leapformer.training.loading import load_model, load_tokenizer
from leapformer.training.run import Run
from leapformer.training.saving import write_text

SAMPLE_TOKENS = 128


def plot_proportions(folder: Path, *, text: str | None, output: Path | None) -> None:
    """Write one SVG for each layer."""
    run = Run(folder)
    run.recipe()
    model, tokenizer = load_model(run.model_path), load_tokenizer(run.model_path)
    if text is None:
        recipe, task = load_recipe(run.recipe_path)
        data = task.prepare(recipe, cache=run.cache_path, tokenizer=tokenizer)
        ids = data.encoded("validation").tokens[:SAMPLE_TOKENS].tolist()  # type: ignore[attr-defined]
    else:
        ids = tokenizer(text)["input_ids"]
    layers = learned_proportions(model, ids)
    target = run.path / "plots" if output is None else output
    target.mkdir(parents=True, exist_ok=True)
    for number, figure in enumerate(proportions(layers)):
        path = target / f"proportions-layer-{number}.svg"
        write_text(path, figure_svg(figure))
        typer.echo(f"Written to {path}")
