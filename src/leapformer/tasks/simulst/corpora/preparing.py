"""Corpora of recorded speech with translations, read from the layouts in which they are published.

`prepare_corpus` is the public door: a corpus in, a folder of prepared speech (see `prepared`) out. The readers are in
`published_corpora` and `prompts`; each gives the utterances of each split with the places of their audio, which is
decoded later, in parallel.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut, shown
from leapformer.tasks.card import read_card
from leapformer.tasks.preparation import BadRows, Progress, check_general, is_there, silent
from leapformer.tasks.simulst.corpora.clips import read_clip
from leapformer.tasks.simulst.corpora.prepared import draw, file_names, identify, write_prepared
from leapformer.tasks.simulst.corpora.prompts import read_asterisk, read_tuxpaint
from leapformer.tasks.simulst.corpora.published import read_covost, read_europarl, read_manifests, read_mustc
from leapformer.tasks.simulst.corpora.source import Source, Splits

READER = "corpora 1"  # a change of what is read needs a new version

_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")


@dataclass(frozen=True)
class Corpus:
    """A kind of corpus: what reads it, and the licence under which its recordings and texts are published."""

    read: Callable[[Source], Splits]
    licence: str


CORPORA = {
    "mustc": Corpus(read_mustc, "MuST-C: CC BY-NC-ND 4.0"),
    "covost": Corpus(read_covost, "CoVoST 2 and Common Voice: CC0"),
    "europarl": Corpus(read_europarl, "Europarl-ST: CC BY-NC 4.0"),
    "manifest": Corpus(read_manifests, "The recordings and texts have the licence of their source."),
    "tuxpaint": Corpus(read_tuxpaint, "Tux Paint stamps: GPL-2"),
    "asterisk": Corpus(read_asterisk, "Asterisk core sounds: CC BY-SA 3.0"),
}


def prepare_corpus(
    name: str,
    folder: str | Path,
    output: str | Path,
    *,
    source_language: str,
    target_language: str,
    count: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Decode the audio of a corpus, and return the card of the folder.

    Arguments:
        name: one of `CORPORA`.
        folder: of the corpus.
        output: the folder to fill; what is complete there and was made the same way is left as it is.
        source_language, target_language: of the speech and of the translations, as the corpus names them.
        count: training utterances to take, drawn with the seed; default: all.
        seed: of what is drawn; the result does not depend on `workers`.
        workers: processes; default: as many as there are processors.
        skip_bad: go on over bad rows and bad audio; the card lists them.

    Raises:
        LeapformerError: a fault of an argument or of the corpus, in one line with file and row, or other data in the
            folder.
        MissingExtra: soundfile or soxr is not installed.
    """
    output = Path(output)
    if name not in CORPORA:
        raise LeapformerError(f"speech: expected one of {', '.join(CORPORA)}, found {name!r}")
    check_general(seed=seed, count=count, workers=workers)
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing"
        raise LeapformerError(f"--from {cut(folder, 240)}: expected a folder, found {found}")
    folder = Path(os.path.abspath(folder))
    for option, language in (("source", source_language), ("target", target_language)):
        if not _LANGUAGE.fullmatch(language):
            raise LeapformerError(f"--{option}-language: expected a code such as fr, found {shown(language)}")
    if source_language == target_language:
        raise LeapformerError(f"--target-language: expected another than that of the speech, found {target_language}")
    source = Source(folder, source_language, target_language, seed, BadRows(skip_bad))
    splits = {split: utterances for split, utterances in CORPORA[name].read(source).items() if utterances}
    if not splits:
        raise LeapformerError(f"{folder}: expected utterances from {source.pair}, found none")
    made = {
        "source": {"corpus": name, "languages": source.pair, "sha256": _digest(splits, folder)},
        "count": count,
        "skip_bad": skip_bad,
        "seed": seed,
        "maker": READER,
    }
    if is_there(output, made, file_names(splits)):
        return read_card(output)
    if "train" in splits:
        splits["train"] = draw(splits["train"], count, seed)
    facts = {"licence": CORPORA[name].licence, "left_out": dict(source.left_out)}
    return write_prepared(
        output, splits, read_clip, made=made, facts=facts, bad=source.bad, workers=workers, progress=progress
    )


def _digest(splits: Splits, folder: Path) -> str:
    """Of all that was read, wherever the folder lies; of audio files their names."""
    digest = hashlib.sha256()
    for split, utterances in splits.items():
        for each in utterances:
            clip = each.recipe
            file = clip.file.relative_to(folder) if isinstance(clip.file, Path) else clip.file
            content = [split, each.row, identify(replace(clip, file=file, where=""))]
            digest.update(json.dumps(content).encode())
    return digest.hexdigest()
