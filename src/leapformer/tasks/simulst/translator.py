"""Words out while the source is still coming in: one stream, or many as one batch.

    with StreamingTranslator(model, processor, policy=WaitK(3)) as translator:
        for samples in microphone:
            for word in translator.push(samples):
                print(word.text)
        words = translator.finish()

Whatever the size of the pushes, the source is cut into the same chunks, each chunk is encoded by itself and followed by the
policy, so the words and their times are the same too, and what comes later changes nothing. Letters: B rows (streams), r
states of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from leapformer.models.modeling import SequenceTooLong
from leapformer.models.translation import LeapformerForConditionalGeneration
from leapformer.models.translation_stream import DecoderStream, EncoderStream
from leapformer.tasks.simulst.audio import SAMPLE_RATE
from leapformer.tasks.simulst.policies import Candidate, Policy, Step, Steps, WaitK
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.sources import Chunk, Source, SpeechSource, TextSource

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


@dataclass
class _Target:
    """The target side of a stream, as its policy sees it: see `policies.Target`."""

    config: Any
    processor: TranslationProcessor
    tokens_per_chunk: int
    continuous: bool
    save: Callable[[], None]
    restore: Callable[[], None]
    last: int
    written: int = 0
    available: int = 0
    source_ended: bool = False
    ended: bool = False
    memory: Any = None
    read: float = 0.0
    chunks_read: int = 0
    pieces: tuple[int, ...] = ()  # of the word that is not complete
    words: int = 0
    new: list[Word] = field(default_factory=list)

    @property
    def pre_decision(self) -> int:
        return self.config.pre_decision

    @property
    def chunks(self) -> int:
        return -(-self.available // self.pre_decision)

    @property
    def ends(self) -> Sequence[int]:
        ends = self.config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @property
    def room(self) -> int:
        most = SPARE_TOKENS + self.tokens_per_chunk * self.chunks
        limit = self.config.target_limit()
        return (most if limit is None else min(most, limit)) - self.written

    def write(self, token: int) -> None:
        """Take a token; what is complete with it joins the new words."""
        if token in self.ends:
            return self.end()
        if self.processor.target_vocabulary.starts_word(token):
            self._complete()
        self.pieces = (*self.pieces, token)
        self.last, self.written = token, self.written + 1

    def end(self) -> None:
        """The end of the sentence."""
        self._complete()
        self.ended = True

    def begin_anew(self, available: int) -> None:
        """Another sentence, of which so many states are there."""
        self.last, self.written, self.available = self.config.bos_token_id, 0, available
        self.ended, self.memory = False, None

    def take_words(self) -> list[Word]:
        new, self.new = self.new, []
        return new

    def _complete(self) -> None:
        text = self.processor.target_vocabulary.decode(self.pieces) if self.pieces else ""
        for word in text.split():
            self.new.append(Word(word, self.read, self.chunks_read, self.words))
            self.words += 1
        self.pieces = ()


@dataclass
class _Stream:
    source: Source
    target: _Target
    policy: Policy
    encoder: EncoderStream | None = None  # of its own, where context is "full"
    saved: DecoderStream | None = None

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
    target: _Target
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

    `push` and `finish` only take the source; `step` computes: one chunk of every stream that has one, and all that the policies
    then write. Nothing of one stream enters another: each row is what it would be alone, to rounding.

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
        """A new stream's number. `policy`: its own, if any; it looks at the attention if and only if the batch's does."""
        policy = self.policy if policy is None else policy
        if policy.keep_mass != self.policy.keep_mass:
            raise ValueError("policy: expected one that looks at the attention as the batch's policy does, or neither")
        begin = self.model.config.bos_token_id
        assert begin is not None
        number, self._opened = self._opened, self._opened + 1
        target = _Target(
            self.model.config, self.processor, self._tokens_per_chunk, self.continuous,
            save=lambda: self._save(number), restore=lambda: self._restore(number), last=begin,
        )  # fmt: skip
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
        if stream.over:
            stream.source.skip(source)  # type: ignore[arg-type]
            return
        stream.source.push(source)  # type: ignore[arg-type]
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
        saved = [stream.saved.nbytes for stream in streams if stream.saved is not None]
        return (
            sum(stream.source.nbytes for stream in streams)
            + sum(encoders)
            + sum(saved)
            + self._encoder.nbytes
            + self._decoder.nbytes
        )

    def snapshot(self, number: int) -> Snapshot:
        """An independent copy of a stream. Raises ValueError for audio of another rate than 16 kHz."""
        stream, row = self._stream(number), self._rows([number])
        encoder = self._encoder.reorder(row) if stream.encoder is None else stream.encoder.snapshot()
        target = replace(stream.target, new=list(stream.target.new))
        return Snapshot(stream.source.copy(), target, encoder, self._decoder.reorder(row))

    def restore(self, number: int, snapshot: Snapshot) -> None:
        """Take a stream back to a snapshot of any stream with the same policy; the snapshot stays usable."""
        stream, row = self._stream(number), self._rows([number])
        save, restore = stream.target.save, stream.target.restore
        stream.source = snapshot.source.copy()
        stream.target = replace(snapshot.target, new=list(snapshot.target.new), save=save, restore=restore)
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
            new = n - target.available if self._full and n else n
            target.available += new
            target.chunks_read += -(-new // target.pre_decision)
            target.read = so_far

    def _write(self, numbers: list[int]) -> None:
        """Let the policies write; the steps that they ask for at the same time are one batch."""
        steps: dict[int, Steps] = {number: self._policy_of(number) for number in numbers}
        asked = {number: step for number in numbers if (step := next(steps[number], None)) is not None}
        while asked:
            answers = self._decode(asked)
            asked = {
                number: step for number, answer in answers.items() if (step := _send(steps[number], answer)) is not None
            }

    def _decode(self, asked: dict[int, Step]) -> dict[int, Candidate]:
        """One step of the decoder for each of some streams."""
        rows = self._rows(list(asked))
        everyone = len(asked) == len(self._streams)
        if everyone:  # in the order of the rows, as `rows` may be in another
            rows, asked = torch.arange(len(rows)), {number: asked[number] for number in self._streams}
        part = self._decoder if everyone else self._decoder.reorder(rows)
        tokens, see = ([getattr(step, name) for step in asked.values()] for name in ("token", "see"))
        logits = part.step(torch.tensor(tokens), see=torch.tensor(see))
        if not everyone:
            self._decoder.put(rows, part)
        mass = [None] * len(asked) if part.mass is None else list(part.mass)
        best = logits.argmax(-1).tolist()
        return {number: Candidate(best[place], logits[place], mass[place]) for place, number in enumerate(asked)}

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

    def _policy_of(self, number: int) -> Steps:
        stream = self._streams[number]
        return stream.policy.write(stream.target)

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
        limit, found = self.model.config.source_limit(), stream.source.states
        if limit is not None and found > limit:
            stream.source.forget()
            stream.target.end()
            raise SequenceTooLong(
                f"source states: expected at most max_source_positions={limit}, found {found}; 'leap' takes any length"
            )

    def _save(self, number: int) -> None:
        row = self._rows([number])
        self._decoder.absorb(self._decoder.seen.index_copy(0, row, self._decoder.available[row]))
        self._streams[number].saved = self._decoder.reorder(row)

    def _restore(self, number: int) -> None:
        stream = self._streams[number]
        assert stream.saved is not None
        self._decoder.put(self._rows([number]), stream.saved)
        stream.saved = None

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            raise ValueError(f"stream {number}: expected one that is open, found {sorted(self._streams) or 'none'}")
        return self._streams[number]


class StreamingTranslator:
    """One source, translated while it comes in.

    Arguments and errors as `TranslatorBatch`; the policy is wait-k with k = 5 unless another is given.
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
        self._batch = TranslatorBatch(
            model, processor, policy, sample_rate=sample_rate, max_tokens_per_chunk=max_tokens_per_chunk,
            continuous=continuous,
        )  # fmt: skip
        self._number = self._batch.open()
        self._words: list[str] = []
        self._closed_at: float | None = None

    def push(self, source: ArrayLike | str) -> list[Word]:
        """Samples floating [n] within [-1, 1], n >= 0, or whole words of a text -> the words that are complete now.

        After the end of the sentence (unless `continuous`) only the time passes.

        Raises:
            ValueError: they are no finite samples or no text (everything is as before), or the source has ended.
            SequenceTooLong: the source is longer than cosFormer's maximum.
        """
        self._batch.push(self._number, source)
        return self._run()

    def finish(self) -> list[Word]:
        """The source has ended: all the rest. Raises ValueError if it had, or the translator is closed."""
        self._batch.finish(self._number)
        return self._run()

    @property
    def text(self) -> str:
        """All words so far, with single spaces between."""
        return " ".join(self._words)

    @property
    def finished(self) -> bool:
        """Whether nothing more will be written."""
        return self._closed_at is not None or self._batch.finished(self._number)

    @property
    def read_ms(self) -> float:
        """How much was pushed: ms of audio, or words of a text."""
        return self._batch.read(self._number) if self._closed_at is None else self._closed_at

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept for what comes next (`TranslatorBatch.nbytes`), 0 after `close`; the written text is not
        among it."""
        return self._batch.nbytes

    def snapshot(self) -> tuple[Snapshot, tuple[str, ...]]:
        """An independent copy of the whole state. Raises ValueError for audio of another rate than 16 kHz."""
        return self._batch.snapshot(self._number), tuple(self._words)

    def restore(self, snapshot: tuple[Snapshot, tuple[str, ...]]) -> None:
        """Go back to a snapshot, which stays usable; what is pushed then is translated as it would have been then."""
        self._batch.restore(self._number, snapshot[0])
        self._words = list(snapshot[1])

    def close(self) -> None:
        """Free the state; `text` stays. Closing twice is closing once."""
        if self._closed_at is None:
            self._closed_at = self.read_ms
            self._batch.close(self._number)

    def __enter__(self) -> StreamingTranslator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> list[Word]:
        new: list[Word] = []
        while self._batch.waits:
            new += self._batch.step().get(self._number, [])
        self._words += [word.text for word in new]
        return new


def _send(steps: Steps, answer: Candidate) -> Step | None:
    """What a policy asks for next, or None where it is done."""
    try:
        return steps.send(answer)
    except StopIteration:
        return None
