"""``leapformer plot proportions``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import RunFolder, a_path, a_text
from leapformer.errors import LeapformerError
from leapformer.files.showing import cut

SAMPLE_TOKENS = 128


@needs("plots", "leapformer.analysis.plots", "leapformer.analysis.proportions", "leapformer.training.loading")
def proportions(
    folder: RunFolder,
    text: Annotated[
        str | None,
        typer.Option(
            parser=a_text, metavar="TEXT", help="The text to look at; default: the start of the validation set."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(parser=a_path, metavar="PATH", help="Folder of the pictures; default: RUN/plots.")
    ] = None,
) -> None:
    """Draw the learned proportions of each layer and head along a text."""
    from leapformer.analysis import plots
    from leapformer.analysis.proportions import learned_proportions
    from leapformer.cli.keeping import keep
    from leapformer.files.folders import check_output_folder
    from leapformer.files.writing import write_bytes
    from leapformer.training.loading import load_with_tokenizer
    from leapformer.training.run import Run

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
        sides = [("queries", layer.queries), ("keys", layer.keys)]
        if layer.steps is not None:
            sides = [("steps", layer.steps), ("turns", layer.keys)]
        ranges = (f"{name} {float(side.min()):.2f} to {float(side.max()):.2f}" for name, side in sides)
        typer.echo(f"layer {number}: {', '.join(ranges)}")
    target = run.path / "plots" if output is None else output

    def write() -> None:
        target.mkdir(parents=True, exist_ok=True)
        for number, figure in enumerate(plots.proportions(layers)):
            path = target / f"proportions-layer-{number}.svg"
            write_bytes(path, plots.figure_svg_file(figure))
            typer.echo(f"Written to {path}")

    if output is None:
        keep(write, what="the pictures")
    else:
        write()


def _start_of_validation(run: Any, model: Any, tokenizer: Any) -> list[int]:
    """The first tokens of the validation set of a language model's run."""
    from leapformer.cli.keeping import cache_of
    from leapformer.tasks.registry import load_recipe

    recipe, task = load_recipe(run.recipe_path)
    if task.name != "lm":
        raise LeapformerError(f"{cut(run.path, 240)}: expected the run of a language model, found task {task.name}")
    with cache_of(run) as cache:
        data: Any = task.prepare(recipe, cache=cache, tokenizer=tokenizer)
        data.check_model(model)
        return data.encoded("validation").tokens[:SAMPLE_TOKENS].tolist()
