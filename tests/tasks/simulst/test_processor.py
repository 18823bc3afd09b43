"""The files beside a translation model: what is damaged in them is told in one line; what a vocabulary is trained on is
all.
"""

from __future__ import annotations

import json

import pytest
import torch

from leapformer.errors import LeapformerError

pytest.importorskip("sentencepiece")

from leapformer.tasks.simulst.audio.features import FeatureStatistics  # noqa: E402
from leapformer.tasks.simulst.processor import ABOUT, STATISTICS, TranslationProcessor  # noqa: E402
from leapformer.tasks.simulst.text.vocabulary import Vocabulary  # noqa: E402

LINES = ["der hund sieht den baum", "die katze sieht den garten", "der garten ist gross"] * 3


@pytest.fixture
def folder(tmp_path):
    statistics = FeatureStatistics(9, 3, torch.zeros(80, dtype=torch.float64), torch.ones(80, dtype=torch.float64))
    vocabulary = Vocabulary.train(LINES, 40)
    TranslationProcessor(vocabulary, statistics, source_language="en", target_language="de").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("about", [
    [], {}, {"source": "music", "languages": ["a", "b"]}, {"source": "speech"}, {"source": "speech", "languages": "ab"},
    {"source": "speech", "languages": ["a", 3]}, {"source": ["speech"], "languages": ["a", "b"]},
    {"source": "speech", "languages": ["a", "b" * 10_000]}, {"source": "speech", "languages": 10**30},
])  # fmt: skip
def test_descriptions_of_other_kinds(folder, about):
    (folder / ABOUT).write_text(json.dumps(about))
    with pytest.raises(
        LeapformerError, match=r"translation.json: expected (the kind of source and two languages|a JSON object)"
    ):
        TranslationProcessor.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b'{"source": ' + b"9" * 5_000 + b"}"])
def test_descriptions_that_are_no_json(folder, content):
    (folder / ABOUT).write_bytes(content)
    with pytest.raises(LeapformerError, match="translation.json: expected") as caught:
        TranslationProcessor.from_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_statistics_of_nothing(folder):
    zeros = torch.zeros(80, dtype=torch.float64)
    FeatureStatistics(0, 0, zeros, zeros.clone()).save(folder / STATISTICS)
    with pytest.raises(LeapformerError, match="features.safetensors: expected statistics of at least one frame"):
        TranslationProcessor.from_pretrained(folder)


def test_long_lines_are_learned_from_too():
    """sentencepiece passes over lines of more than 4,192 bytes, and over those with two of its own characters."""
    long = " ".join(["zebra", "quagga", "okapi"] * 400)
    assert len(long) > 4_192
    vocabulary = Vocabulary.train([*LINES, long], 60)
    assert vocabulary.decode(vocabulary.encode("zebra okapi")) == "zebra okapi"
    assert {number for number in vocabulary.encode("zebra quagga okapi")}.isdisjoint({3})
    for character in "\u2585\0":
        vocabulary = Vocabulary.train([*LINES, f"zebra {character} quagga okapi"], 60)
        assert 3 not in vocabulary.encode("zebra quagga okapi")


def test_vocabularies_of_text_without_long_lines_are_as_before():
    """The bound is the longest line's own; it changes nothing else."""
    assert Vocabulary.train(LINES, 40) == Vocabulary.train([*LINES], 40)
