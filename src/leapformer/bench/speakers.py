"""Many speakers and one model: how long words wait for a processor that takes whatever has come in as one batch.

Chunks arrive at times of a schedule that is drawn beforehand; how long a batch takes is measured. So the delays are
those of a server with this processor, without having to wait for the speakers.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leapformer.models import LeapformerForConditionalGeneration
from leapformer.models.translation_stream import wait_k_needs
from leapformer.tasks.simulst.audio.features import SHIFT, FeatureStatistics
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.streaming.policy_requests import Read, Target, Turn, Write
from leapformer.tasks.simulst.streaming.sources import FRAMES_OF_A_STATE
from leapformer.tasks.simulst.streaming.translator_batch import TranslatorBatch
from leapformer.tasks.simulst.text.vocabulary import Vocabulary

SHORTEST_UTTERANCE, LONGEST_UTTERANCE = 10, 33  # chunks: 3.6 to 11.9 s
SEED = 0
WORD, SMALL_VOCABULARY = "ja", 8  # all that is written


class Push(NamedTuple):
    """One chunk of audio: when it comes (seconds), whose it is, its number in the utterance, whether it is the last."""

    time: float
    speaker: int
    chunk: int
    last: bool


class Served(NamedTuple):
    """Seconds of a batch, and for each word its speaker and the seconds from the batch's begin until it was there."""

    seconds: float
    words: list[tuple[int, float]]


@dataclass
class Waits:
    """What a simulation found.

    Attributes:
        delays: seconds from the push that allows a word until the word is there, for every word.
        busy: seconds that the processor worked. end: when it had done all. batches: how many pushes each took.
    """

    delays: list[float] = field(default_factory=list)
    busy: float = 0.0
    end: float = 0.0
    batches: list[int] = field(default_factory=list)


def schedule(speakers: int, seconds: float, chunk_seconds: float, *, seed: int = SEED) -> list[Push]:
    """Pushes of speakers who say one utterance after another, each with a phase of its own within a chunk.

    Lengths of utterances are even over 10 to 33 chunks; whoever has begun one within ``seconds`` says it to its end.
    """
    draw = random.Random(seed)
    pushes = []
    for speaker in range(speakers):
        begin = draw.uniform(0, chunk_seconds)
        while begin < seconds:
            chunks = draw.randint(SHORTEST_UTTERANCE, LONGEST_UTTERANCE)
            pushes += [
                Push(begin + (chunk + 1) * chunk_seconds, speaker, chunk, chunk == chunks - 1)
                for chunk in range(chunks)
            ]
            begin += chunks * chunk_seconds
    return sorted(pushes)


def simulate(pushes: Sequence[Push], serve: Callable[[list[Push]], Served]) -> Waits:
    """Serve all pushes: whenever the processor is free, all that has come in by then is one batch, at most one push of
    each speaker, in the order of their times."""
    queues: dict[int, deque[Push]] = {}
    for push in sorted(pushes):
        queues.setdefault(push.speaker, deque()).append(push)
    found = Waits()
    while queues:
        now = max(found.end, min(queue[0].time for queue in queues.values()))
        batch = sorted(queue.popleft() for queue in queues.values() if queue[0].time <= now)
        queues = {speaker: queue for speaker, queue in queues.items() if queue}
        served = serve(batch)
        pushed = {push.speaker: push.time for push in batch}
        found.delays += [now + after - pushed[speaker] for speaker, after in served.words]
        found.busy += served.seconds
        found.end = now + served.seconds
        found.batches.append(len(batch))
    return found


class FixedRate:
    """Wait-k for fresh weights, whose end of sentence means nothing: a token for every chunk, the same one each time,
    the first after k chunks and the last ones when the source has ended."""

    keep_mass = False

    def __init__(self, k: int, token: int) -> None:
        self.k, self.token = k, token

    def turn(self, target: Target) -> Turn:
        while target.written < target.chunks:
            see = int(wait_k_needs(self.k, target.written, target.pre_decision))
            if target.available < see and not target.source_ended:
                yield Read()
            yield Write(see, token=self.token)


class Server:
    """`TranslatorBatch` behind the pushes of many speakers. Each token is a word, which is out when the next one comes.

    Arguments:
        model: in evaluation mode. statistics: of its features.
        audio: float32 [N], of which each speaker reads from a place of its own, round and round.
        k: of wait-k. clock: seconds.
    """

    def __init__(
        self,
        model: LeapformerForConditionalGeneration,
        statistics: FeatureStatistics,
        audio: Tensor,
        *,
        k: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        vocabulary = Vocabulary.train([WORD] * 8, size=SMALL_VOCABULARY)
        policy = FixedRate(k, next(n for n in range(len(vocabulary)) if vocabulary.decode([n]) == WORD))
        self.translators = TranslatorBatch(model, TranslationProcessor(vocabulary, statistics), policy)
        self.audio, self.clock = audio, clock
        self._samples = chunk_samples(model)
        self._streams: dict[int, int] = {}  # of each speaker who is in an utterance

    def serve(self, batch: list[Push]) -> Served:
        """Take the pushes, write what they allow; the stream of an utterance that has ended is closed."""
        begin, words = self.clock(), []
        for push in batch:
            if push.chunk == 0:
                self._streams[push.speaker] = self.translators.open()
            self.translators.push(self._streams[push.speaker], self._audio_of(push))
            if push.last:
                self.translators.finish(self._streams[push.speaker])
        speakers = {stream: speaker for speaker, stream in self._streams.items()}
        while self.translators.waits:
            new = self.translators.step()
            after = self.clock() - begin
            words += [(speakers[stream], after) for stream, its_words in new.items() for _ in its_words]
        for push in batch:
            if push.last:
                self.translators.close(self._streams.pop(push.speaker))
        return Served(self.clock() - begin, words)

    def _audio_of(self, push: Push) -> np.ndarray:
        start = (push.speaker * 7 + push.chunk) * self._samples % (len(self.audio) - self._samples + 1)
        return self.audio[start : start + self._samples].numpy()


def chunk_samples(model: LeapformerForConditionalGeneration) -> int:
    """Samples of a chunk."""
    return model.config.pre_decision * FRAMES_OF_A_STATE * SHIFT


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of PyTorch within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
