"""What is fitted to the training split before a model is: its vocabularies, and the statistics of its features."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.checksums import is_sound, write_sum
from leapformer.files.writing import make_folder
from leapformer.tasks.simulst.audio.features import FeatureStatistics
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.recipe import TranslationRecipe, VocabularySection
from leapformer.tasks.simulst.sentences import ChosenSentences
from leapformer.tasks.simulst.text.vocabulary import Vocabulary
from leapformer.training.run import Run


def fit_processor(
    recipe: TranslationRecipe, sentences: ChosenSentences, *, start: Run | None, cache: Path
) -> TranslationProcessor:
    """The processor of a recipe; what was fitted once is kept under `cache`.

    Arguments:
        start: a finished run whose statistics, or whole processor, are taken over; None: there is none.
    """
    section, before = recipe.data, None
    transcribe, is_speech = section.target == "transcription", sentences.is_speech
    if start is not None:
        before = TranslationProcessor.from_pretrained(start.model_path)
        expected = "speech" if is_speech else "text"
        if before.source != expected:
            raise LeapformerError(f"start.run: expected a source of {expected}, found {before.source}")
        if recipe.start.take == "all":
            return before
    has_source_vocabulary = not is_speech or bool(recipe.model.get("ctc_weight"))

    def vocabulary(*, of_source: bool) -> Vocabulary:
        lines = [each.text if of_source else each.translation for each in sentences.sentences("train")]
        return fit_vocabulary(recipe.vocabulary, lines, of_source=of_source, cache=cache)

    return TranslationProcessor(
        target_vocabulary=vocabulary(of_source=transcribe),
        statistics=fit_statistics(sentences) if before is None else before.statistics,
        source_vocabulary=vocabulary(of_source=True) if has_source_vocabulary else None,
        source_language=section.source_language,
        target_language=section.source_language if transcribe else section.target_language,
    )


def fit_vocabulary(section: VocabularySection, lines: list[str], *, of_source: bool, cache: Path) -> Vocabulary:
    """A vocabulary of some lines, trained once for the same lines and settings."""
    size = section.source_size if of_source else section.size
    digest = hashlib.sha256(json.dumps([section.kind, size, lines]).encode()).hexdigest()[:16]
    path = cache / f"vocabulary-{digest}.spm"
    if not is_sound(path):
        make_folder(cache)
        Vocabulary.train([line for line in lines if line], size, kind=section.kind).save(path)
        write_sum(path, shared=True)
    return Vocabulary.load(path)


def fit_statistics(sentences: ChosenSentences) -> FeatureStatistics | None:
    """Of the features of the training split, computed once; None of text."""
    if not sentences.is_speech:
        return None
    features = sentences.features("train")
    path = features.path.with_suffix(".safetensors")
    if not is_sound(path):
        features.statistics().save(path)
        write_sum(path, shared=True)
    return FeatureStatistics.load(path)
