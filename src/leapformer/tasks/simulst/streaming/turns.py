"""Does what policies ask for, for many streams at a time: one row of a `DecoderStream` and one target for each.

Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from leapformer.models.translation_stream import DecoderStream
from leapformer.tasks.simulst.streaming.policy_requests import Policy, Read, Restore, Save, Turn, Write, Written
from leapformer.tasks.simulst.streaming.target import Output, StreamTarget


@dataclass(frozen=True)
class Step:
    """Run the decoder on `token`, the one before the wanted one, with the first `see` states of the source in view."""

    token: int
    see: int


class PolicyTurn:
    """The turn of one stream.

    Arguments:
        decoder: in which it is the row `row`.
    """

    def __init__(self, policy: Policy, target: StreamTarget, decoder: DecoderStream, row: int) -> None:
        self.target, self.row = target, row
        self._decoder, self._index = decoder, torch.tensor([row])
        self._requests: Turn = policy.turn(target)
        self._saved: tuple[DecoderStream, Output] | None = None
        self._write: Write | None = None
        self._named = type(policy).__name__

    def next_step(self, answer: Written | None = None) -> Step | None:
        """Do all that the policy asks for up to a token; the step that this takes, or None where the turn is over.

        Raises:
            ValueError: the policy writes behind the end or the limit, restores what was not saved, or asks for what
                there is not.
        """
        request = self._ask(answer)
        while isinstance(request, Save | Restore):
            if isinstance(request, Save):
                self._keep()
            else:
                self._go_back()
            request = self._ask(None)
        if isinstance(request, Read):
            self._requests.close()
            self.target.memory = request.memory
            return None
        if not isinstance(request, Write):
            raise self._fault("Read, Write, Save or Restore", f"{request!r:.80}")
        if not self.target.is_open:
            raise self._fault("no Write where the sentence has ended or is full", "one")
        self._write = request
        return Step(self.target.last, self.target.available if request.see is None else request.see)

    def take(self, written: Written) -> Step | None:
        """The decoder's answer to the step: write the token, and go on."""
        assert self._write is not None
        if self._write.token is not None:
            written = Written(self._write.token, written.logits, written.mass)
        self.target.write(written.token)
        return self.next_step(written)

    def _ask(self, answer: Written | None) -> object:
        try:
            return self._requests.send(answer)
        except StopIteration:
            return Read()

    def _keep(self) -> None:
        decoder, row = self._decoder, self._index
        # What has been looked at would pile up else, wherever it is taken back.
        decoder.absorb(decoder.seen.index_copy(0, row, decoder.available[row]))
        self._saved = decoder.reorder(row), self.target.output

    def _go_back(self) -> None:
        if self._saved is None:
            raise self._fault("Save before Restore", "none")
        saved, self.target.output = self._saved
        self._decoder.put(self._index, saved)
        self._saved = None

    def _fault(self, expected: str, found: str) -> ValueError:
        return ValueError(f"policy {self._named}: expected {expected}, found {found}")


def take_turns(turns: Iterable[PolicyTurn], decoder: DecoderStream) -> None:
    """Run some turns to their ends; the tokens that they ask for at the same time are one batch.

    Arguments:
        turns: of different rows. decoder: theirs.
    """
    asked = {turn: step for turn in turns if (step := turn.next_step()) is not None}
    while asked:
        answers = _decode(decoder, asked)
        asked = {turn: step for turn, written in answers if (step := turn.take(written)) is not None}


def _decode(decoder: DecoderStream, asked: dict[PolicyTurn, Step]) -> list[tuple[PolicyTurn, Written]]:
    """One step of the decoder for each of some turns."""
    everyone = len(asked) == len(decoder.written)
    turns = sorted(asked, key=lambda turn: turn.row) if everyone else list(asked)
    rows = torch.tensor([turn.row for turn in turns])
    part = decoder if everyone else decoder.reorder(rows)
    tokens, see = ([getattr(asked[turn], name) for turn in turns] for name in ("token", "see"))
    logits = part.step(torch.tensor(tokens), see=torch.tensor(see))
    if not everyone:
        decoder.put(rows, part)
    mass = [None] * len(turns) if part.mass is None else list(part.mass)
    best = logits.argmax(-1).tolist()
    return [(turn, Written(best[place], logits[place], mass[place])) for place, turn in enumerate(turns)]
