"""The words of the built-in grammar, read from lexicon.yaml, which says what its columns are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from leapformer.tasks.simulst.grammar.inflection import (
    ACCUSATIVE,
    AUXILIARIES,
    DATIVE,
    SINGULAR,
    Adjective,
    Determiner,
    Noun,
    NounPhrase,
    Verb,
    after_preposition,
    english_s,
    noun_phrase,
)

THE = Determiner("the", "d", "the", definite=True)
_CASES = {"acc": ACCUSATIVE, "dat": DATIVE}


@dataclass(frozen=True)
class VerbEntry:
    """A verb with what it goes with.

    Arguments:
        objects: the nouns that make sense as its object, or the places that it leads to, in the order of the lexicon.
        uses: "habit" (may be done every day), "price" (for so many euros), "place" (it is worth saying where),
            "unintended" (nobody plans it).
    """

    verb: Verb
    objects: tuple[Noun, ...]
    uses: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Place:
    """A city, a country or a building.

    Arguments:
        name: in English, without an article.
        into, towards, away, at: (English, German) phrases: "into the museum" is "to the museum" in English.
        city: a city or a country.
        beside: German dative with its article, for "in front of"; "" for cities, lakes.
    """

    name: str
    into: tuple[str, str]
    towards: tuple[str, str]
    away: tuple[str, str]
    at: tuple[str, str]
    city: bool
    beside: str = ""

    def phrase(self, direction: str) -> tuple[str, str]:
        """English and German after a verb that says to, towards, from or in."""
        return {"to": self.into, "towards": self.towards, "from": self.away, "in": self.at}[direction]


@dataclass(frozen=True)
class Motion:
    """A verb of place.

    Arguments:
        direction: "to", "towards", "from" or "in".
    """

    verb: Verb
    direction: str
    places: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Lexicon:
    """All words, each group in the order of the file."""

    nouns: Mapping[str, Noun]
    places: Mapping[str, Place]
    names: tuple[NounPhrase, ...]
    predicates: Mapping[str, str]
    often: Mapping[str, str]
    verbs: tuple[VerbEntry, ...]
    giving: tuple[VerbEntry, ...]
    moving: tuple[Motion, ...]
    happening: tuple[VerbEntry, ...]
    adjectives: tuple[Adjective, ...]

    def lemmas(self) -> set[tuple[str, str]]:
        """(kind, English word) of all content words and names; phrases of time and function words do not count."""
        verbs = [entry.verb.english for entry in (*self.verbs, *self.giving, *self.moving, *self.happening)]
        return {
            *(("noun", word) for word in (*self.nouns, *(place.name for place in self.places.values()))),
            *(("verb", word) for word in verbs),
            *(("adjective", word) for word in (*(each.english for each in self.adjectives), *self.predicates)),
            *(("name", name.english) for name in self.names),
            *(("adverb", word) for word in self.often),
        }

    def of_class(self, *classes: str) -> tuple[Noun, ...]:
        """Nouns that are of one of the classes."""
        return tuple(noun for noun in self.nouns.values() if noun.classes & set(classes))


@cache
def read_lexicon() -> Lexicon:
    """The lexicon of this package."""
    import yaml

    text = resources.files("leapformer.tasks.simulst.grammar").joinpath("lexicon.yaml").read_text(encoding="utf-8")
    rows = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    adjectives = {Adjective(word, german): set(groups.split()) for word, (german, groups) in rows["adjectives"].items()}
    nouns = {noun.english: noun for noun in _nouns(rows["nouns"], adjectives)}
    places = {name: _city(name, german) for name, german in rows["cities"].items()}
    places |= {name: _building(name, *row) for name, row in rows["places"].items()}
    return Lexicon(
        nouns=nouns,
        places=places,
        names=tuple(_person(name, *row) for name, row in rows["names"].items()),
        predicates=rows["predicates"],
        often=rows["often"],
        verbs=tuple(_verb_entry(words, row, nouns) for words, row in rows["verbs"].items()),
        giving=tuple(_verb_entry(words, row, nouns) for words, row in rows["giving"].items()),
        moving=tuple(_motion(words, row, places) for words, row in rows["moving"].items()),
        happening=tuple(_happening(words, row, nouns) for words, row in rows["happening"].items()),
        adjectives=tuple(adjectives),
    )


def _nouns(rows: Mapping[str, Any], adjectives: Mapping[Adjective, set[str]]) -> Iterator[Noun]:
    for word, (gender, german, german_plural, classes, groups) in rows.items():
        english, _, plural = word.partition("/")
        nominative, _, other = german.partition("/")
        mine = set((groups or "").split())
        yield Noun(
            english=english,
            english_plural=plural or english_s(english),
            gender=gender,
            german=(nominative, other or nominative, other or nominative),
            german_plural=german_plural,
            classes=frozenset(classes.split()),
            adjectives=tuple(adjective for adjective, theirs in adjectives.items() if mine & theirs),
        )


def _verb(words: str, german: str, he: str, participle: str, governs: str = "acc", auxiliary: str = "haben") -> Verb:
    english, past, english_participle = words.split(", ")
    prefix, _, infinitive = german.rpartition("|")
    preposition, _, case = governs.rpartition(" ")
    return Verb(
        english=english,
        past=past,
        participle=english_participle,
        prefix=prefix,
        infinitive=infinitive,
        he=he,
        german_participle=participle,
        preposition=preposition,
        case=_CASES[case],
        auxiliary=AUXILIARIES[auxiliary],
    )


def _verb_entry(words: str, row: list[Any], nouns: Mapping[str, Noun]) -> VerbEntry:
    german, he, participle, governs, objects, uses = row
    return VerbEntry(
        _verb(words, german, he, participle, governs), _selected(objects, nouns), frozenset((uses or "").split())
    )


def _happening(words: str, row: list[Any], nouns: Mapping[str, Noun]) -> VerbEntry:
    german, he, participle, events, auxiliary = row
    return VerbEntry(_verb(words, german, he, participle, auxiliary=auxiliary), _selected(events, nouns))


def _motion(words: str, row: list[Any], places: Mapping[str, Place]) -> Motion:
    german, he, participle, direction, goals, auxiliary = row
    kinds = goals.split()
    chosen = tuple(place for place in places.values() if ("cities" if place.city else "places") in kinds)
    return Motion(_verb(words, german, he, participle, auxiliary=auxiliary), direction, chosen)


def _selected(objects: str, nouns: Mapping[str, Noun]) -> tuple[Noun, ...]:
    """Nouns by their names and classes."""
    wanted = set(objects.split())
    unknown = wanted - nouns.keys() - {kind for noun in nouns.values() for kind in noun.classes}
    assert not unknown, f"lexicon.yaml: {unknown} is neither a noun nor a class"
    return tuple(noun for noun in nouns.values() if noun.english in wanted or noun.classes & wanted)


def _city(name: str, german: str) -> Place:
    towards = (f"to {name}", f"nach {german}")
    return Place(name, towards, towards, (f"from {name}", f"aus {german}"), (f"in {name}", f"in {german}"), city=True)


def _building(name: str, gender: str, german: str, goes: str, english_at: str, german_at: str, size: str = "") -> Place:
    noun = Noun(name, "", gender, (german, german, german), None, frozenset(), ())
    _, accusative, dative = noun_phrase(noun, THE).german
    to = f"to the {name}"
    return Place(
        name,
        into=(to, after_preposition(goes, accusative if goes == "in" else dative)),
        towards=(to, after_preposition("zu", dative)),
        away=(f"from the {name}", after_preposition("aus" if german_at == "in" else "von", dative)),
        at=(f"{english_at} the {name}", after_preposition(german_at, dative)),
        city=False,
        beside=dative if not size else "",
    )


def _person(name: str, gender: str, german: str) -> NounPhrase:
    pronoun = ("he", "er") if gender == "m" else ("she", "sie")
    # The only weak form: Herr Schneider, Herrn Schneider.
    other = german.replace("Herr ", "Herrn ")
    return NounPhrase(name, (german, other, other), SINGULAR, gender, definite=True, pronoun=pronoun)
