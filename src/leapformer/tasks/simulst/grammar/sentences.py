"""A grammar of English sentences with their German translations, whose word order truly differs.

A *template* is a kind of sentence: the past with the time in front, "that" with the verb at the end, and so on. It has
pairs of a verb and an object, and for each pair some independent *slots* (who, when, which form of the object, ...).
One choice for each slot is a sentence, so that sentences can be counted without making them. Training, validation and
test are told apart by a hash of (template, verb, object): no two of them share such a triple.

English has numbers, dates and clock times in digits, which espeak reads aloud; German has them as they are written.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.tasks.simulst.grammar.inflection import Noun
from leapformer.tasks.simulst.grammar.lexicon import Lexicon, Place, read_lexicon
from leapformer.tasks.simulst.grammar.templates import Template, make_templates

GRAMMAR = "grammar 1"  # a change of the sentences needs a new version
SPLITS = ("train", "validation", "test")
HELD_OUT = {"validation": 0.1, "test": 0.1}  # shares of the triples

_TRIES = 100  # draws for one new sentence before the grammar counts as used up


@dataclass(frozen=True)
class Sentence:
    """A sentence with its translation, and the triple that decides which split it may be in."""

    english: str
    german: str
    template: str
    verb: str
    object: str


class Grammar:
    """All sentences of the built-in grammar.

    Arguments:
        seed: of the cut into splits.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.lexicon: Lexicon = read_lexicon()
        self.templates: dict[str, Template] = make_templates(self.lexicon)
        self._pairs: dict[str, dict[str, list[list[tuple[Any, Any]]]]] = {}

    def count(self) -> int:
        """How many sentences there are, exactly."""
        return sum(template.count() for template in self.templates.values())

    def triples(self) -> Iterator[tuple[str, str, str]]:
        """Each (template, verb, object)."""
        for template in self.templates.values():
            for entry, object in template.pairs():
                yield template.name, entry.verb.english, _name(object)

    def split_of(self, template: str, verb: str, object: str) -> str:
        """The split that the sentences of a triple belong to."""
        key = "|".join((str(self.seed), template, verb, object))
        place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        for split, share in HELD_OUT.items():
            if place < share:
                return split
            place -= share
        return "train"

    def draw(self, rng: random.Random, split: str) -> Sentence:
        """A random sentence of a split: template, verb, object and each slot in turn, uniform but for the slots."""
        by_template = self._split_pairs(split)
        name = rng.choice(list(by_template))
        entry, object = rng.choice(rng.choice(by_template[name]))
        template = self.templates[name]
        choices = {part: slot.draw(rng) for part, slot in template.slots(entry, object).items()}
        english, german = template.sentence(entry, choices)
        return Sentence(english, german, name, entry.verb.english, _name(object))

    def sentences(self, split: str, count: int, *, seed: int) -> list[Sentence]:
        """Distinct random sentences of a split.

        Raises:
            LeapformerError: there are hardly so many.
        """
        rng = random.Random(f"{seed}|{split}")
        drawn: dict[str, Sentence] = {}
        for _ in range(count):
            for _ in range(_TRIES):
                sentence = self.draw(rng, split)
                if sentence.english not in drawn:
                    break
            else:
                raise LeapformerError(f"speech-demo: {split}: expected {count:,} sentences, found {len(drawn):,}")
            drawn[sentence.english] = sentence
        return list(drawn.values())

    def _split_pairs(self, split: str) -> dict[str, list[list[tuple[Any, Any]]]]:
        """(verb, object) of a split, by template and verb."""
        if not self._pairs:
            self._pairs = {name: {} for name in SPLITS}
            for template in self.templates.values():
                by_verb: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
                for entry, object in template.pairs():
                    verb = entry.verb.english
                    key = self.split_of(template.name, verb, _name(object)), verb
                    by_verb.setdefault(key, []).append((entry, object))
                for (name, _), pairs in by_verb.items():
                    self._pairs[name].setdefault(template.name, []).append(pairs)
        return self._pairs[split]


def _name(object: Noun | Place) -> str:
    return object.english if isinstance(object, Noun) else object.name
