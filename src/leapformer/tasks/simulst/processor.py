"""What turns audio or text into the model's input and its tokens into text; it is saved beside the model.

translation.json      the kind of source and the languages
features.safetensors  statistics of the features, where the source is speech
source.spm            the vocabulary of a text source; with speech, of its transcripts, where the model has a CTC head
for them target.spm            the vocabulary of the target
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor

from leapformer.errors import LeapformerError
from leapformer.files.folders import check_own_files
from leapformer.files.reading import read_json_object
from leapformer.files.showing import cut, shown
from leapformer.files.writing import make_folder, write_json
from leapformer.models import LeapformerForConditionalGeneration
from leapformer.tasks.simulst.audio.features import FeatureStatistics, offline
from leapformer.tasks.simulst.text.vocabulary import END, Vocabulary
from leapformer.training.loading import load_model

ABOUT = "translation.json"
STATISTICS = "features.safetensors"
SOURCE, TARGET = "source.spm", "target.spm"


@dataclass(frozen=True)
class TranslationProcessor:
    """The outer side of a translation model.

    Arguments:
        target_vocabulary: of what is written.
        statistics: of the features of a speech source; None: the source is text.
        source_vocabulary: of a text source, or of the transcripts that a CTC head writes.
        source_language, target_language: codes such as "en".

    Raises:
        ValueError: statistics and source vocabulary are both missing.
    """

    target_vocabulary: Vocabulary
    statistics: FeatureStatistics | None = None
    source_vocabulary: Vocabulary | None = None
    source_language: str = ""
    target_language: str = ""

    def __post_init__(self) -> None:
        if self.statistics is None and self.source_vocabulary is None:
            raise ValueError("processor: expected statistics (speech) or a source vocabulary (text), found neither")

    @property
    def source(self) -> str:
        """ "speech" or "text"."""
        return "text" if self.statistics is None else "speech"

    def features(self, samples: ArrayLike) -> Tensor:
        """Normalised features of whole audio: floating [N] at 16 kHz to float32 [ceil(N / 160), M]."""
        return self.normalize(offline(samples))

    def normalize(self, features: Tensor) -> Tensor:
        """Features [..., M] of a stream or a file as the model was trained on them."""
        if self.statistics is None:
            raise ValueError("processor: expected a source of speech, found text")
        return self.statistics.normalize(features)

    def source_ids(self, text: str, *, end: bool = True) -> list[int]:
        """The ids of a source text; `end`: with the end of the sentence behind."""
        if self.source_vocabulary is None:
            raise ValueError("processor: expected a source vocabulary, found none")
        return self.source_vocabulary.encode(text) + ([END] if end else [])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files named above."""
        folder = Path(folder)
        make_folder(folder)
        if self.statistics is not None:
            self.statistics.save(folder / STATISTICS)
        if self.source_vocabulary is not None:
            self.source_vocabulary.save(folder / SOURCE)
        self.target_vocabulary.save(folder / TARGET)
        about = {"source": self.source, "languages": [self.source_language, self.target_language]}
        write_json(folder / ABOUT, about)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TranslationProcessor:
        """Read what `save_pretrained` wrote. Raises LeapformerError where a file is missing or damaged."""
        folder = Path(folder)
        check_own_files(folder)
        if not os.path.isfile(folder / ABOUT):
            raise LeapformerError(f"{cut(folder, 240)}: expected a translation model, found no {ABOUT} in it")
        about = read_json_object(folder / ABOUT)
        kind, languages = about.get("source"), about.get("languages") or []
        if kind not in ("speech", "text") or not _are_codes(languages):
            raise LeapformerError(
                f"{folder / ABOUT}: expected the kind of source and two languages, found {shown(kind)} and "
                f"{shown(languages)}"
            )
        source, target = languages
        has_source = kind == "text" or (folder / SOURCE).is_file()
        statistics = FeatureStatistics.load(folder / STATISTICS) if kind == "speech" else None
        if statistics is not None and not statistics.count:
            raise LeapformerError(f"{folder / STATISTICS}: expected statistics of at least one frame, found none")
        return cls(
            target_vocabulary=Vocabulary.load(folder / TARGET),
            statistics=statistics,
            source_vocabulary=Vocabulary.load(folder / SOURCE) if has_source else None,
            source_language=source,
            target_language=target,
        )

    def check_fit(self, config: Any, where: str | Path) -> None:
        """Check that a model's configuration is one for these vocabularies and features.

        Raises:
            LeapformerError: it is another's.
        """
        expected = {"source": self.source, "vocab_size": len(self.target_vocabulary)}
        if self.source_vocabulary is not None:
            expected["source_vocab_size" if self.source == "text" else "ctc_vocab_size"] = len(self.source_vocabulary)
        if self.statistics is not None:
            expected["num_features"] = self.statistics.mean.shape[-1]
        for name, value in expected.items():
            found = getattr(config, name)
            if found != value:
                raise LeapformerError(
                    f"{cut(where, 240)}: expected a model of {name}={value}, as its {ABOUT} and vocabularies have it, "
                    f"found {found}"
                )


def _are_codes(languages: Any) -> bool:
    """Whether these are two short texts."""
    is_pair = isinstance(languages, list) and len(languages) == 2
    return is_pair and all(isinstance(code, str) and len(code) <= 40 for code in languages)


def open_translation(folder: str | Path) -> tuple[Any, TranslationProcessor]:
    """The model in a folder and its processor, checked to fit one another.

    Raises:
        LeapformerError: one of them is missing or damaged, or they don't fit.
    """
    model = load_model(folder, classes=(LeapformerForConditionalGeneration,))
    processor = TranslationProcessor.from_pretrained(folder)
    processor.check_fit(model.config, folder)
    return model, processor
