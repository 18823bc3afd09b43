"""What may fill the places of a sentence: phrases of time, forms of an object, subjects, fixed parts.

Phrases that are not inflected are pairs (English, German).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from leapformer.tasks.simulst.grammar.inflection import (
    FIRST,
    PLURAL,
    SINGULAR,
    Determiner,
    Noun,
    NounPhrase,
    noun_phrase,
)
from leapformer.tasks.simulst.grammar.lexicon import THE, Lexicon, Place

PEOPLE = frozenset({"kin", "relation", "job"})


@dataclass(frozen=True)
class Slot:
    """Options of one place in a sentence, in groups, so that 365 dates do not crowd out "yesterday".

    Arguments:
        groups: of options.
        weights: how often each group is drawn.
    """

    groups: tuple[tuple[Any, ...], ...]
    weights: tuple[float, ...]

    @cached_property
    def size(self) -> int:
        """Number of options."""
        return sum(map(len, self.groups))

    def draw(self, rng: random.Random) -> Any:
        """One option."""
        (group,) = rng.choices(self.groups, self.weights)
        return group[rng.randrange(len(group))]

    def options(self) -> Iterator[Any]:
        """All of them."""
        for group in self.groups:
            yield from group


def slot(*groups: tuple[float, Sequence[Any]]) -> Slot:
    """A slot of weighted groups; empty ones are left out."""
    kept = [(weight, tuple(group)) for weight, group in groups if group]
    return Slot(tuple(group for _, group in kept), tuple(weight for weight, _ in kept))


# ---- phrases of time: (English, German)

_NUMBERS = dict(enumerate("zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split(), start=2))
_WEEKDAYS = {
    "Monday": "Montag",
    "Tuesday": "Dienstag",
    "Wednesday": "Mittwoch",
    "Thursday": "Donnerstag",
    "Friday": "Freitag",
    "Saturday": "Samstag",
    "Sunday": "Sonntag",
}
_MONTHS = {
    "January": ("Januar", 31),
    "February": ("Februar", 28),
    "March": ("März", 31),
    "April": ("April", 30),
    "May": ("Mai", 31),
    "June": ("Juni", 30),
    "July": ("Juli", 31),
    "August": ("August", 31),
    "September": ("September", 30),
    "October": ("Oktober", 31),
    "November": ("November", 30),
    "December": ("Dezember", 31),
}
_UNITS = {"days": "Tagen", "weeks": "Wochen", "months": "Monaten", "years": "Jahren"}

_DATES = tuple(
    (
        f"on {month} {day}{'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}",
        f"am {day}. {name}",
    )
    for month, (name, days) in _MONTHS.items()
    for day in range(1, days + 1)
)
_CLOCK = (
    *((f"at {hour} am", f"um {hour} Uhr") for hour in range(6, 12)),
    *((f"at {hour} pm", f"um {hour + 12} Uhr") for hour in range(1, 11)),
    *(
        (f"at {hour}:{minute}", f"um {hour}:{minute} Uhr")
        for hour in range(7, 13)
        for minute in (10, 15, 20, 30, 40, 45)
    ),
)
_ON_WEEKDAY = tuple((f"on {english}", f"am {german}") for english, german in _WEEKDAYS.items())
_AGO = tuple(
    (f"{number} {unit} ago", f"vor {word} {german}")
    for number, word in _NUMBERS.items()
    for unit, german in _UNITS.items()
)
_IN_SOME = tuple(
    (f"in {number} {unit}", f"in {word} {german}")
    for number, word in _NUMBERS.items()
    for unit, german in _UNITS.items()
)
_PAST_DAYS = (
    (
        3,
        (
            ("yesterday", "gestern"),
            ("this morning", "heute Morgen"),
            ("yesterday evening", "gestern Abend"),
            ("the day before yesterday", "vorgestern"),
            ("last week", "letzte Woche"),
            ("last month", "letzten Monat"),
            ("last year", "letztes Jahr"),
            ("last summer", "letzten Sommer"),
        ),
    ),
    (2, _ON_WEEKDAY),
    (1, tuple((f"last {english}", f"letzten {german}") for english, german in _WEEKDAYS.items())),
    (1, _AGO),
    (2, _DATES),
)
PAST_DAY = slot(*_PAST_DAYS)
PAST_TIME = slot(*_PAST_DAYS, (1, _CLOCK))
_FUTURE_DAYS = (
    (
        3,
        (
            ("tomorrow", "morgen"),
            ("tonight", "heute Abend"),
            ("tomorrow morning", "morgen früh"),
            ("the day after tomorrow", "übermorgen"),
            ("soon", "bald"),
            ("next week", "nächste Woche"),
            ("next month", "nächsten Monat"),
            ("next year", "nächstes Jahr"),
        ),
    ),
    (2, _ON_WEEKDAY),
    (1, tuple((f"next {english}", f"nächsten {german}") for english, german in _WEEKDAYS.items())),
    (1, _IN_SOME),
    (2, _DATES),
)
FUTURE_DAY = slot(*_FUTURE_DAYS)
FUTURE_TIME = slot(*_FUTURE_DAYS, (1, _CLOCK))
HABIT_TIME = slot(
    (
        2,
        (
            ("every day", "jeden Tag"),
            ("every morning", "jeden Morgen"),
            ("every afternoon", "jeden Nachmittag"),
            ("every evening", "jeden Abend"),
            ("every week", "jede Woche"),
            ("every year", "jedes Jahr"),
            ("at the weekend", "am Wochenende"),
            ("in the morning", "am Morgen"),
            ("in the evening", "am Abend"),
        ),
    ),
    (
        1,
        (
            ("in spring", "im Frühling"),
            ("in summer", "im Sommer"),
            ("in autumn", "im Herbst"),
            ("in winter", "im Winter"),
        ),
    ),
    (1, tuple((f"on {english}s", f"{german.lower()}s") for english, german in _WEEKDAYS.items())),
    (1, tuple((f"every {english}", f"jeden {german}") for english, german in _WEEKDAYS.items())),
)
EVENT_TIME = slot(
    (2, _CLOCK),
    (
        2,
        tuple(
            (f"{day} {time}", f"{german_day} {german_time}")
            for day, german_day in _ON_WEEKDAY
            for time, german_time in _CLOCK
        ),
    ),
    (2, _DATES),
    (
        2,
        tuple(
            (f"{date} {time}", f"{german_date} {german_time}")
            for date, german_date in _DATES
            for time, german_time in _CLOCK
        ),
    ),
)

# ---- parts of sentences that are fixed: (English, German)

OPINIONS = (
    ("I think", "Ich glaube"),
    ("we know", "Wir wissen"),
    ("he says", "Er sagt"),
    ("she believes", "Sie glaubt"),
    ("they are sure", "Sie sind sicher"),
    ("I have heard", "Ich habe gehört"),
    ("everyone knows", "Alle wissen"),
    ("we hope", "Wir hoffen"),
    ("it is good", "Es ist gut"),
    ("it is a pity", "Es ist schade"),
)
DOUBTS = (
    ("I do not know", "Ich weiß nicht"),
    ("we are not sure", "Wir sind nicht sicher"),
    ("nobody knows", "Niemand weiß"),
    ("she wants to know", "Sie möchte wissen"),
    ("he has forgotten", "Er hat vergessen"),
)
QUESTION_WORDS = (("when", "wann"), ("why", "warum"), ("whether", "ob"))
CONDITIONS = (
    ("if the weather is nice", "Wenn das Wetter schön ist"),
    ("if it rains", "Wenn es regnet"),
    ("if it is cold", "Wenn es kalt ist"),
    ("if we have enough time", "Wenn wir genug Zeit haben"),
    ("if the train is late", "Wenn der Zug Verspätung hat"),
    ("if nobody comes", "Wenn niemand kommt"),
    ("as soon as the guests arrive", "Sobald die Gäste ankommen"),
    ("as soon as the sun shines", "Sobald die Sonne scheint"),
    ("before the shops open", "Bevor die Geschäfte öffnen"),
    ("when the holidays begin", "Wenn die Ferien anfangen"),
)
EFFORTS = (
    ("tried to", "versucht"),
    ("forgot to", "vergessen"),
    ("promised to", "versprochen"),
    ("decided to", "beschlossen"),
    ("began to", "angefangen"),
)
# Verbs without an object, for "in order to": past, German participle with what stands before it, auxiliary.
DEEDS = (
    ("got up early", "früh aufgestanden", "sein"),
    ("went home", "nach Hause gegangen", "sein"),
    ("stayed at home", "zu Hause geblieben", "sein"),
    ("came back", "zurückgekommen", "sein"),
    ("went into town", "in die Stadt gegangen", "sein"),
    ("stopped working", "aufgehört zu arbeiten", "haben"),
)
SPOTS = (
    ("on the table", "auf dem Tisch"),
    ("under the bed", "unter dem Bett"),
    ("next to the sofa", "neben dem Sofa"),
    ("behind the door", "hinter der Tür"),
    ("in front of the mirror", "vor dem Spiegel"),
    ("in the kitchen", "in der Küche"),
    ("in the cellar", "im Keller"),
    ("in the living room", "im Wohnzimmer"),
    ("in the garage", "in der Garage"),
    ("in the old cupboard", "im alten Schrank"),
)
_BESIDE = (("in front of", "vor"), ("behind", "hinter"), ("next to", "neben"))
_LOW_PRICES = range(20, 100, 5)
_HIGH_PRICES = (*range(50, 100, 10), *range(100, 1000, 50))

# ---- determiners

_A = Determiner("a", "ein", "ein")
_THIS = Determiner("this", "dies", "der", definite=True)
_MY = Determiner("my", "mein", "ein", definite=True)
_OUR = Determiner("our", "unser", "ein", definite=True)
_HIS = Determiner("his", "sein", "ein", definite=True)
_HER = Determiner("her", "ihr", "ein", definite=True)
_SOME = Determiner("", "", "uninflected")  # no word: milk
_SOME_PLURAL = Determiner("", "", "uninflected", plural=True)
_THE_PLURAL = Determiner("the", "d", "the", plural=True, definite=True)
_THESE = Determiner("these", "dies", "der", plural=True, definite=True)
_MY_PLURAL = Determiner("my", "mein", "ein", plural=True, definite=True)
_OUR_PLURAL = Determiner("our", "unser", "ein", plural=True, definite=True)
_MANY = Determiner("many", "viel", "viel", plural=True)
_COUNTED = tuple(
    Determiner(str(number), word, "uninflected", plural=True) for number, word in _NUMBERS.items()
) + tuple(Determiner(str(number), str(number), "uninflected", plural=True) for number in (15, 20, 25, 30, 40, 50))
_NO = Determiner("a", "kein", "ein")
_NO_MASS = Determiner("", "kein", "ein")
_NO_PLURAL = Determiner("", "kein", "ein", plural=True)


def _determiners(noun: Noun) -> tuple[Determiner, ...]:
    """Those of the singular that make sense."""
    if "mass" in noun.classes:
        return (_SOME, THE)
    if "kin" in noun.classes:
        return (_MY, _OUR, _HIS, _HER)
    if "relation" in noun.classes:
        return (THE, _MY, _OUR, _HIS, _HER)
    if "job" in noun.classes:
        return (THE, _A, _THIS)
    if "one" in noun.classes:
        return (THE, _OUR)
    return (THE, _A, _THIS, _MY, _OUR)


def _plural_determiners(noun: Noun) -> tuple[Determiner, ...]:
    if noun.german_plural is None or noun.classes & {"mass", "one"}:
        return ()
    if "kin" in noun.classes:
        return (_MY_PLURAL, _OUR_PLURAL)
    if "relation" in noun.classes:
        return (_THE_PLURAL, _MY_PLURAL, _OUR_PLURAL)
    if noun.classes & {"food", "plant", "text", "clothing"}:
        return (_THE_PLURAL, _THESE, _SOME_PLURAL, _MANY)
    return (_THE_PLURAL, _THESE, _MANY)


def _phrases(noun: Noun, determiners: Sequence[Determiner], *, described: bool) -> tuple[NounPhrase, ...]:
    """Each determiner without an adjective, or with each adjective of the noun."""
    adjectives = noun.adjectives if described else (None,)
    return tuple(noun_phrase(noun, determiner, each) for determiner in determiners for each in adjectives)


@cache
def objects(noun: Noun) -> Slot:
    """The forms that a noun may have as an object."""
    single, plural = _determiners(noun), _plural_determiners(noun)
    counted = _COUNTED if plural and not noun.classes & PEOPLE else ()
    return slot(
        (3, _phrases(noun, single, described=False)),
        (3, _phrases(noun, single, described=True)),
        (1, _phrases(noun, plural, described=False)),
        (1, _phrases(noun, plural, described=True)),
        (1, _phrases(noun, counted, described=False)),
        (0.5, _phrases(noun, counted, described=True)),
    )


@cache
def events(noun: Noun) -> Slot:
    """A certain one, as the subject of what happens."""
    certain = [each for each in _determiners(noun) if each.definite]
    return slot((1, _phrases(noun, certain, described=False)), (1, _phrases(noun, certain, described=True)))


@cache
def definite_objects(noun: Noun) -> Slot:
    """Certain ones, one or several."""
    single = [each for each in _determiners(noun) if each.definite]
    plural = [each for each in _plural_determiners(noun) if each.definite]
    return slot(
        (2, _phrases(noun, single, described=False)),
        (2, _phrases(noun, single, described=True)),
        (1, _phrases(noun, plural, described=False)),
        (1, _phrases(noun, plural, described=True)),
    )


@cache
def negated_objects(noun: Noun, *, certain_only: bool = False) -> Slot:
    """Certain ones, which German negates by nicht, and, if wanted, others, which it negates by kein."""
    certain = [each for each in _determiners(noun) if each.definite]
    if certain_only or noun.classes & {"kin", "relation", "one"}:
        none = []
    elif "mass" in noun.classes:
        none = [_NO_MASS]
    else:
        none = [_NO, _NO_PLURAL]
    return slot(
        (1, _phrases(noun, certain, described=False)),
        (1, _phrases(noun, certain, described=True)),
        (1, _phrases(noun, none, described=False)),
        (1, _phrases(noun, none, described=True)),
    )


# ---- subjects


def _pronoun(english: str, german: str, number: int) -> NounPhrase:
    """A pronoun, which is a subject only."""
    return NounPhrase(english, (german, "", ""), number, "p", definite=True, pronoun=(english, german))


PRONOUNS = (
    _pronoun("I", "ich", FIRST),
    _pronoun("he", "er", SINGULAR),
    _pronoun("she", "sie", SINGULAR),
    _pronoun("we", "wir", PLURAL),
    _pronoun("they", "sie", PLURAL),
)
YOU = _pronoun("you", "Sie", PLURAL)


@cache
def _people(lexicon: Lexicon) -> tuple[tuple[Noun, NounPhrase], ...]:
    """Nouns of people with the phrases that may be subjects."""
    people = [noun for noun in lexicon.nouns.values() if noun.classes & PEOPLE]
    return tuple(
        (noun, phrase)
        for noun in people
        for determiners in (_determiners(noun), _plural_determiners(noun))
        for determiner in determiners
        if determiner.definite and determiner.english not in ("this", "these")
        for phrase in (noun_phrase(noun, determiner, adjective) for adjective in (None, *noun.adjectives[:2]))
    )


@cache
def subjects(lexicon: Lexicon, *, without: Noun | None = None, you: bool = False, neuter: bool = True) -> Slot:
    """Who does something.

    Arguments:
        without: the object, as nobody calls himself.
        you: "you" too, as in questions.
        neuter: the girl and the child too, which "she" or "he" takes up in English, but "es" in German.
    """
    people = [phrase for noun, phrase in _people(lexicon) if noun is not without and (neuter or phrase.gender != "n")]
    return slot((4, PRONOUNS), (2, (YOU,) if you else ()), (2, lexicon.names), (5, people))


@cache
def receivers(lexicon: Lexicon) -> Slot:
    """Who is given something: relatives and friends."""
    return slot(
        (1, [phrase for noun in lexicon.of_class("kin", "relation") for phrase in definite_objects(noun).options()])
    )


@cache
def givers(lexicon: Lexicon) -> Slot:
    """Who gives something: none of those who are given something."""
    receiving = lexicon.of_class("kin", "relation")
    people = [phrase for noun, phrase in _people(lexicon) if noun not in receiving]
    return slot((4, PRONOUNS), (2, lexicon.names), (4, people))


@cache
def workers(lexicon: Lexicon, *, without: Noun | None = None) -> Slot:
    """One person of whom more is told."""
    nouns = [noun for noun in lexicon.of_class("job") if noun is not without]
    return slot((1, [noun_phrase(noun, THE, adjective) for noun in nouns for adjective in (None, *noun.adjectives)]))


# ---- places and prices


@cache
def where(lexicon: Lexicon) -> Slot:
    """In, at, in front of, behind and next to the buildings."""
    buildings = [place for place in lexicon.places.values() if not place.city]
    return slot(
        (2, [place.at for place in buildings]),
        (1, [_beside(place, *preposition) for place in buildings if place.beside for preposition in _BESIDE]),
    )


def _beside(place: Place, english: str, german: str) -> tuple[str, str]:
    return f"{english} the {place.name}", f"{german} {place.beside}"


@cache
def homes(lexicon: Lexicon) -> Slot:
    """Where somebody comes from or works, with the verb ("lives" would be said as the plural of "life")."""
    cities = [place for place in lexicon.places.values() if place.city]
    return slot(
        (1, [(f"comes {place.away[0]}", f"kommt {place.away[1]}") for place in cities]),
        (1, [(f"works {place.at[0]}", f"arbeitet {place.at[1]}") for place in lexicon.places.values()]),
    )


@cache
def prices(noun: Noun, *, rented: bool = False) -> Slot:
    """Sums that are not out of the world for this."""
    if noun.classes & {"food", "drink", "plant", "written", "text"}:
        sums: Sequence[int] = range(2, 20)
    elif noun.english != "bicycle" and not rented and noun.classes & {"home", "vehicle"}:
        sums = range(100_000, 950_000, 50_000) if "home" in noun.classes else range(2_000, 20_000, 1_000)
    elif "home" in noun.classes:
        sums = range(300, 2_000, 50)
    else:
        sums = _HIGH_PRICES if noun.classes & {"machine", "furniture", "vehicle", "event", "valuable"} else _LOW_PRICES
    return slot((1, [(f"{euros:,} euros", f"{euros:,} Euro".replace(",", ".")) for euros in sums]))
