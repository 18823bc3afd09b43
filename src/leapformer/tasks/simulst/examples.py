"""The examples of translation as the model takes them: features or source ids, target ids, and ids for the CTC head.

Letters: B utterances, F feature frames, M mel bins, S source tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from leapformer.models.loss import IGNORE_INDEX
from leapformer.tasks.simulst.audio.augmentation import augment
from leapformer.tasks.simulst.corpora.feature_cache import CachedFeatures
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.text.vocabulary import END, PAD
from leapformer.training.draws import generator_for


@dataclass(frozen=True)
class Sentence:
    """A sentence, its translation, and where it comes from.

    Arguments:
        text: in the source language; may be empty where speech has no transcript. translation: in the target language.
        audio: what describes the audio; the source's length in ms is `milliseconds`. Text sources have neither.
        number: of its features.
    """

    text: str
    translation: str
    audio: str = ""
    milliseconds: float = 0.0
    number: int = 0


class TranslationDataset(Dataset):
    """Items are {"input_features": float32 [F, M] or "input_ids": [S], "labels": [T], "ctc_labels": [L], "index": its
    number}.

    Arguments:
        sentences: to take. features: of the whole split, or None for a text source.
        transcribe: the target is the source's text, in its own language.
    """

    def __init__(
        self,
        sentences: Sequence[Sentence],
        processor: TranslationProcessor,
        *,
        features: CachedFeatures | None,
        transcribe: bool,
    ) -> None:
        self.sentences, self.processor, self.features, self.transcribe = sentences, processor, features, transcribe
        encode = processor.target_vocabulary.encode
        self.labels = [[*encode(s.text if transcribe else s.translation), END] for s in sentences]
        self.source_ids = None
        if processor.source_vocabulary is not None:
            self.source_ids = [processor.source_ids(s.text, end=features is None) for s in sentences]

    def __len__(self) -> int:
        return len(self.sentences)

    def of(self, sentences: Sequence[Sentence]) -> TranslationDataset:
        """The same of these sentences alone."""
        return TranslationDataset(sentences, self.processor, features=self.features, transcribe=self.transcribe)

    def exchanged(self) -> TranslationDataset:
        """The same targets, each with the source of the next sentence (the last: of the first)."""
        sources = [*self.sentences[1:], *self.sentences[:1]]
        if self.transcribe:
            raise ValueError("exchanged: expected a data set of translations, found one of transcripts")
        sentences = [replace(s, translation=t.translation) for s, t in zip(sources, self.sentences, strict=True)]
        return TranslationDataset(sentences, self.processor, features=self.features, transcribe=False)

    def reference(self, index: int) -> str:
        """What is to be written."""
        sentence = self.sentences[index]
        return sentence.text if self.transcribe else sentence.translation

    def length(self, index: int) -> int:
        """Frames or tokens of the source."""
        if self.features is not None:
            number = self.sentences[index].number
            return int(self.features.starts[number + 1] - self.features.starts[number])
        assert self.source_ids is not None
        return len(self.source_ids[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"labels": self.labels[index], "index": index}
        if self.features is None:
            assert self.source_ids is not None
            return {**item, "input_ids": self.source_ids[index]}
        features = self.features[self.sentences[index].number]
        if self.source_ids is not None:
            item["ctc_labels"] = self.source_ids[index]
        return {**item, "input_features": self.processor.normalize(features)}


class TranslationCollator:
    """Pads a batch on the right and draws for it, by the seed and its examples alone, its k and the augmentation of
    speech.

    Arguments:
        seed: of the draws.
        max_k: k is drawn from 1 to it; 0: every token sees the whole source.
        whole_share: share of the batches in which every token sees the whole source.
        augmentation: keywords of `augment`, drawn anew for every utterance of speech; None: speech as it is.
    """

    def __init__(
        self, *, seed: int = 0, max_k: int = 0, whole_share: float = 0.0, augmentation: dict[str, Any] | None = None
    ) -> None:
        self.seed, self.max_k, self.whole_share, self.augmentation = seed, max_k, whole_share, augmentation

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        generator = generator_for(self.seed, [item["index"] for item in items])
        batch: dict[str, Any] = {"labels": _padded([item["labels"] for item in items], IGNORE_INDEX)}
        if "input_ids" in items[0]:
            source: list[Tensor] = [torch.tensor(item["input_ids"]) for item in items]
            batch["input_ids"] = pad_sequence(source, batch_first=True, padding_value=PAD)
        else:
            source = [self._augmented(item["input_features"], generator) for item in items]
            batch["input_features"] = pad_sequence(source, batch_first=True)
        lengths = torch.tensor([len(each) for each in source])
        if int(lengths.min()) < int(lengths.max()):
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        if "ctc_labels" in items[0]:
            batch["ctc_labels"] = _padded([item["ctc_labels"] for item in items], IGNORE_INDEX)
        batch["k"] = self._draw_k(generator)
        return batch

    def _draw_k(self, generator: torch.Generator) -> int | None:
        if not self.max_k or float(torch.rand((), generator=generator)) < self.whole_share:
            return None
        return int(torch.randint(1, self.max_k + 1, (), generator=generator))

    def _augmented(self, features: Tensor, generator: torch.Generator) -> Tensor:
        return features if self.augmentation is None else augment(features, generator=generator, **self.augmentation)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=value)
