"""Words out while the source is still coming in: one stream, or many as one batch (`TranslatorBatch`).

    with StreamingTranslator(model, processor, policy=WaitK(3)) as translator:
        for samples in microphone:
            for word in translator.push(samples):
                print(word.text)
        words = translator.finish()

Whatever the size of the pushes, the source is cut into the same chunks, each chunk is encoded by itself and followed by
the policy, so the words and their times are the same too, and what comes later changes nothing.
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from leapformer.models.translation import LeapformerForConditionalGeneration
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.streaming.policy_requests import Policy
from leapformer.tasks.simulst.streaming.translator_batch import Snapshot, TranslatorBatch
from leapformer.tasks.simulst.text.words import TOKENS_PER_CHUNK, Word


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
            model,
            processor,
            policy,
            sample_rate=sample_rate,
            max_tokens_per_chunk=max_tokens_per_chunk,
            continuous=continuous,
        )
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
        """Bytes of all that is kept for what comes next (`TranslatorBatch.nbytes`), 0 after `close`; the written text
        is not among it."""
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
