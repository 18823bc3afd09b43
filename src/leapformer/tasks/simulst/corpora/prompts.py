"""Readers of small sets in which the same texts were recorded in several languages: Tux Paint, Asterisk."""

from __future__ import annotations

import math

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut
from leapformer.tasks.simulst.corpora.clips import Clip, inside, read_archive
from leapformer.tasks.simulst.corpora.prepared import Utterance, hold_out
from leapformer.tasks.simulst.corpora.source import Source, Splits, number_of, read_table, utterance

FASTEST_TEXT = 28  # characters a second: a recording of Tux Paint that is shorter than that says less than its text


def read_tuxpaint(source: Source) -> Splits:
    """The stamps of Tux Paint; recordings that say less than their text are left out."""
    return _read_recordings(source, "stamp_id", fastest=FASTEST_TEXT)


def read_asterisk(source: Source) -> Splits:
    """The prompts of Asterisk."""
    return _read_recordings(source, "prompt_id", fastest=math.inf)


def _read_recordings(source: Source, id: str, *, fastest: float) -> Splits:
    """manifest.tsv with the texts of all languages, and LANG.tar.xz, or the folder LANG.

    There are no splits: a tenth of the transcripts is held out for validation, and a tenth for the test, so that the
    same transcript is in one split alone.

    Arguments:
        id: the column with the name of a text.
        fastest: characters a second that can be spoken.
    """
    manifest = source.folder / "manifest.tsv"
    columns = ("lang", "file", id, "seconds", "transcript", source.target)
    unpacked = source.folder if (source.folder / source.source).is_dir() else None
    members = {} if unpacked else _archive(source)
    utterances = []
    for row, where in read_table(manifest, columns, source.bad):
        if row["lang"] != source.source:
            continue
        if not row[source.target].strip():
            source.left_out["no translation"] += 1
            continue
        with source.bad.guard():
            if len(row["transcript"]) > fastest * number_of(row["seconds"], "seconds", where):
                source.left_out[f"more than {fastest} characters a second"] += 1
                continue
            file = inside(unpacked, row["file"], where) if unpacked else members.get(row["file"])
            if file is None:
                raise LeapformerError(
                    f"data: {where}: expected {cut(row['file'])} in {source.source}.tar.xz, found no such file in it"
                )
            clip = Clip(file, f"{where}: {cut(row['file'])}")
            name = f"{row['lang']}/{row[id]}"
            utterances.append(utterance(name, row["transcript"], row[source.target], clip, where=where))
    return hold_out(utterances, _plain_text, ["validation", "test"], source.seed) if utterances else {}


def _archive(source: Source) -> dict[str, bytes]:
    path = source.folder / f"{source.source}.tar.xz"
    if not path.is_file():
        raise LeapformerError(
            f"--from {source.folder}: expected {path.name} or a folder {source.source}, found neither"
        )
    return read_archive(path)


def _plain_text(utterance: Utterance) -> str:
    """Texts that differ in capitals or spaces alone are the same."""
    return " ".join(utterance.row["text"].casefold().split())
