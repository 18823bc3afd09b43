"""``leapformer data``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from leapformer.errors import LeapformerError
from leapformer.files.folders import check_output_folder
from leapformer.files.showing import shown
from leapformer.tasks.card import CARD
from leapformer.tasks.lra import TASKS
from leapformer.tasks.lra.preparation import prepare
from leapformer.tasks.preparation import Progress
from leapformer.tasks.simulst.corpora.preparing import CORPORA, prepare_corpus

LRA = tuple(f"lra-{task}" for task in TASKS)
PAIRS = ("pairs", "validation_pairs", "test_pairs", "language")
RECORDED = ("source", "source_language", "target_language")
# Speech, with the options of each.
SPEECH = {
    "speech-demo": (),
    "speech-from-text": PAIRS,
    **dict.fromkeys((f"speech-{corpus}" for corpus in CORPORA), RECORDED),
}
NAMES = (*LRA, *SPEECH)
SHOWN_BAD_ROWS = 20


def prepare_data(
    name: str, *, output: Path, seed: int, workers: int | None, count: int | None, skip_bad: bool, **options: Any
) -> None:
    """Prepare a data set under a progress bar, and say what it holds.

    Arguments:
        options: those of some data sets alone; None where they are not given.

    Raises:
        LeapformerError: there is no such data set, an option is not one of its own, or a fault of the data.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name[:100], NAMES, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise LeapformerError(f"data prepare: expected one of {', '.join(NAMES)}, found {shown(name)}{hint}")
    check_output_folder(output)
    general = {"seed": seed, "workers": workers, "skip_bad": skip_bad}
    try:
        with _progress(name) as progress:
            if name in LRA:
                task = name.removeprefix("lra-")
                card = prepare(task, output, count=count, progress=progress, **general, **options)
            else:
                work = _convert if SPEECH[name] == RECORDED else _speak
                card = work(name, output, count=count, progress=progress, **general, **_given(name, options))
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; {output} is not complete. The same command goes on.")
        raise typer.Exit(130) from None
    _tell_bad_rows(card["bad_rows"], output)
    if name in LRA:
        _tell_examples(card, output)
    else:
        _tell_speech(card, output)


def _given(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, all of which the data set must know."""
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in SPEECH[name]:
            flag = {"source": "from"}.get(option, option.replace("_", "-"))
            raise LeapformerError(f"{name}: --{flag} is not an option of this data set")
    return given


def _speak(
    name: str,
    output: Path,
    *,
    count: int | None,
    progress: Progress,
    seed: int,
    workers: int | None,
    skip_bad: bool,
    pairs: tuple[Path, Path] | None = None,
    validation_pairs: tuple[Path, Path] | None = None,
    test_pairs: tuple[Path, Path] | None = None,
    language: str = "en",
) -> dict[str, Any]:
    """Speak the built-in grammar or a file of text."""
    from leapformer.tasks.simulst.corpora.spoken import SIZES, Speaking, prepare_grammar, prepare_text_pairs

    if name == "speech-from-text":
        if pairs is None:
            raise LeapformerError(f"{name}: expected --pairs SOURCE TARGET, found none")
        return prepare_text_pairs(
            *pairs, output, validation=validation_pairs, test=test_pairs, count=count, seed=seed, workers=workers,
            speaking=Speaking(language), skip_bad=skip_bad, progress=progress,
        )  # fmt: skip
    held_out = SIZES["test"] if count is None else max(1, min(SIZES["test"], count // 10))
    sizes = {"train": count or SIZES["train"], "validation": held_out, "test": held_out}
    return prepare_grammar(output, sizes=sizes, seed=seed, workers=workers, progress=progress)


def _convert(
    name: str,
    output: Path,
    *,
    source: Path | None = None,
    source_language: str | None = None,
    target_language: str | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Decode a corpus of recorded speech."""
    if source is None:
        raise LeapformerError(f"{name}: expected --from with the folder of the corpus, found none")
    if source_language is None or target_language is None:
        found = source_language or target_language or "none"
        raise LeapformerError(f"{name}: expected --source-language and --target-language, found {found}")
    return prepare_corpus(
        name.removeprefix("speech-"), source, output,
        source_language=source_language, target_language=target_language, **arguments,
    )  # fmt: skip


def _tell_bad_rows(bad: list[str], output: Path) -> None:
    for row in bad[:SHOWN_BAD_ROWS]:
        typer.echo(f"skipped: {row}", err=True)
    if bad:
        typer.echo(f"{len(bad):,} bad rows were skipped; {output / CARD} lists them", err=True)


def _tell_examples(card: dict[str, Any], output: Path) -> None:
    for split, facts in card["splits"].items():
        typer.echo(
            f"{split}: {facts['examples']:,} examples, {facts['shortest']:,} to {facts['longest']:,} tokens "
            f"(mean {facts['mean_length']:,.1f}), {facts['bytes'] / 1e6:,.1f} MB"
        )
    typer.echo(f"Written to {output}: {CARD} and a file for each split")


def _tell_speech(card: dict[str, Any], output: Path) -> None:
    for split, facts in card["splits"].items():
        speakers = f"{facts['speakers']:,} speakers, " if facts["speakers"] else ""
        typer.echo(
            f"{split}: {facts['utterances']:,} utterances, {facts['seconds'] / 3600:.2f} hours, "
            f"{speakers}{facts['bytes'] / 1e6:,.1f} MB"
        )
    for reason, rows in card.get("left_out", {}).items():
        typer.echo(f"left out: {rows:,} rows, {reason}")
    typer.echo(card["licence"])
    typer.echo(f"Written to {output}: {CARD}, and audio and index of each split")


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """A bar on the error stream for each part of the work, drawn rarely where nobody watches."""
    bars: dict[str, tqdm] = {}

    def show(done: int, total: int | None, what: str) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = tqdm(
                total=total,
                desc=f"{name}: {what}",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30.0,
            )
        bars[what].total = total
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
