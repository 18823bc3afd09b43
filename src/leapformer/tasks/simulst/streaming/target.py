"""The target side of one stream: what was written so far, and how much of the source there is to write from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from leapformer.tasks.simulst.text.vocabulary import Vocabulary
from leapformer.tasks.simulst.text.words import TOKENS_PER_CHUNK, Word, chunks_of, take_token, token_limit


@dataclass(frozen=True)
class Output:
    """What a stream has written. It is replaced as a whole, so that keeping it is keeping all of it.

    Attributes:
        last: token of the sentence, at first the one that every sentence begins with. written: tokens of the sentence.
        ended: whether its end was written. pieces: of the word that is not complete.
        words: how many of the stream are. new: those that nobody has taken.
    """

    last: int
    written: int = 0
    ended: bool = False
    pieces: tuple[int, ...] = ()
    words: int = 0
    new: tuple[Word, ...] = ()


@dataclass
class StreamTarget:
    """A stream as its policy sees it: `policy_requests.Target`, whose attributes are described there.

    Arguments:
        config: of the model. vocabulary: of the target. tokens_per_chunk: see `words.token_limit`.
        read: ms or words of the source, and chunks_read: chunks, counted from the begin of the stream.
    """

    config: Any
    vocabulary: Vocabulary
    output: Output
    tokens_per_chunk: int = TOKENS_PER_CHUNK
    continuous: bool = False
    available: int = 0
    source_ended: bool = False
    memory: Any = None
    read: float = 0.0
    chunks_read: int = 0

    @property
    def last(self) -> int:
        return self.output.last

    @property
    def written(self) -> int:
        return self.output.written

    @property
    def ended(self) -> bool:
        return self.output.ended

    @property
    def room(self) -> int:
        return token_limit(self.config, self.available, tokens_per_chunk=self.tokens_per_chunk) - self.written

    @property
    def is_open(self) -> bool:
        return not self.ended and self.room > 0

    @property
    def chunks(self) -> int:
        return chunks_of(self.available, self.pre_decision)

    @property
    def pre_decision(self) -> int:
        return self.config.pre_decision

    @property
    def ends(self) -> Sequence[int]:
        ends = self.config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def write(self, token: int) -> None:
        """Take a token; what is complete with it joins the new words."""
        if token in self.ends:
            return self.end()
        self._take(token)
        self.output = replace(self.output, last=token, written=self.written + 1)

    def end(self) -> None:
        """The end of the sentence."""
        self._take(None)
        self.output = replace(self.output, ended=True)

    def begin_anew(self, available: int) -> None:
        """Another sentence, of which so many states are there."""
        self.output = replace(self.output, last=self.config.bos_token_id, written=0, ended=False)
        self.available, self.memory = available, None

    def feed(self, states: int, *, read: float) -> None:
        """So many states more are there, with so much of the source read."""
        self.available, self.read = self.available + states, read
        self.chunks_read += chunks_of(states, self.pre_decision)

    def take_words(self) -> list[Word]:
        """The new words."""
        new = list(self.output.new)
        self.output = replace(self.output, new=())
        return new

    def _take(self, token: int | None) -> None:
        texts, pieces = take_token(self.output.pieces, token, self.vocabulary)
        first = self.output.words
        new = [Word(text, self.read, self.chunks_read, index) for index, text in enumerate(texts, start=first)]
        self.output = replace(self.output, pieces=pieces, words=first + len(new), new=(*self.output.new, *new))
