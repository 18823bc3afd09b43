"""Tokens as words, and how many tokens a sentence may have: one place for streams and for whole data sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from leapformer.tasks.simulst.text.vocabulary import Vocabulary

# A model that never ends a sentence stops after so many tokens for each chunk that was read, and some more.
TOKENS_PER_CHUNK = 8
SPARE_TOKENS = 20


@dataclass(frozen=True)
class Word:
    """A word that is complete.

    Attributes:
        text: without spaces.
        read_ms: how much of the source had been read when it was written: ms of audio (a text source: words).
        chunk: how many chunks that is. index: its number within the stream, from 0.
    """

    text: str
    read_ms: float
    chunk: int
    index: int


def take_token(pieces: tuple[int, ...], token: int | None, vocabulary: Vocabulary) -> tuple[list[str], tuple[int, ...]]:
    """The words that a token shows to be complete, and the pieces of the one that is not.

    A word is complete when the next piece begins another, or with the end of the sentence.

    Arguments:
        pieces: of the word that was not complete. token: the next one; None: the end of the sentence.
    """
    if token is not None and not vocabulary.starts_word(token):
        return [], (*pieces, token)
    words = vocabulary.decode(pieces).split() if pieces else []
    return words, () if token is None else (token,)


def complete_words(tokens: Sequence[int], vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """The words of some tokens, each with the place of the token that showed it to be complete.

    That is the next word's first piece. The last word is complete with the end of the sentence, at the place
    len(tokens).
    """
    words: list[tuple[str, int]] = []
    pieces: tuple[int, ...] = ()
    with_end: Iterable[int | None] = (*tokens, None)
    for place, token in enumerate(with_end):
        new, pieces = take_token(pieces, token, vocabulary)
        words += [(word, place) for word in new]
    return words


def token_limit(config: Any, states: int, *, tokens_per_chunk: int = TOKENS_PER_CHUNK) -> int:
    """The most tokens of a sentence with so many states of its source, the end not counted.

    Arguments:
        config: of the model, whose cosFormer has a maximum of its own.
    """
    most, limit = SPARE_TOKENS + tokens_per_chunk * chunks_of(states, config.pre_decision), config.target_limit()
    return most if limit is None else min(most, limit)


def chunks_of(states: int, pre_decision: int) -> int:
    """Of how many chunks some states are, the last of which may have less."""
    return -(-states // pre_decision)
