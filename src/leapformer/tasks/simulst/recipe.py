"""The recipe of simultaneous translation: which sentences, vocabularies, wait-k, and what it starts from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from leapformer.files.showing import shown
from leapformer.models.translation_configuration import LeapformerTranslationConfig
from leapformer.tasks.model_section import build_config
from leapformer.training.recipes import MOST_TOKENS, Recipe, Section


class DataSection(Section):
    """Which sentences, and how many of them."""

    source: Literal["speech", "text", "grammar"] = "speech"
    path: str | None = Field(
        default=None,
        description="speech: folder that `leapformer data prepare speech-...` filled; text: folder with "
        "SPLIT.LANGUAGE files; grammar: none, text of the built-in grammar",
    )
    source_language: str = "en"
    target_language: str = "de"
    target: Literal["translation", "transcription"] = Field(
        default="translation", description="transcription: write what was said, in its own language"
    )
    splits: dict[str, str] = Field(
        default_factory=dict, description="text: names of files for train, validation, test where they differ"
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="training sentences to take, from the start; none: all (grammar: 20,000)",
    )
    max_seconds: float = Field(
        default=30.0, gt=0, le=86_400, description="speech: longer utterances are left out of the training"
    )
    max_tokens: int = Field(
        default=200, ge=1, le=MOST_TOKENS, description="longer targets are left out of the training"
    )

    @model_validator(mode="after")
    def _check_path(self) -> DataSection:
        if (self.path is None) != (self.source == "grammar"):
            expected = "none with the source grammar" if self.source == "grammar" else "a folder"
            raise ValueError(f"data.path: expected {expected}, found {shown(self.path)}")
        return self


class VocabularySection(Section):
    """sentencepiece vocabularies, trained on the training split."""

    kind: Literal["unigram", "bpe", "char", "word"] = "unigram"
    size: int = Field(default=10_000, ge=8, le=10**6, description="of the target")
    source_size: int = Field(
        default=10_000, ge=8, le=10**6, description="of a text source, of transcripts and of the CTC head"
    )


class WaitKSection(Section):
    """Multi-path wait-k: a k for every batch, so that one model serves every latency (arXiv 2005.08595)."""

    max_k: int = Field(default=9, ge=0, le=10**6, description="k is drawn from 1 to it; 0: always the whole source")
    whole_share: float = Field(default=0.1, ge=0, le=1, description="share of batches that see the whole source")
    eval_k: int | None = Field(default=5, ge=1, le=10**6, description="k of the validation; none: the whole source")


class AugmentationSection(Section):
    """SpecAugment (arXiv 1904.08779), speed and vocal tract length, for speech in training."""

    frequency_width: int = Field(default=27, ge=0, le=10**4)
    frequency_masks: int = Field(default=1, ge=0, le=100)
    time_width: int = Field(default=100, ge=0, le=10**6)
    time_masks: int = Field(default=1, ge=0, le=100)
    time_share: float = Field(default=1.0, ge=0, le=1, description="longest mask as a share of the utterance")
    speed: float = Field(default=0.0, ge=0, lt=0.5, description="0.1: utterances become up to 10 % longer or shorter")
    vocal_tract: float = Field(
        default=0.0, ge=0, lt=0.5, description="0.1: formants lie up to 10 % higher or lower (Jaitly and Hinton 2013)"
    )


class StartSection(Section):
    """Weights to start from."""

    run: str | None = Field(default=None, description="folder of a finished run")
    take: Literal["encoder", "all"] = Field(
        default="encoder",
        description="encoder: with its features' statistics; all: fine-tuning, with the vocabularies too",
    )


class TranslationRecipe(Recipe):
    """A recipe with `task: simulst`."""

    data: DataSection
    vocabulary: VocabularySection = Field(default_factory=VocabularySection)
    wait_k: WaitKSection = Field(default_factory=WaitKSection)
    augmentation: AugmentationSection = Field(default_factory=AugmentationSection)
    pretraining: str | None = Field(
        default=None, description="recipe that is trained first, on the same data, and gives its encoder"
    )
    start: StartSection = Field(default_factory=StartSection)

    @field_validator("model", mode="after")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        build_config(model, config_class=LeapformerTranslationConfig)
        return model

    @model_validator(mode="after")
    def _check_start(self) -> TranslationRecipe:
        if self.pretraining and self.start.run:
            raise ValueError("pretraining: expected none where start.run gives the weights, found both")
        return self
