"""Many streams of one model, whose chunks and tokens are computed together.

Letters: B rows (streams).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from leapformer.models.modeling import SequenceTooLong
from leapformer.models.translation import LeapformerForConditionalGeneration, check_source_length
from leapformer.models.translation_stream import DecoderStream, EncoderStream
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.streaming.policies import WaitK
from leapformer.tasks.simulst.streaming.policy_requests import Policy
from leapformer.tasks.simulst.streaming.sources import Chunk, Source, SpeechSource, TextSource
from leapformer.tasks.simulst.streaming.target import Output, StreamTarget
from leapformer.tasks.simulst.streaming.turns import PolicyTurn, take_turns
from leapformer.tasks.simulst.text.words import TOKENS_PER_CHUNK, Word


@dataclass
class _Stream:
    source: Source
    target: StreamTarget
    policy: Policy
    encoder: EncoderStream | None = None  # of its own, where context is "full"

    @property
    def over(self) -> bool:
        """Whether nothing more will be written."""
        return self.target.ended

    @property
    def waits(self) -> bool:
        """Whether there is a chunk to read, or an end of the source."""
        return not self.over and (bool(self.source.ready) or self.source.finished)


@dataclass(frozen=True)
class Snapshot:
    """One stream as it was; made by `snapshot`."""

    source: Source
    target: StreamTarget
    encoder: EncoderStream
    decoder: DecoderStream


class TranslatorBatch:
    """Independent streams of one model whose chunks and tokens are computed together.

        batch = TranslatorBatch(model, processor)
        a, b = batch.open(), batch.open()
        batch.push(a, samples)
        words = batch.step()        # {a: [Word, ...]}
        batch.finish(a)             # step on until nothing waits
        batch.close(a)

    `push` and `finish` only take the source; `step` computes: one chunk of every stream that has one, and all that the
    policies then write. Nothing of one stream enters another: each row is what it would be alone, to rounding.

    Arguments:
        model: `LeapformerForConditionalGeneration` in evaluation mode, on any device.
        processor: that was saved beside it.
        policy: of all streams that do not get one of their own.
        sample_rate: of the samples, in Hz; others than 16,000 are resampled (soxr), which holds back some ms.
        max_tokens_per_chunk: a sentence has at most this many tokens for each chunk of its source, and 20 more.
        continuous: what follows the end of a sentence that comes before the source's end. False: nothing, the stream is
            `finished`. True: another sentence, of the chunks that the last one has not seen; the encoder goes on as it
            is (context "full": starts anew), the decoder from nothing. Words and times are counted on.

    Raises:
        ValueError: the model is in training mode, or its source is not the processor's.
        MissingExtra: a package for speech is not installed.
    """

    def __init__(
        self,
        model: LeapformerForConditionalGeneration,
        processor: TranslationProcessor,
        policy: Policy | None = None,
        *,
        sample_rate: int = SAMPLE_RATE,
        max_tokens_per_chunk: int = TOKENS_PER_CHUNK,
        continuous: bool = False,
    ) -> None:
        if model.config.source != processor.source:
            raise ValueError(
                f"translator: expected a processor for {model.config.source}, the model's source, "
                f"found one for {processor.source}"
            )
        if max_tokens_per_chunk < 1:
            raise ValueError(f"max_tokens_per_chunk: expected at least 1, found {max_tokens_per_chunk}")
        self.model, self.processor, self.policy = model, processor, WaitK() if policy is None else policy
        self.sample_rate, self.continuous = sample_rate, continuous
        self._tokens_per_chunk = max_tokens_per_chunk
        self._full = model.config.context == "full"
        self._opened = 0
        self._streams: dict[int, _Stream] = {}  # in the order of the rows below
        self._encoder = EncoderStream.begin(model, 0)
        self._decoder = self._new_decoder(0)

    # ---- streams

    def open(self, policy: Policy | None = None) -> int:
        """A new stream's number. `policy`: its own, if any; it looks at the attention if and only if the batch's
        does.
        """
        policy = self.policy if policy is None else policy
        if policy.keep_mass != self.policy.keep_mass:
            raise ValueError("policy: expected one that looks at the attention as the batch's policy does, or neither")
        begin = self.model.config.bos_token_id
        assert begin is not None
        number, self._opened = self._opened, self._opened + 1
        target = StreamTarget(
            self.model.config,
            self.processor.target_vocabulary,
            Output(begin),
            tokens_per_chunk=self._tokens_per_chunk,
            continuous=self.continuous,
        )
        self._streams[number] = _Stream(self._new_source(), target, policy)
        if self._full:
            self._streams[number].encoder = EncoderStream.begin(self.model)
        else:
            self._encoder = EncoderStream.join([self._encoder, EncoderStream.begin(self.model)])
        self._decoder = DecoderStream.join([self._decoder, self._new_decoder(1)])
        return number

    def push(self, number: int, source: ArrayLike | str) -> None:
        """More of a stream's source: samples floating [n] within [-1, 1], or whole words of a text.

        Raises:
            ValueError: it is neither (everything is as before), the source has ended, or there is no such stream.
            SequenceTooLong: the source is longer than cosFormer's maximum.
        """
        stream = self._stream(number)
        if stream.source.finished:
            raise ValueError("translator: expected no push after finish")
        taker: Any = stream.source  # of samples or of words, and it looks at what it is given
        if stream.over:
            taker.skip(source)
            return
        taker.push(source)
        self._check_length(stream)

    def finish(self, number: int) -> None:
        """A stream's source has ended. Raises ValueError if it had, or there is no such stream."""
        stream = self._stream(number)
        if stream.source.finished:
            raise ValueError("translator: expected one call of finish, found another")
        stream.source.finish()
        if stream.over:
            stream.source.forget()
        else:
            self._check_length(stream)

    def close(self, number: int) -> None:
        """Forget a stream and all that it holds, wherever it is. Raises ValueError if there is no such stream."""
        self._stream(number)
        kept = torch.tensor([row for row, other in enumerate(self._streams) if other != number], dtype=torch.int64)
        del self._streams[number]
        self._decoder = self._decoder.reorder(kept)
        if not self._full:
            self._encoder = self._encoder.reorder(kept)

    @property
    def waits(self) -> bool:
        """Whether `step` has anything to do."""
        return any(stream.waits for stream in self._streams.values())

    def finished(self, number: int) -> bool:
        """Whether a stream will write nothing more."""
        return self._stream(number).over

    def read(self, number: int) -> float:
        """How much of a stream's source was pushed: ms of audio, or words."""
        return self._stream(number).source.read

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept for the next step: a constant for each stream, unless attention is softmax, or
        context full, or the policy looks at the attention; and of what was pushed and is not a whole chunk yet."""
        streams = self._streams.values()
        encoders = [stream.encoder.nbytes for stream in streams if stream.encoder is not None]
        sources = [stream.source.nbytes for stream in streams]
        return sum(sources) + sum(encoders) + self._encoder.nbytes + self._decoder.nbytes

    def snapshot(self, number: int) -> Snapshot:
        """An independent copy of a stream. Raises ValueError for audio of another rate than 16 kHz."""
        stream, row = self._stream(number), self._rows([number])
        encoder = self._encoder.reorder(row) if stream.encoder is None else stream.encoder.snapshot()
        return Snapshot(stream.source.copy(), replace(stream.target), encoder, self._decoder.reorder(row))

    def restore(self, number: int, snapshot: Snapshot) -> None:
        """Take a stream back to a snapshot of any stream with the same policy; the snapshot stays usable."""
        stream, row = self._stream(number), self._rows([number])
        stream.source, stream.target = snapshot.source.copy(), replace(snapshot.target)
        if stream.encoder is not None:
            stream.encoder.restore(snapshot.encoder)
        else:
            self._encoder.put(row, snapshot.encoder)
        self._decoder.put(row, snapshot.decoder)

    # ---- computation

    @torch.no_grad()
    def step(self) -> dict[int, list[Word]]:
        """Read one chunk of every stream that has one, and write what follows from it; new words by stream.

        A stream whose source has ended, and which has no whole chunk left, writes all the rest.
        """
        reading, ending = [], []
        for number, stream in self._streams.items():
            if stream.waits:
                (reading if self._has_whole_chunk(stream) else ending).append(number)
        self._read(reading)
        for number in ending:
            self._read_the_rest(number)
        active = reading + [number for number in ending if self._streams[number].target.available]
        self._write(active)
        for number in reading:
            self._begin_anew(number)
        for number in ending:
            self._streams[number].target.end()
        words = {number: self._streams[number].target.take_words() for number in (*reading, *ending)}
        return {number: new for number, new in words.items() if new}

    def _has_whole_chunk(self, stream: _Stream) -> bool:
        ready = stream.source.ready
        return bool(ready) and (len(ready) > 1 or not stream.source.finished or not stream.source.cut_short)

    def _read(self, numbers: list[int]) -> None:
        """Encode one whole chunk of each stream, as one batch."""
        if not numbers:
            return
        chunks = [self._streams[number].source.ready.popleft() for number in numbers]
        if self._full:
            for number, chunk in zip(numbers, chunks, strict=True):
                encoder = self._streams[number].encoder
                assert encoder is not None
                self._feed([number], encoder.push(self._inputs([chunk])), [chunk.read])
            return
        encoder, rows = self._encoder, self._rows(numbers)
        everyone = len(numbers) == len(self._streams)
        part = encoder if everyone else encoder.reorder(rows)
        states = part.push(self._inputs(chunks))
        if not everyone:
            encoder.put(rows, part)
        self._feed(numbers, states, [chunk.read for chunk in chunks])

    def _read_the_rest(self, number: int) -> None:
        """Encode what is left of a stream whose source has ended; its encoder is not needed after that."""
        stream = self._streams[number]
        encoder = self._encoder.reorder(self._rows([number])) if stream.encoder is None else stream.encoder
        if stream.source.ready:
            encoder.push(self._inputs([stream.source.ready.popleft()]))  # too short to give any states
        self._feed([number], encoder.finish(), [stream.source.read])
        self._decoder.finish(rows=self._rows([number]).tolist())
        stream.target.source_ended = True

    def _feed(self, numbers: list[int], states: Tensor, read: list[float]) -> None:
        """Give new states [B, n, D] to the decoder."""
        self._decoder.feed(states, rows=self._rows(numbers).tolist())
        for number, so_far in zip(numbers, read, strict=True):
            target, n = self._streams[number].target, states.shape[1]
            target.feed(n - target.available if self._full and n else n, read=so_far)

    def _write(self, numbers: list[int]) -> None:
        """Let the policies write."""
        streams = zip(numbers, self._rows(numbers).tolist(), strict=True)
        turns = [
            PolicyTurn(self._streams[number].policy, self._streams[number].target, self._decoder, row)
            for number, row in streams
        ]
        take_turns(turns, self._decoder)

    def _begin_anew(self, number: int) -> None:
        """Another sentence after one that ended before its source, if the stream is continuous."""
        stream = self._streams[number]
        if not stream.target.ended:
            return
        if not self.continuous:
            stream.source.forget()
            return
        row, new = self._rows([number]), self._new_decoder(1)
        if self._full:
            stream.encoder = EncoderStream.begin(self.model)
        unseen = self._decoder.waiting[int(row)]
        new.feed(unseen[None])
        self._decoder.put(row, new)
        stream.target.begin_anew(len(unseen))

    # ---- pieces

    def _inputs(self, chunks: Sequence[Chunk]) -> Tensor:
        return torch.stack([chunk.inputs for chunk in chunks]).to(self.model.device)

    def _rows(self, numbers: Sequence[int]) -> Tensor:
        place = {number: row for row, number in enumerate(self._streams)}
        return torch.tensor([place[number] for number in numbers], dtype=torch.int64)

    def _new_source(self) -> Source:
        if self.processor.source == "text":
            return TextSource(self.processor, self.model.config.pre_decision)
        return SpeechSource(self.processor, self.model.config.pre_decision, sample_rate=self.sample_rate)

    def _new_decoder(self, batch: int) -> DecoderStream:
        return DecoderStream.begin(self.model, batch, keep_mass=self.policy.keep_mass)

    def _check_length(self, stream: _Stream) -> None:
        """A source that is too long is told before the model sees it, so that other streams go on."""
        try:
            check_source_length(stream.source.states, self.model.config)
        except SequenceTooLong:
            stream.source.forget()
            stream.target.end()
            raise

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            raise ValueError(f"stream {number}: expected one that is open, found {sorted(self._streams) or 'none'}")
        return self._streams[number]
