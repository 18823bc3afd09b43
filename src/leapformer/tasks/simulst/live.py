"""A data set translated as it would be live, one sentence after another, with the time that the computation takes.

The log's `elapsed` is the delay plus all computation of the sentence so far (SimulEval's definition), from which the
computation-aware forms of the metrics come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from leapformer.tasks.simulst.audio import SAMPLE_RATE
from leapformer.tasks.simulst.evaluation import writing
from leapformer.tasks.simulst.instances import Instance
from leapformer.tasks.simulst.policies import WaitK
from leapformer.tasks.simulst.sources import STATE_MS
from leapformer.tasks.simulst.translator import StreamingTranslator, Word


def translate_live(
    data: Any, model: Any, *, split: str, k: int | None, limit: int | None = None
) -> tuple[list[Instance], float | None]:
    """The log of the first `limit` sentences of a split (None: all), and the real-time factor (None of text).

    Arguments:
        data: a `TranslationData`, whose `progress` wraps the sentences.
        model: in evaluation mode.
        k: of wait-k; None waits for the whole source.
    """
    dataset = data.dataset(split)
    wanted = range(len(dataset))[:limit]
    instances, computed, passed = [], 0.0, 0.0
    for index in data.progress(wanted, writing(k)):
        pieces = _pieces(data, model, split, index)
        with StreamingTranslator(model, data.processor, WaitK(k)) as translator:
            words, seconds = _translate(translator, pieces)
        sentence = dataset.sentences[index]
        spoken = dataset.features is not None
        computed, passed = computed + seconds, passed + sentence.milliseconds / 1000
        instances.append(
            Instance(
                index=index,
                prediction=" ".join(word.text for word, _ in words),
                delays=[word.read_ms for word, _ in words],
                # A text source has no time of its own.
                elapsed=[word.read_ms + 1000 * after for word, after in words] if spoken else [],
                reference=dataset.reference(index),
                source=[sentence.audio or f"utterance {index}"] if spoken else sentence.text,
                source_length=sentence.milliseconds if spoken else float(len(sentence.text.split())),
            )
        )
    return instances, computed / passed if passed else None


def _translate(translator: StreamingTranslator, pieces: Iterator[Any]) -> tuple[list[tuple[Word, float]], float]:
    """The words, each with the seconds of computation up to it, and all seconds."""
    words: list[tuple[Word, float]] = []
    seconds = 0.0

    def timed(work: Callable[[], list[Word]]) -> None:
        nonlocal seconds
        start = time.perf_counter()
        new = work()
        seconds += time.perf_counter() - start
        words.extend((word, seconds) for word in new)

    for piece in pieces:
        timed(lambda piece=piece: translator.push(piece))
    timed(translator.finish)
    return words, seconds


def _pieces(data: Any, model: Any, split: str, index: int) -> Iterator[Any]:
    """The source as it comes in: a chunk of audio, or a word, at a time."""
    sentence = data.dataset(split).sentences[index]
    if not data.is_speech:
        yield from sentence.text.split()
        return
    samples = data.spoken(split)[sentence.number]["audio"].astype(np.float32) / 32768
    size = round(model.config.pre_decision * STATE_MS * SAMPLE_RATE / 1000)
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
