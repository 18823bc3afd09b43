"""What a model would write live with a given k, for a whole data set: batched, without waiting for the audio to pass.

The encoder's states of whole utterances are those of its stream, and a token is computed from the states that it may
see, so the words and their delays are those of `StreamingTranslator`; only the computation takes another time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from leapformer.models.translation_stream import greedy_translation
from leapformer.tasks.simulst.examples import TranslationCollator, TranslationDataset
from leapformer.tasks.simulst.scoring.instances import Instance
from leapformer.tasks.simulst.streaming.sources import STATE_MS
from leapformer.tasks.simulst.text.vocabulary import Vocabulary
from leapformer.tasks.simulst.text.words import complete_words, token_limit
from leapformer.training.task import ProgressOf, untold


def batches_by_length(dataset: TranslationDataset, indices: Iterable[int], *, size: int) -> list[list[int]]:
    """Some examples in batches of about one length, of at most `size` frames or tokens with their padding."""
    batches: list[list[int]] = []
    for index in sorted(indices, key=dataset.length):
        if not batches or (len(batches[-1]) + 1) * dataset.length(index) > size:
            batches.append([])
        batches[-1].append(index)
    return batches


def writing(k: int | None) -> str:
    """What progress is told while a model writes, be it translations or transcriptions."""
    return "writing, the whole source first" if k is None else f"writing, k = {k}"


@torch.no_grad()
def simulate(
    model: Any,
    dataset: TranslationDataset,
    *,
    k: int | None,
    size: int,
    limit: int | None = None,
    progress: ProgressOf = untold,
) -> list[Instance]:
    """The log of a whole data set.

    Arguments:
        model: in evaluation mode.
        k: of wait-k; None waits for the whole source.
        size: frames or source tokens of a batch, with padding.
        limit: the first so many sentences; None: all.
        progress: wraps the batches.
    """
    collate = TranslationCollator()
    instances: dict[int, Instance] = {}
    wanted = range(len(dataset))[:limit]
    batches = batches_by_length(dataset, wanted, size=size)
    for number in progress(range(len(batches)), writing(k)):
        batch = collate([dataset[index] for index in batches[number]])
        inputs = {name: batch[name].to(model.device) for name in ("input_features", "input_ids") if name in batch}
        mask = batch.get("attention_mask")
        source = model.encode(attention_mask=None if mask is None else mask.to(model.device), **inputs)
        states = [source.hidden.shape[1]] * len(source.hidden) if source.mask is None else source.mask.sum(1).tolist()
        limits = [token_limit(model.config, each) for each in states]
        written = greedy_translation(model, source, k=k, max_tokens=max(limits))
        for index, tokens, most in zip(batches[number], written, limits, strict=True):
            instances[index] = _instance(model.config, dataset, index, tokens[:most], k)
    return [instances[index] for index in wanted]


def _instance(config: Any, dataset: TranslationDataset, index: int, tokens: list[int], k: int | None) -> Instance:
    sentence, words = dataset.sentences[index], complete_words(tokens, dataset.processor.target_vocabulary)
    if dataset.features is not None:
        length, chunk = sentence.milliseconds, config.pre_decision * STATE_MS
        delays = [length if k is None else min((k + place) * chunk, length) for _, place in words]
    else:
        reads = word_ends(sentence.text, dataset.processor.source_vocabulary)
        seen = len(reads) if k is None else k * config.pre_decision
        delays = [float(reads[min(seen + place * config.pre_decision, len(reads)) - 1]) for _, place in words]
    return instance_of(dataset, index, [(text, delay) for (text, _), delay in zip(words, delays, strict=True)], [])


def instance_of(
    dataset: TranslationDataset, index: int, words: Sequence[tuple[str, float]], elapsed: Sequence[float]
) -> Instance:
    """A row of the log: the words of one sentence, each with its delay, and their times where they were taken."""
    sentence, is_speech = dataset.sentences[index], dataset.features is not None
    return Instance(
        index=index,
        prediction=" ".join(text for text, _ in words),
        delays=[delay for _, delay in words],
        elapsed=elapsed,
        reference=dataset.reference(index),
        source=[sentence.audio or f"utterance {index}"] if is_speech else sentence.text,
        source_length=sentence.milliseconds if is_speech else float(len(sentence.text.split())),
    )


def word_ends(text: str, vocabulary: Vocabulary | None) -> list[int]:
    """For every token of a source text and its end of sentence: the words that must be read before it is known.

    Words come whole, so it is the number of the word that the token lies in; the end is known with the last word.
    """
    assert vocabulary is not None
    ids, words, count = vocabulary.encode(text), len(text.split()), 0
    reads = []
    for number in ids:
        count += vocabulary.starts_word(number)
        reads.append(min(max(count, 1), words))
    return [*reads, words]
