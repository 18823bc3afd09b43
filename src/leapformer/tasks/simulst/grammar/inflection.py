"""Forms of words in English and German, as far as the built-in grammar needs them.

A German noun phrase has one form for each case, `(nominative, accusative, dative)`; the genitive is not used. A finite
German verb has one for each kind of subject, `(I, he, they)`; "Sie" takes the third.
"""

from __future__ import annotations

from dataclasses import dataclass

NOMINATIVE, ACCUSATIVE, DATIVE = range(3)
FIRST, SINGULAR, PLURAL = range(3)  # kinds of subjects: "I"; "he", "Anna"; "we", "they", "Sie"

# Endings by gender ("p": plural) for the three cases.
_STRONG = {"m": ("er", "en", "em"), "f": ("e", "e", "er"), "n": ("es", "es", "em"), "p": ("e", "e", "en")}
_WEAK = {"m": ("e", "en", "en"), "f": ("e", "e", "en"), "n": ("e", "e", "en"), "p": ("en", "en", "en")}
_MIXED = {"m": ("er", "en", "en"), "f": ("e", "e", "en"), "n": ("es", "es", "en"), "p": ("en", "en", "en")}
_EIN = {"m": ("", "en", "em"), "f": ("e", "e", "er"), "n": ("", "", "em"), "p": ("e", "e", "en")}
_NONE = dict.fromkeys("mfnp", ("", "", ""))
_THE = {"m": ("er", "en", "em"), "f": ("ie", "ie", "er"), "n": ("as", "as", "em"), "p": ("ie", "ie", "en")}

# What a kind of determiner ends in, and what an adjective after it ends in.
_ENDINGS = {
    "the": (_THE, _WEAK),
    "der": (_STRONG, _WEAK),
    "ein": (_EIN, _MIXED),
    "viel": (_STRONG, _STRONG),
    "uninflected": (_NONE, _STRONG),
}

_CONTRACTIONS = {
    ("in", "das"): "ins",
    ("in", "dem"): "im",
    ("an", "dem"): "am",
    ("zu", "dem"): "zum",
    ("zu", "der"): "zur",
    ("von", "dem"): "vom",
}

_HABEN = ("habe", "hat", "haben")
_SEIN = ("bin", "ist", "sind")
_THEY = {"m": "er", "f": "sie", "n": "es", "p": "sie"}


@dataclass(frozen=True)
class Determiner:
    """A word before a noun: its English, its German up to the ending, how it is declined, and what it makes of the
    noun.

    Arguments:
        kind: "the", "der" (declined like dieser), "ein" (like mein), "viel" or "uninflected" (numbers, or no word).
        plural: the noun is in the plural.
        definite: a certain one; "not" then stands after the object, and "kein" is no choice.
    """

    english: str
    german: str
    kind: str
    plural: bool = False
    definite: bool = False


@dataclass(frozen=True)
class Adjective:
    """German is the stem before an ending: teur, not teuer."""

    english: str
    german: str


@dataclass(frozen=True, eq=False)
class Noun:
    """A noun with its forms and what may be said of it.

    Arguments:
        english, english_plural: both numbers.
        gender: "m", "f" or "n".
        german: the three cases of the singular, which differ in weak nouns (der Nachbar, den Nachbarn).
        german_plural: or None where only the singular is used.
        classes, adjectives: what it is, and the adjectives that may describe it.
    """

    english: str
    english_plural: str
    gender: str
    german: tuple[str, str, str]
    german_plural: str | None
    classes: frozenset[str]
    adjectives: tuple[Adjective, ...]


@dataclass(frozen=True)
class NounPhrase:
    """Something that may be subject or object.

    Arguments:
        english: as a subject or an object, which is the same but for pronouns (these are subjects only).
        german: the three cases.
        number: FIRST, SINGULAR or PLURAL: the kind of subject.
        gender: "m", "f", "n" or "p".
        definite: see `Determiner`.
        pronoun: what takes it up again, (English, German).
    """

    english: str
    german: tuple[str, str, str]
    number: int
    gender: str
    definite: bool
    pronoun: tuple[str, str]


@dataclass(frozen=True)
class Verb:
    """A verb with its forms.

    Arguments:
        english, past, participle: "take off", "took off", "taken off".
        prefix, infinitive: separable prefix or "", and the rest: "aus", "ziehen".
        he: third person singular without the prefix.
        german_participle: "ausgezogen".
        preposition, case: of the object.
        auxiliary: forms of haben or sein, for the perfect.
    """

    english: str
    past: str
    participle: str
    prefix: str
    infinitive: str
    he: str
    german_participle: str
    preposition: str = ""
    case: int = ACCUSATIVE
    auxiliary: tuple[str, str, str] = _HABEN

    def finite(self) -> tuple[str, str, str]:
        """The present tense, without the prefix."""
        stem = self.infinitive.removesuffix("n")
        return (stem if stem.endswith("e") else f"{stem}e", self.he, self.infinitive)

    def governed(self, phrase: NounPhrase) -> str:
        """The German object: in its case, after its preposition."""
        return after_preposition(self.preposition, phrase.german[self.case])


@dataclass(frozen=True)
class Tense:
    """What a verb is put into.

    Arguments:
        english: the auxiliary after "he" and after others; none in the present and past.
        german: finite forms of the auxiliary for (I, he, they); none in the present and perfect.
        form: "present", "past" (German: perfect) or "infinitive" (after an auxiliary).
    """

    form: str
    english: tuple[str, str] = ("", "")
    german: tuple[str, str, str] = ("", "", "")


PRESENT = Tense("present")
PAST = Tense("past")
FUTURE = Tense("infinitive", ("will", "will"), ("werde", "wird", "werden"))
MUST = Tense("infinitive", ("has to", "have to"), ("muss", "muss", "müssen"))
WANT = Tense("infinitive", ("wants to", "want to"), ("will", "will", "wollen"))
CAN = Tense("infinitive", ("can", "can"), ("kann", "kann", "können"))
SHOULD = Tense("infinitive", ("should", "should"), ("sollte", "sollte", "sollten"))
WOULD_LIKE = Tense("infinitive", ("would like to", "would like to"), ("möchte", "möchte", "möchten"))

AUXILIARIES = {"haben": _HABEN, "sein": _SEIN}
BE = {"present": ("am", "is", "are"), "past": ("was", "was", "were")}
GERMAN_BE = _SEIN
GERMAN_PASSIVE = ("wurde", "wurde", "wurden")


def after_preposition(preposition: str, phrase: str) -> str:
    """The phrase after a preposition, drawn together with its article where that is usual: im, zur."""
    if not preposition:
        return phrase
    article, _, rest = phrase.partition(" ")
    short = _CONTRACTIONS.get((preposition, article))
    return f"{short} {rest}" if short else f"{preposition} {phrase}"


def indefinite_article(word: str) -> str:
    """a or an, by sound: an hour, a university."""
    sounds_open = word[0] in "aeiou" and not word.startswith(("uni", "us", "eu", "one"))
    return "an" if sounds_open or word.startswith("hour") else "a"


def third_person(verb: str) -> str:
    """he-form of an English verb, whose first word is inflected: picks up."""
    first, space, rest = verb.partition(" ")
    return english_s(first) + space + rest


def english_s(word: str) -> str:
    """The word with -s, -es or -ies, as plurals and third persons have it."""
    if word.endswith(("s", "x", "z", "ch", "sh")) or word == "go":
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def noun_phrase(noun: Noun, determiner: Determiner, adjective: Adjective | None = None) -> NounPhrase:
    """Determiner, adjective and noun, in agreement."""
    plural = determiner.plural
    gender = "p" if plural else noun.gender
    endings, adjective_endings = _ENDINGS[determiner.kind]
    german = []
    for case in (NOMINATIVE, ACCUSATIVE, DATIVE):
        words = [determiner.german + endings[gender][case]]
        if adjective:
            words.append(adjective.german + adjective_endings[gender][case])
        words.append(_german_form(noun, case, plural=plural))
        german.append(" ".join(filter(None, words)))
    words = [adjective.english] if adjective else []
    words.append(noun.english_plural if plural else noun.english)
    article = indefinite_article(words[0]) if determiner.english == "a" else determiner.english
    english_pronoun = "they" if plural else {"m": "he", "f": "she", "n": "it"}[noun.gender]
    return NounPhrase(
        english=" ".join(filter(None, [article, *words])),
        german=(german[0], german[1], german[2]),
        number=PLURAL if plural else SINGULAR,
        gender=gender,
        definite=determiner.definite,
        pronoun=(english_pronoun, _THEY[gender]),
    )


def _german_form(noun: Noun, case: int, *, plural: bool) -> str:
    if not plural:
        return noun.german[case]
    assert noun.german_plural
    ends = case == DATIVE and not noun.german_plural.endswith(("n", "s"))
    return f"{noun.german_plural}n" if ends else noun.german_plural


@dataclass(frozen=True)
class GermanClause:
    """The parts of a German clause, which each kind of clause puts in another order.

    Arguments:
        subject: nominative.
        finite: the verb that agrees with it.
        middle: all between, in its order.
        end: participle or infinitive.
        prefix: a separable prefix of the finite verb.
    """

    subject: str
    finite: str
    middle: str
    end: str = ""
    prefix: str = ""

    def main(self, front: str = "") -> str:
        """The finite verb in second place, after the subject or what stands in front."""
        if front:
            return _join(front, self.finite, self.subject, self.middle, self.end, self.prefix)
        return _join(self.subject, self.finite, self.middle, self.end, self.prefix)

    def verb_first(self) -> str:
        """The finite verb in the first place: of a question, or after a clause."""
        return _join(self.finite, self.subject, self.middle, self.end, self.prefix)

    def verb_last(self, conjunction: str) -> str:
        """The finite verb at the end, with its prefix."""
        return _join(conjunction, self.subject, self.middle, self.end, self.prefix + self.finite)


def german_clause(subject: NounPhrase, verb: Verb, tense: Tense, *middle: str) -> GermanClause:
    """A clause of subject, verb and the parts between, in their order."""
    name, between = subject.german[NOMINATIVE], _join(*middle)
    if tense.form == "present":
        return GermanClause(name, verb.finite()[subject.number], between, prefix=verb.prefix)
    if tense.form == "past":
        return GermanClause(name, verb.auxiliary[subject.number], between, verb.german_participle)
    return GermanClause(name, tense.german[subject.number], between, verb.prefix + verb.infinitive)


def zu_infinitive(verb: Verb) -> str:
    """zu before the infinitive, or between prefix and verb: zu kaufen, aufzumachen."""
    return f"{verb.prefix}zu{verb.infinitive}" if verb.prefix else f"zu {verb.infinitive}"


def english_statement(subject: NounPhrase, verb: Verb, tense: Tense, *rest: str, adverb: str = "") -> str:
    """Subject, adverb, verb and the rest."""
    if tense.form == "infinitive":
        return _join(subject.english, english_auxiliary(subject, tense), adverb, verb.english, *rest)
    if tense.form == "past":
        return _join(subject.english, adverb, verb.past, *rest)
    present = third_person(verb.english) if subject.number == SINGULAR else verb.english
    return _join(subject.english, adverb, present, *rest)


def english_negation(subject: NounPhrase, verb: Verb, tense: Tense, *rest: str) -> str:
    """With "not", which the present and past need "do" for."""
    return _join(subject.english, english_auxiliary(subject, tense), "not", verb.english, *rest)


def english_question(subject: NounPhrase, verb: Verb, tense: Tense, *rest: str) -> str:
    """The auxiliary first, which the present and past need "do" for."""
    return _join(english_auxiliary(subject, tense), subject.english, verb.english, *rest)


def english_auxiliary(subject: NounPhrase, tense: Tense) -> str:
    """What stands before the infinitive: "do" where the tense has no word of its own."""
    if tense.form == "infinitive":
        return tense.english[0] if subject.number == SINGULAR else tense.english[1]
    if tense.form == "past":
        return "did"
    return "does" if subject.number == SINGULAR else "do"


def _join(*parts: str) -> str:
    return " ".join(filter(None, parts))
