"""Tiny translators for the tests: random models with a vocabulary of made-up words, and made-up audio."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

from leapformer.models.translation import LeapformerForConditionalGeneration
from leapformer.tasks.simulst.audio.features import FeatureStatistics, offline
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.text.vocabulary import Vocabulary
from tests.models.translation_builders import tiny_translator

CHUNK = 3  # states: 120 ms
CHUNK_MS = 120
LINES = [
    "der kleine hund schläft im garten",
    "die katze trinkt heute milch",
    "morgen fahren wir nach hause",
    "im garten trinkt der hund wasser",
]


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary.train(LINES, 48)


def noise(seconds: float, *, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    """Noise whose loudness and colour change, float32."""
    generator = np.random.default_rng(seed)
    samples = generator.standard_normal(round(seconds * rate))
    envelope = np.repeat(generator.uniform(0.01, 0.3, len(samples) // 1000 + 1), 1000)[: len(samples)]
    smooth = np.convolve(samples, [0.5, 0.3, 0.2], mode="same")
    return (np.where(envelope > 0.15, samples, smooth) * envelope).astype(np.float32)


@cache
def speech_processor() -> TranslationProcessor:
    statistics = FeatureStatistics.of(offline(noise(3, seed=99)))
    return TranslationProcessor(vocabulary(), statistics=statistics, source_language="en", target_language="de")


@cache
def text_processor() -> TranslationProcessor:
    return TranslationProcessor(
        vocabulary(), source_vocabulary=vocabulary(), source_language="de", target_language="de"
    )


def speech_model(
    *, seed: int = 0, ends: bool = True, dtype: torch.dtype = torch.float64, **fields
) -> LeapformerForConditionalGeneration:
    """`ends`: whether there is an end of sentence at all."""
    fields = {
        "num_features": 80,
        "vocab_size": len(vocabulary()),
        "pre_decision": CHUNK,
        "tie_word_embeddings": False,
    } | fields
    model = tiny_translator(seed=seed, dtype=dtype, **fields)
    model.config.eos_token_id = 2 if ends else None
    return model


def text_model(*, pre_decision: int = 1, **fields) -> LeapformerForConditionalGeneration:
    size = len(vocabulary())
    return speech_model(source="text", source_vocab_size=size, pre_decision=pre_decision, **fields)


def save_run(folder: Path, model: LeapformerForConditionalGeneration, processor: TranslationProcessor) -> Path:
    """The folder of a finished run, as far as what translates opens it."""
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text("task: simulst\n")
    return folder


def cuts(length: int, most: int, *, seed: int = 0, least: int = 1) -> list[slice]:
    """Slices of random sizes from `least` to `most` that cover `length`."""
    generator, places = np.random.default_rng(seed), [0]
    while places[-1] < length:
        places.append(min(places[-1] + int(generator.integers(least, most + 1)), length))
    return [slice(a, b) for a, b in zip(places[:-1], places[1:], strict=True)]


def audio_states(model, samples: np.ndarray):
    """The encoder's states of whole audio, in the parallel form."""
    features = speech_processor().features(samples)[None].to(model.dtype)
    with torch.no_grad():
        return model.encode(features)
