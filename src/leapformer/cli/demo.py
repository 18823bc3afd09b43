"""``leapformer demo``: three models on built-in text, one table, one page."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import typer

from leapformer.analysis.proportions import learned_proportions
from leapformer.analysis.report import GeneratedSample, TextProportions, write_report
from leapformer.analysis.runs import RunRecord, load_run
from leapformer.analysis.tables import comparison
from leapformer.cli.compare import UNITS, print_table
from leapformer.cli.generate import continue_text
from leapformer.cli.train import use_threads
from leapformer.errors import LeapformerError
from leapformer.tasks.registry import load_recipe
from leapformer.training.loading import load_model, load_tokenizer
from leapformer.training.run import Run
from leapformer.training.train import train

RECIPE = "lm/pydocs-tiny"
# Softmax has no variants; it is given the same short convolution, so that only the attention differs.
OVERRIDES = {
    "leapformer": ["attention=leap"],
    "cosformer": ["attention=cosformer"],
    "softmax": ["attention=softmax", "variant=paper", "conv_width=4"],
}
NOTE = (
    "All models had the same recipe, text and order of the text; only the attention differs. "
    "Softmax was given the short convolution that the gated variant has."
)
PROMPT = 'The "with" statement is used to'
TEXT = (
    "A function definition defines a user-defined function object. The function body is executed only when the "
    "function is called, and its parameters are bound to the arguments of the call."
)
SAMPLE = {"tokens": 150, "temperature": 0.7, "top_p": 0.95, "seed": 0}


def run_demo(*, output: Path, threads: int | None) -> None:
    """Train what isn't trained yet, then print the table and a sample and write the page."""
    use_threads(threads)
    started = perf_counter()
    typer.echo(f"Training {len(OVERRIDES)} small models with the recipe {RECIPE} on the documentation of Python.")
    for name, overrides in OVERRIDES.items():
        if not _train(output / name, overrides):
            return
    runs = [load_run(output / name) for name in OVERRIDES]
    result = comparison(runs)
    print_table(result.columns, result.rows)
    typer.echo(UNITS)
    samples = [_sample(run) for run in runs]
    typer.echo(f"\n{samples[0].model} goes on from a prompt ({samples[0].settings}):\n")
    typer.echo(samples[0].prompt + samples[0].continuation)
    page = write_report(
        output / "report.html",
        runs,
        title="LeaPformer demo",
        samples=samples,
        text_proportions=_text_proportions(runs[0]),
        command="leapformer demo",
        note=NOTE,
    )
    typer.echo(f"\nWritten to {output} in {perf_counter() - started:.0f} s; open {page}")


def _train(folder: Path, overrides: list[str]) -> bool:
    """Train one model, or go on with it; False where the user interrupted it.

    Raises:
        LeapformerError: the folder holds a finished run of another recipe.
    """
    recipe, task = load_recipe(RECIPE, overrides)
    run = Run(folder)
    if run.finished:
        if run.recipe() != recipe.to_dict():
            raise LeapformerError(
                f"{folder}: expected a run of the recipe {RECIPE} as it is now, found one of another recipe; "
                "choose another --output"
            )
        typer.echo(f"{folder} is trained already.")
        return True
    outcome = train(recipe, task, folder, progress_bar=True)
    if outcome.results is None:
        typer.echo(f"Interrupted after step {outcome.step} of {folder}; the same command goes on from there.")
    return outcome.results is not None


def _sample(run: RunRecord) -> GeneratedSample:
    model, tokenizer = _load(run)
    text = continue_text(model, tokenizer, PROMPT, **SAMPLE)
    settings = "sampled: temperature {temperature}, top-p {top_p}, seed {seed}, {tokens} tokens".format(**SAMPLE)
    return GeneratedSample(model=run.label, prompt=PROMPT, continuation=text, settings=settings)


def _text_proportions(run: RunRecord) -> TextProportions:
    model, tokenizer = _load(run)
    ids = tokenizer(TEXT)["input_ids"]
    tokens = [tokenizer.decode([token]) for token in ids]
    return TextProportions(model=run.label, tokens=tokens, layers=learned_proportions(model, ids))


def _load(run: RunRecord) -> tuple[Any, Any]:
    folder = run.folder / "model"
    return load_model(folder), load_tokenizer(folder)
