"""What `leapformer data prepare` does for the speech sets: from the options of a command to the task's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leapformer.tasks.simulst.corpora.preparing import prepare_corpus
from leapformer.tasks.simulst.corpora.spoken import SIZES, Speaking, prepare_grammar, prepare_text_pairs

Pair = tuple[Path, Path]


def speak_grammar(output: Path, *, count: int | None = None, skip_bad: bool, **general: Any) -> dict[str, Any]:
    """Speak the built-in grammar, which has no bad rows."""
    held_out = SIZES["test"] if count is None else max(1, min(SIZES["test"], count // 10))
    sizes = {"train": count or SIZES["train"], "validation": held_out, "test": held_out}
    return prepare_grammar(output, sizes=sizes, **general)


def speak_text(
    output: Path,
    *,
    pairs: Pair,
    validation_pairs: Pair | None = None,
    test_pairs: Pair | None = None,
    language: str = "en",
    **general: Any,
) -> dict[str, Any]:
    """Speak a file of text."""
    others = {"validation": validation_pairs, "test": test_pairs}
    held_out = {split: pair for split, pair in others.items() if pair is not None}
    return prepare_text_pairs(*pairs, output, held_out=held_out, speaking=Speaking(language), **general)


def convert_corpus(output: Path, *, corpus: str, source: Path, **options: Any) -> dict[str, Any]:
    """Decode a corpus of recorded speech."""
    return prepare_corpus(corpus, source, output, **options)
