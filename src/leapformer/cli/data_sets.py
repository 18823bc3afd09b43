"""The data sets that `leapformer data prepare` makes: one entry each.

An entry says the set's name, what it is, the options that it has besides those of all sets, and the function that does
the work, which is imported when it is called. The command, its help and its messages come from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from leapformer.cli.options import MOST, MOST_TOKENS, a_path

Card = Mapping[str, Any]  # what a preparation says of the folder that it has made


@dataclass(frozen=True)
class DataSet:
    """A data set that can be prepared.

    Attributes:
        name: on the command line.
        about: what it is, in a line.
        work: "module:function", called by the names output, seed, workers, skip_bad, progress, those of
            `fixed`, and those of its options that were given; it returns the card of the folder.
        extra: the extra of leapformer that brings what it needs.
        tell: the lines that say what a card holds.
        options: annotations by name, as of the options of any command; each is None where it is not given.
        fixed: arguments of `work` that are no options.
        required: what is expected, in words, and the options that have to be given for it.
        called: what a message calls it.
    """

    name: str
    about: str
    work: str
    extra: str
    tell: Callable[[Card, Path], Iterator[str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    called: str = "data set"


def tell_examples(card: Card, output: Path) -> Iterator[str]:
    """Of a set whose examples are sequences of tokens."""
    for split, facts in card["splits"].items():
        yield (
            f"{split}: {facts['examples']:,} examples, {facts['shortest']:,} to {facts['longest']:,} tokens "
            f"(mean {facts['mean_length']:,.1f}), {facts['bytes'] / 1e6:,.1f} MB"
        )
    yield f"Written to {output}: card.json and a file for each split"


def tell_speech(card: Card, output: Path) -> Iterator[str]:
    """Of a set of utterances."""
    for split, facts in card["splits"].items():
        speakers = f"{facts['speakers']:,} speakers, " if facts["speakers"] else ""
        yield (
            f"{split}: {facts['utterances']:,} utterances, {facts['seconds'] / 3600:.2f} hours, "
            f"{speakers}{facts['bytes'] / 1e6:,.1f} MB"
        )
    for reason, rows in card.get("left_out", {}).items():
        yield f"left out: {rows:,} rows, {reason}"
    yield card["licence"]
    yield f"Written to {output}: card.json, and audio and index of each split"


def _path(text: str) -> Any:
    return Annotated[Path | None, typer.Option("--from", parser=a_path, metavar="PATH", help=text)]


def _number(text: str) -> Any:
    return Annotated[int | None, typer.Option(min=1, max=MOST_TOKENS, help=text)]


def _count(text: str) -> Any:
    return Annotated[int | None, typer.Option(min=1, max=MOST, help=text)]


def _text(text: str) -> Any:
    return Annotated[str | None, typer.Option(help=text)]


def _pair(text: str) -> Any:
    return Annotated[tuple[Path, Path] | None, typer.Option(metavar="SOURCE TARGET", help=text)]


def _arena(task: str, about: str, source: str, **options: Any) -> DataSet:
    """A task of Long-Range Arena."""
    return DataSet(
        f"lra-{task}",
        about,
        "leapformer.tasks.lra.preparation:prepare",
        extra="lra",
        tell=tell_examples,
        options={"source": _path(source), **options},
        fixed={"task": task},
        called="task",
    )


def _recorded(corpus: str, about: str) -> DataSet:
    """A corpus of recorded speech."""
    return DataSet(
        f"speech-{corpus}",
        about,
        "leapformer.cli.speaking:convert_corpus",
        extra="speech",
        tell=tell_speech,
        options={
            "count": _count("Training utterances to take; default: all."),
            "source": _path("Folder of the corpus."),
            "source_language": _text("Of the speech, such as fr."),
            "target_language": _text("Of the translations."),
        },
        fixed={"corpus": corpus},
        required={
            "--from with the folder of the corpus": ("source",),
            "--source-language and --target-language": ("source_language", "target_language"),
        },
    )


_RELEASE = "File or folder to convert."
_RELEASE_OR_NONE = "File or folder to convert; without it the set is generated."
_GENERATED = "Training examples to make; default: in full."
_TAKEN = "Training pairs to take; default: all."
_CUT = "Where a text is cut; default 4000."

DATA_SETS = {
    entry.name: entry
    for entry in (
        _arena(
            "listops",
            "Long-Range Arena: nested lists, generated.",
            _RELEASE_OR_NONE,
            count=_count(_GENERATED),
            min_length=_number("Shortest expression; default 501."),
            max_length=_number("Longest expression; default 1999."),
        ),
        _arena("text", "Long-Range Arena: reviews, byte by byte.", _RELEASE, max_length=_number(_CUT)),
        _arena("retrieval", "Long-Range Arena: pairs of papers.", _RELEASE, max_length=_number(_CUT)),
        _arena("image", "Long-Range Arena: small pictures, pixel by pixel.", _RELEASE),
        _arena(
            "pathfinder",
            "Long-Range Arena: dashed paths, generated.",
            _RELEASE_OR_NONE,
            count=_count(_GENERATED),
            size=_number("32, 64, 128 or 256; default 32."),
            level=_number("6, 9 or 14 paddles; default 14."),
        ),
        DataSet(
            "speech-demo",
            "The built-in grammar, spoken.",
            "leapformer.cli.speaking:speak_grammar",
            extra="espeak",
            tell=tell_speech,
            options={"count": _count(_GENERATED)},
        ),
        DataSet(
            "speech-from-text",
            "Your sentences, spoken, with translations.",
            "leapformer.cli.speaking:speak_text",
            extra="espeak",
            tell=tell_speech,
            options={
                "count": _count(_TAKEN),
                "pairs": _pair("Sentences to speak, and their translations."),
                "validation_pairs": _pair("The same for validation; default: a tenth of --pairs."),
                "test_pairs": _pair("The same for the test; default: a tenth."),
                "language": _text("Of the source, as espeak-ng calls it; default en."),
            },
            required={"--pairs SOURCE TARGET": ("pairs",)},
        ),
        _recorded("mustc", "Recorded: MuST-C."),
        _recorded("covost", "Recorded: CoVoST 2."),
        _recorded("europarl", "Recorded: Europarl-ST."),
        _recorded("manifest", "Recorded: tables of audio and translations."),
        _recorded("tuxpaint", "Recorded: the words of Tux Paint."),
        _recorded("asterisk", "Recorded: the prompts of Asterisk."),
    )
}
