"""What a model would write live with a given k, for a whole data set: batched, without waiting for the audio to pass.

The encoder's states of whole utterances are those of its stream, and a token is computed from the states that it may see, so
the words and their delays are those of `StreamingTranslator`; only the computation takes another time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from leapformer.models.translation_stream import greedy_translation
from leapformer.tasks.simulst.examples import TranslationCollator, TranslationDataset
from leapformer.tasks.simulst.instances import Instance
from leapformer.tasks.simulst.sources import STATE_MS
from leapformer.tasks.simulst.translator import SPARE_TOKENS, TOKENS_PER_CHUNK
from leapformer.tasks.simulst.vocabulary import Vocabulary
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
        limits = [SPARE_TOKENS + TOKENS_PER_CHUNK * -(-each // model.config.pre_decision) for each in states]
        written = greedy_translation(model, source, k=k, max_tokens=max(limits))
        for index, tokens, most in zip(batches[number], written, limits, strict=True):
            instances[index] = _instance(model.config, dataset, index, tokens[:most], k)
    return [instances[index] for index in wanted]


def complete_words(tokens: Sequence[int], vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """The words of some tokens, each with the place of the token that showed it to be complete: the next one's first piece.

    The last word is complete with the end of the sentence, at the place len(tokens).
    """
    words: list[tuple[str, int]] = []
    first = 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or vocabulary.starts_word(tokens[place]):
            words += [(word, place) for word in vocabulary.decode(tokens[first:place]).split()]
            first = place
    return words


def _instance(config: Any, dataset: TranslationDataset, index: int, tokens: list[int], k: int | None) -> Instance:
    sentence, vocabulary = dataset.sentences[index], dataset.processor.target_vocabulary
    words = complete_words(tokens, vocabulary)
    if dataset.features is not None:
        length, source = sentence.milliseconds, [sentence.audio or f"utterance {index}"]
        chunk = config.pre_decision * STATE_MS
        delays = [length if k is None else min((k + place) * chunk, length) for _, place in words]
    else:
        length, source = float(len(sentence.text.split())), sentence.text
        reads = word_ends(sentence.text, dataset.processor.source_vocabulary)
        seen = len(reads) if k is None else k * config.pre_decision
        delays = [float(reads[min(seen + place * config.pre_decision, len(reads)) - 1]) for _, place in words]
    return Instance(
        index=index,
        prediction=" ".join(word for word, _ in words),
        delays=delays,
        elapsed=[],
        reference=dataset.reference(index),
        source=source,
        source_length=length,
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
