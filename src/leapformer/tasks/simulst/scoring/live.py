"""A data set translated by the streaming translator with any policy: as it would be live, or many sentences at a time.

Live, one sentence comes after another, and the log's `elapsed` is the delay plus all computation of the sentence so far
(SimulEval's definition), from which the computation-aware forms of the metrics come. The words and their delays are the
same in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE
from leapformer.tasks.simulst.scoring.evaluation import instance_of
from leapformer.tasks.simulst.scoring.instances import Instance
from leapformer.tasks.simulst.streaming.policy_requests import Policy
from leapformer.tasks.simulst.streaming.sources import STATE_MS
from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
from leapformer.tasks.simulst.streaming.translator_batch import TranslatorBatch
from leapformer.tasks.simulst.text.words import Word

SIDE_BY_SIDE = 32  # streams of a batch


def translate_live(
    data: Any, model: Any, *, split: str, policy: Policy, limit: int | None = None, told: str = "writing"
) -> tuple[list[Instance], float | None]:
    """The log of the first `limit` sentences of a split (None: all), and the real-time factor (None of text).

    Arguments:
        data: a `TranslationData`, whose `progress` wraps the sentences and is told `told`.
        model: in evaluation mode.
        policy: of all sentences.
    """
    dataset = data.dataset(split)
    wanted = range(len(dataset))[:limit]
    instances, computed, passed = [], 0.0, 0.0
    for index in data.progress(wanted, told):
        pieces = _pieces(data, model, split, index)
        with StreamingTranslator(model, data.processor, policy) as translator:
            words, seconds = _translate(translator, pieces)
        computed, passed = computed + seconds, passed + dataset.sentences[index].milliseconds / 1000
        delays = [(word.text, word.read_ms) for word, _ in words]
        # A text source has no time of its own.
        elapsed = [word.read_ms + 1000 * after for word, after in words] if data.chosen.is_speech else []
        instances.append(instance_of(dataset, index, delays, elapsed))
    return instances, computed / passed if passed else None


def translate_batched(
    data: Any, model: Any, *, split: str, policy: Policy, limit: int | None = None, told: str = "writing"
) -> list[Instance]:
    """The same log, many sentences of about one length at a time; arguments as `translate_live`."""
    dataset = data.dataset(split)
    wanted = range(len(dataset))[:limit]
    ordered = sorted(wanted, key=dataset.length)
    batches = [ordered[start : start + SIDE_BY_SIDE] for start in range(0, len(ordered), SIDE_BY_SIDE)]
    instances: dict[int, Instance] = {}
    for number in data.progress(range(len(batches)), told):
        words = _translate_together(data, model, policy, split, batches[number])
        for index, found in words.items():
            instances[index] = instance_of(dataset, index, [(word.text, word.read_ms) for word in found], [])
    return [instances[index] for index in wanted]


def _translate_together(data: Any, model: Any, policy: Policy, split: str, indices: list[int]) -> dict[int, list[Word]]:
    batch = TranslatorBatch(model, data.processor, policy)
    streams = {batch.open(): index for index in indices}
    words: dict[int, list[Word]] = {index: [] for index in indices}
    for stream, index in streams.items():
        for piece in _pieces(data, model, split, index):
            batch.push(stream, piece)
        batch.finish(stream)
    while batch.waits:
        for stream, new in batch.step().items():
            words[streams[stream]] += new
    return words


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
    if not data.chosen.is_speech:
        yield from sentence.text.split()
        return
    samples = data.chosen.spoken(split)[sentence.number]["audio"].astype(np.float32) / 32768
    size = round(model.config.pre_decision * STATE_MS * SAMPLE_RATE / 1000)
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
