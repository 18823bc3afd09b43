"""``leapformer demo``: language models and simultaneous translation on what is built in, a table and a page of each."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leapformer.cli.compare import UNITS
from leapformer.cli.generate import Sampling, continue_text
from leapformer.cli.late import needs
from leapformer.cli.options import Threads, a_path, use_threads
from leapformer.cli.printing import print_table
from leapformer.errors import LeapformerError, MissingExtra

if TYPE_CHECKING:
    from leapformer.analysis.report import GeneratedSample, TextProportions
    from leapformer.analysis.runs import RunRecord
    from leapformer.training.run import Run

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


TRANSLATION_RECIPE = "simulmt/demo"
TRANSLATION_OVERRIDES = {
    "translation-leapformer": [],
    "translation-softmax": [f"{place}_attention=softmax" for place in ("encoder", "decoder", "cross")],
}
TRANSLATION_NOTE = (
    "Sentences of the built-in grammar; none of the test shares its template, verb and object with the training. Each "
    "model is one model: the number of words that it stays behind, k, is chosen when it translates."
)
KS = (1, 3, 5, 9, None)
SHOWN_K = 3
SHOWN_SENTENCES = 3
TEST = "test"


@needs(
    "plots",
    "leapformer.analysis.proportions",
    "leapformer.analysis.report",
    "leapformer.analysis.tables",
    "leapformer.tasks.registry",
    "leapformer.training.loading",
    "leapformer.training.train",
)
def demo(
    output: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of the demo's runs and page.")
    ] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """
    Train language models and simultaneous translation on what is built in, compare, write pages. Nothing to download.
    """
    from leapformer.files.folders import check_output_folder

    check_output_folder(output)
    use_threads(threads)
    started = perf_counter()
    pages = [_language_models(output)]
    if pages[0] is None:
        return
    try:
        pages.append(_translation(output))
    except MissingExtra as error:
        typer.echo(f"\nSimultaneous translation is left out: {error}")
    if None not in pages:
        typer.echo(f"\nWritten to {output} in {perf_counter() - started:.0f} s; open {' and '.join(map(str, pages))}")


def _language_models(output: Path) -> Path | None:
    """Three language models, their table, a sample, and their page; None where the user interrupted it."""
    from leapformer.analysis.report import write_report
    from leapformer.analysis.runs import load_run
    from leapformer.analysis.tables import comparison

    typer.echo(f"Training {len(OVERRIDES)} small models with the recipe {RECIPE} on the documentation of Python.")
    for name, overrides in OVERRIDES.items():
        if not _train(RECIPE, output / name, overrides):
            return None
    runs = [load_run(output / name) for name in OVERRIDES]
    result = comparison(runs)
    print_table(result.columns, result.rows)
    typer.echo(UNITS)
    samples = [_sample(run) for run in runs]
    typer.echo(f"\n{samples[0].model} goes on from a prompt ({samples[0].settings}):\n")
    typer.echo(samples[0].prompt + samples[0].continuation)
    return write_report(
        output / "report.html",
        runs,
        title="LeaPformer demo",
        samples=samples,
        text_proportions=_text_proportions(runs[0]),
        command="leapformer demo",
        note=NOTE,
    )


def _translation(output: Path) -> Path | None:
    """Two models that translate text while it is read, their quality against lagging, sentences, and their page."""
    from leapformer.analysis.report import write_report
    from leapformer.analysis.runs import load_run
    from leapformer.analysis.tables import comparison

    typer.echo(
        f"\nTraining {len(TRANSLATION_OVERRIDES)} small models with the recipe {TRANSLATION_RECIPE}: English to "
        "German, written while the source is being read."
    )
    for name, overrides in TRANSLATION_OVERRIDES.items():
        if not _train(TRANSLATION_RECIPE, output / name, overrides):
            return None
        _curve(output / name)
    runs = [load_run(output / name) for name in TRANSLATION_OVERRIDES]
    result = comparison(runs, split=TEST)
    print_table(result.columns, result.rows)
    samples = _live_samples(output / next(iter(TRANSLATION_OVERRIDES)), runs[0].label)
    for sample in samples:
        typer.echo(f"\n{sample.prompt}\n  {sample.continuation}")
    typer.echo(f"\n({samples[0].settings})")
    return write_report(
        output / "translation.html",
        runs,
        title="LeaPformer demo: simultaneous translation",
        split=TEST,
        samples=samples,
        command="leapformer demo",
        note=TRANSLATION_NOTE,
    )


def _curve(folder: Path) -> None:
    """Translate the test with every k, unless that is done."""
    from leapformer.tasks.simulst.scoring.curves import evaluate_curve
    from leapformer.training.run import Run

    run = Run(folder)
    results = run.results()
    if TEST in results.get("curves", {}):
        return
    data, model = _open_translation(run)
    points = evaluate_curve(run.path, TEST, KS, write=lambda k: data.simulate(model, split=TEST, k=k))
    run.write_results({**results, "curves": {TEST: points}})


def _live_samples(folder: Path, label: str) -> list[GeneratedSample]:
    """Test sentences as they are translated word by word, each word with the number of source words before it."""
    from leapformer.analysis.report import GeneratedSample
    from leapformer.tasks.simulst.streaming.policies import WaitK
    from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
    from leapformer.training.run import Run

    data, model = _open_translation(Run(folder))
    settings = f"wait-k with k = {SHOWN_K}; in brackets the source words read when the word was written"
    samples = []
    for sentence in data.sentences(TEST)[:SHOWN_SENTENCES]:
        with StreamingTranslator(model, data.processor, WaitK(SHOWN_K)) as translator:
            words = [word for text in sentence.text.split() for word in translator.push(text)] + translator.finish()
        written = " ".join(f"{word.text} [{word.read_ms:.0f}]" for word in words)
        samples.append(
            GeneratedSample(model=label, prompt=f"{sentence.text} ", continuation=written, settings=settings)
        )
    return samples


def _open_translation(run: Run) -> tuple[Any, Any]:
    """The data and the model of a run."""
    from leapformer.tasks.registry import load_recipe

    recipe, task = load_recipe(run.recipe_path)
    model, tokenizer = task.open(run.model_path)
    return task.prepare(recipe, cache=run.cache_path, tokenizer=tokenizer), model


def _train(name: str, folder: Path, overrides: list[str]) -> bool:
    """Train one model of a recipe, or go on with it; False where the user interrupted it.

    Raises:
        LeapformerError: the folder holds a finished run of another recipe.
    """
    from leapformer.tasks.registry import load_recipe
    from leapformer.training.run import Run
    from leapformer.training.train import train

    recipe, task = load_recipe(name, overrides)
    run = Run(folder)
    if run.finished:
        if run.recipe() != recipe.to_dict():
            raise LeapformerError(
                f"{folder}: expected a run of the recipe {name} as it is now, found one of another recipe; "
                "choose another --output"
            )
        typer.echo(f"{folder} is trained already.")
        return True
    outcome = train(recipe, task, folder, progress_bar=True)
    if outcome.results is None:
        typer.echo(f"Interrupted after step {outcome.step} of {folder}; the same command goes on from there.")
    return outcome.results is not None


def _sample(run: RunRecord) -> GeneratedSample:
    from leapformer.analysis.report import GeneratedSample

    model, tokenizer = _load(run)
    text = continue_text(model, tokenizer, PROMPT, Sampling(**SAMPLE))
    settings = "sampled: temperature {temperature}, top-p {top_p}, seed {seed}, {tokens} tokens".format(**SAMPLE)
    return GeneratedSample(model=run.label, prompt=PROMPT, continuation=text, settings=settings)


def _text_proportions(run: RunRecord) -> TextProportions:
    from leapformer.analysis.proportions import learned_proportions
    from leapformer.analysis.report import TextProportions

    model, tokenizer = _load(run)
    ids = tokenizer(TEXT)["input_ids"]
    tokens = [tokenizer.decode([token]) for token in ids]
    return TextProportions(model=run.label, tokens=tokens, layers=learned_proportions(model, ids))


def _load(run: RunRecord) -> tuple[Any, Any]:
    from leapformer.training.loading import load_with_tokenizer

    return load_with_tokenizer(run.folder / "model")
