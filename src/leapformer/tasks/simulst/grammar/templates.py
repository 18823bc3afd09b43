"""The kinds of sentences of the built-in grammar, each as a function from its choices to (English, German).

who, whom, what: noun phrases. when, where and the other parts that are not inflected: pairs (English, German).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from leapformer.tasks.simulst.grammar import slots
from leapformer.tasks.simulst.grammar.inflection import (
    AUXILIARIES,
    BE,
    CAN,
    FUTURE,
    GERMAN_BE,
    GERMAN_PASSIVE,
    MUST,
    NOMINATIVE,
    PAST,
    PRESENT,
    SHOULD,
    SINGULAR,
    WANT,
    WOULD_LIKE,
    GermanClause,
    Noun,
    NounPhrase,
    Tense,
    Verb,
    english_negation,
    english_question,
    english_statement,
    german_clause,
    zu_infinitive,
)
from leapformer.tasks.simulst.grammar.lexicon import Lexicon, Motion, Place, VerbEntry
from leapformer.tasks.simulst.grammar.slots import Slot, slot

Pair = tuple[str, str]
Build = Callable[..., Pair]

COST = Verb("cost", "cost", "cost", "", "kosten", "kostet", "gekostet")
LIE = Verb("lie", "lay", "lain", "", "liegen", "liegt", "gelegen")
STAND = Verb("stand", "stood", "stood", "", "stehen", "steht", "gestanden")

LASTING = ("stay", "work", "move")  # not done at a certain minute


@dataclass(frozen=True)
class Template:
    """A kind of sentence.

    Arguments:
        name: of the kind.
        entries: its verbs with their objects: VerbEntry, or Motion, whose objects are places.
        slots: makes the slots of an entry and an object.
        build: makes (English, German) of a verb and the choices by name, without capital and full stop.
        mark: the end of both sentences.
    """

    name: str
    entries: tuple[Any, ...]
    slots: Callable[[Any, Any], Mapping[str, Slot]]
    build: Build
    mark: str = "."

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Each verb with each of its objects."""
        for entry in self.entries:
            for each in entry.places if isinstance(entry, Motion) else entry.objects:
                yield entry, each

    def count(self) -> int:
        """How many sentences it makes."""
        return sum(prod(each.size for each in self.slots(*pair).values()) for pair in self.pairs())

    def sentence(self, entry: Any, choices: Mapping[str, Any]) -> Pair:
        """English and German of these choices."""
        english, german = self.build(entry.verb, **choices)
        return _finish(english, self.mark), _finish(german, self.mark)


def _finish(text: str, mark: str) -> str:
    return text[0].upper() + text[1:] + mark


# ---- main clauses


def _with_time_in_front(tense: Tense) -> Build:
    """Yesterday he bought a car: Gestern hat er ein Auto gekauft."""

    def build(verb: Verb, who: NounPhrase, what: NounPhrase, when: Pair) -> Pair:
        english = english_statement(who, verb, tense, what.english)
        return f"{when[0]} {english}", german_clause(who, verb, tense, verb.governed(what)).main(when[1])

    return build


def _with_time_inside(tense: Tense) -> Build:
    """He bought a car yesterday: Er hat gestern ein Auto gekauft."""

    def build(verb: Verb, who: NounPhrase, what: NounPhrase, when: Pair) -> Pair:
        english = english_statement(who, verb, tense, what.english, when[0])
        return english, german_clause(who, verb, tense, when[1], verb.governed(what)).main()

    return build


def _modal(verb: Verb, who: NounPhrase, what: NounPhrase, when: Pair, tense: Tense) -> Pair:
    """She has to sell the car tomorrow: Sie muss morgen das Auto verkaufen."""
    return _with_time_inside(tense)(verb, who, what, when)


def _how_often(verb: Verb, who: NounPhrase, what: NounPhrase, often: Pair) -> Pair:
    """He often opens the window: Er macht oft das Fenster auf."""
    english = english_statement(who, verb, PRESENT, what.english, adverb=often[0])
    return english, german_clause(who, verb, PRESENT, often[1], verb.governed(what)).main()


def _already(verb: Verb, who: NounPhrase, what: NounPhrase) -> Pair:
    """He has already sold the car: Er hat das Auto schon verkauft."""
    has = "has" if who.number == SINGULAR else "have"
    german = german_clause(who, verb, PAST, *_object_and(verb, what, "schon")).main()
    return f"{who.english} {has} already {verb.participle} {what.english}", german


def _somewhere(verb: Verb, who: NounPhrase, what: NounPhrase, where: Pair, when: Pair) -> Pair:
    """Yesterday she met the boss at the station: Gestern hat sie den Chef am Bahnhof getroffen."""
    english = english_statement(who, verb, PAST, what.english, where[0])
    german = german_clause(who, verb, PAST, *_object_and(verb, what, where[1])).main(when[1])
    return f"{when[0]} {english}", german


def _object_and(verb: Verb, what: NounPhrase, adverbial: str) -> tuple[str, str]:
    """A certain object stands before what is said of the deed; another, or one after a preposition, behind it."""
    governed = verb.governed(what)
    return (governed, adverbial) if what.definite and not verb.preposition else (adverbial, governed)


def _passive(verb: Verb, what: NounPhrase, when: Pair) -> Pair:
    """The car was sold yesterday: Das Auto wurde gestern verkauft."""
    was, wurde = BE["past"][what.number], GERMAN_PASSIVE[what.number]
    german = GermanClause(what.german[NOMINATIVE], wurde, when[1], verb.german_participle).main()
    return f"{what.english} {was} {verb.participle} {when[0]}", german


def _imperative(verb: Verb, what: NounPhrase) -> Pair:
    """Please open the window: Bitte machen Sie das Fenster auf."""
    german = german_clause(slots.YOU, verb, PRESENT, verb.governed(what)).verb_first()
    return f"please {verb.english} {what.english}", f"bitte {german}"


# ---- negation and questions


def _negation(tense: Tense) -> Build:
    """He did not sell the car yesterday: Er hat das Auto gestern nicht verkauft; ..., a car: ..., kein Auto."""

    def build(verb: Verb, who: NounPhrase, what: NounPhrase, when: Pair = ("", "")) -> Pair:
        governed = verb.governed(what)
        if not what.definite:
            middle = (when[1], governed)
        else:
            middle = (when[1], "nicht", governed) if verb.preposition else (governed, when[1], "nicht")
        return english_negation(who, verb, tense, what.english, when[0]), german_clause(
            who, verb, tense, *middle
        ).main()

    return build


def _question(verb: Verb, who: NounPhrase, what: NounPhrase, when: Pair) -> Pair:
    """Did he sell the car yesterday: Hat er gestern das Auto verkauft?"""
    english = english_question(who, verb, PAST, what.english, when[0])
    return english, german_clause(who, verb, PAST, when[1], verb.governed(what)).verb_first()


def _modal_question(verb: Verb, who: NounPhrase, what: NounPhrase, tense: Tense) -> Pair:
    """Can you open the window: Können Sie das Fenster aufmachen?"""
    english = english_question(who, verb, tense, what.english)
    return english, german_clause(who, verb, tense, verb.governed(what)).verb_first()


def _asking(verb: Verb, who: NounPhrase, what: NounPhrase, word: Pair) -> Pair:
    """Why did he sell the car: Warum hat er das Auto verkauft?"""
    english = english_question(who, verb, PAST, what.english)
    return f"{word[0]} {english}", f"{word[1]} {german_clause(who, verb, PAST, verb.governed(what)).verb_first()}"


# ---- subordinate clauses


def _that(tense: Tense) -> Build:
    """I think that he sold the car yesterday: Ich glaube, dass er gestern das Auto verkauft hat."""

    def build(verb: Verb, opinion: Pair, who: NounPhrase, what: NounPhrase, when: Pair) -> Pair:
        english = english_statement(who, verb, tense, what.english, when[0])
        german = german_clause(who, verb, tense, when[1], verb.governed(what)).verb_last("dass")
        return f"{opinion[0]} that {english}", f"{opinion[1]}, {german}"

    return build


def _that_modal(verb: Verb, opinion: Pair, who: NounPhrase, what: NounPhrase, tense: Tense) -> Pair:
    """We know that he has to sell the car: Wir wissen, dass er das Auto verkaufen muss."""
    return _that(tense)(verb, opinion, who, what, ("", ""))


def _doubt(verb: Verb, doubt: Pair, word: Pair, who: NounPhrase, what: NounPhrase) -> Pair:
    """Nobody knows why he sold the car: Niemand weiß, warum er das Auto verkauft hat."""
    english = english_statement(who, verb, PAST, what.english)
    german = german_clause(who, verb, PAST, verb.governed(what)).verb_last(word[1])
    return f"{doubt[0]} {word[0]} {english}", f"{doubt[1]}, {german}"


def _because(verb: Verb, somebody: NounPhrase, is_so: Pair, who: NounPhrase, what: NounPhrase) -> Pair:
    """I am happy because he sold the car: Ich bin froh, weil er das Auto verkauft hat."""
    english = english_statement(who, verb, PAST, what.english)
    german = german_clause(who, verb, PAST, verb.governed(what)).verb_last("weil")
    state = _state(somebody.english, somebody.german[NOMINATIVE], somebody.number, is_so)
    return f"{state[0]} because {english}", f"{state[1]}, {german}"


def _although(verb: Verb, who: NounPhrase, what: NounPhrase, tense: Tense, is_so: Pair) -> Pair:
    """Although he has to sell the car, he is happy: Obwohl er das Auto verkaufen muss, ist er froh."""
    english = english_statement(who, verb, tense, what.english)
    german = german_clause(who, verb, tense, verb.governed(what)).verb_last("obwohl")
    state = BE["present"][who.number], GERMAN_BE[who.number]
    return (
        f"although {english}, {who.pronoun[0]} {state[0]} {is_so[0]}",
        f"{german}, {state[1]} {who.pronoun[1]} {is_so[1]}",
    )


def _state(english: str, german: str, number: int, is_so: Pair) -> Pair:
    return f"{english} {BE['present'][number]} {is_so[0]}", f"{german} {GERMAN_BE[number]} {is_so[1]}"


def _condition(verb: Verb, condition: Pair, who: NounPhrase, what: NounPhrase) -> Pair:
    """If it rains, he will sell the car: Wenn es regnet, wird er das Auto verkaufen."""
    english = english_statement(who, verb, FUTURE, what.english)
    german = german_clause(who, verb, FUTURE, verb.governed(what)).verb_first()
    return f"{condition[0]}, {english}", f"{condition[1]}, {german}"


def _relative(verb: Verb, who: NounPhrase, what: NounPhrase, home: Pair) -> Pair:
    """The man who sold the car comes from Rome: Der Mann, der das Auto verkauft hat, kommt aus Rom."""
    auxiliary = verb.auxiliary[SINGULAR]
    relative = {"m": "der", "f": "die", "n": "das"}[who.gender]
    clause = GermanClause(relative, auxiliary, verb.governed(what), verb.german_participle).verb_last("")
    return (
        f"{who.english} who {verb.past} {what.english} {home[0]}",
        f"{who.german[NOMINATIVE]}, {clause}, {home[1]}",
    )


def _effort(verb: Verb, when: Pair, who: NounPhrase, effort: Pair, what: NounPhrase) -> Pair:
    """Yesterday he tried to sell the car: Gestern hat er versucht, das Auto zu verkaufen."""
    has = AUXILIARIES["haben"][who.number]
    german = GermanClause(who.german[NOMINATIVE], has, "", effort[1]).main(when[1])
    return (
        f"{when[0]} {who.english} {effort[0]} {verb.english} {what.english}",
        f"{german}, {verb.governed(what)} {zu_infinitive(verb)}",
    )


def _purpose(verb: Verb, who: NounPhrase, deed: tuple[str, str, str], what: NounPhrase) -> Pair:
    """He got up early to sell the car: Er ist früh aufgestanden, um das Auto zu verkaufen."""
    finite = AUXILIARIES[deed[2]][who.number]
    german = GermanClause(who.german[NOMINATIVE], finite, "", deed[1]).main()
    return (
        f"{who.english} {deed[0]} to {verb.english} {what.english}",
        f"{german}, um {verb.governed(what)} {zu_infinitive(verb)}",
    )


# ---- giving, going, happening, being, costing


def _giving(verb: Verb, who: NounPhrase, whom: NounPhrase, what: NounPhrase, when: Pair) -> Pair:
    """He gave my brother the book yesterday: Er hat meinem Bruder gestern das Buch gegeben."""
    english = english_statement(who, verb, PAST, whom.english, what.english, when[0])
    return english, german_clause(who, verb, PAST, whom.german[2], when[1], verb.governed(what)).main()


def _wanting_to_give(verb: Verb, who: NounPhrase, whom: NounPhrase, what: NounPhrase, tense: Tense) -> Pair:
    """He wants to show my brother the book: Er will meinem Bruder das Buch zeigen."""
    english = english_statement(who, verb, tense, whom.english, what.english)
    return english, german_clause(who, verb, tense, whom.german[2], verb.governed(what)).main()


def _going(verb: Verb, who: NounPhrase, where: Pair, when: Pair) -> Pair:
    """He flew to Rome yesterday: Er ist gestern nach Rom geflogen."""
    english = english_statement(who, verb, PAST, where[0], when[0])
    return english, german_clause(who, verb, PAST, when[1], where[1]).main()


def _going_soon(verb: Verb, who: NounPhrase, where: Pair, when: Pair) -> Pair:
    """Tomorrow he will fly to Rome: Morgen wird er nach Rom fliegen."""
    english = english_statement(who, verb, FUTURE, where[0])
    return f"{when[0]} {english}", german_clause(who, verb, FUTURE, where[1]).main(when[1])


def _that_going(verb: Verb, opinion: Pair, who: NounPhrase, where: Pair, when: Pair) -> Pair:
    """I think that he flew to Rome yesterday: Ich glaube, dass er gestern nach Rom geflogen ist."""
    english = english_statement(who, verb, PAST, where[0], when[0])
    german = german_clause(who, verb, PAST, when[1], where[1]).verb_last("dass")
    return f"{opinion[0]} that {english}", f"{opinion[1]}, {german}"


def _happening(verb: Verb, what: NounPhrase, tense: Tense, when: Pair) -> Pair:
    """The concert takes place at 8 pm: Das Konzert findet um 20 Uhr statt."""
    return english_statement(what, verb, tense, when[0]), german_clause(what, verb, tense, when[1]).main()


def _being(verb: Verb, what: NounPhrase, where: Pair) -> Pair:
    """The book is on the table: Das Buch liegt auf dem Tisch."""
    return (
        f"{what.english} {BE['present'][what.number]} {where[0]}",
        german_clause(what, verb, PRESENT, where[1]).main(),
    )


def _costing(verb: Verb, what: NounPhrase, price: Pair) -> Pair:
    """The car costs 12,000 euros: Das Auto kostet 12.000 Euro."""
    return english_statement(what, verb, PRESENT, price[0]), german_clause(what, verb, PRESENT, price[1]).main()


def _buying(verb: Verb, who: NounPhrase, what: NounPhrase, price: Pair, when: Pair) -> Pair:
    """He bought the shirt for 25 euros yesterday: Er hat gestern das Hemd für 25 Euro gekauft."""
    english = english_statement(who, verb, PAST, what.english, f"for {price[0]}", when[0])
    return english, german_clause(who, verb, PAST, when[1], verb.governed(what), f"für {price[1]}").main()


# ---- the list


def make_templates(lexicon: Lexicon) -> dict[str, Template]:
    """All templates, by name."""
    templates: dict[str, Template] = {}

    def add(name: str, entries: Sequence[Any], build: Build, mark: str = ".", **parts: Any) -> None:
        """parts: slots by name, each a Slot, or a function that makes it of the entry and the object."""

        def of_pair(entry: Any, object: Any) -> Mapping[str, Slot]:
            return {name: each if isinstance(each, Slot) else each(entry, object) for name, each in parts.items()}

        templates[name] = Template(name, tuple(entries), of_pair, build, mark)

    def who(_: Any, object: Noun | Place) -> Slot:
        return slots.subjects(lexicon, without=object if isinstance(object, Noun) else None)

    def who_asked(_: Any, object: Noun) -> Slot:
        return slots.subjects(lexicon, without=object, you=True)

    def what(_: Any, object: Noun) -> Slot:
        return slots.objects(object)

    def certain(_: Any, object: Noun) -> Slot:
        return slots.definite_objects(object)

    def negated(entry: VerbEntry, object: Noun) -> Slot:
        return slots.negated_objects(object, certain_only=bool(entry.verb.preposition))

    def goal(entry: Motion, place: Place) -> Slot:
        return slot((1, [place.phrase(entry.direction)]))

    def past_day(entry: Motion, _: Place) -> Slot:
        return slots.PAST_DAY if entry.verb.english in LASTING else slots.PAST_TIME

    def future_day(entry: Motion, _: Place) -> Slot:
        return slots.FUTURE_DAY if entry.verb.english in LASTING else slots.FUTURE_TIME

    verbs = lexicon.verbs
    habits = [entry for entry in verbs if "habit" in entry.uses]
    intended = [entry for entry in verbs if "unintended" not in entry.uses]
    past, future = slots.PAST_TIME, slots.FUTURE_TIME
    often = slot((1, list(lexicon.often.items())))
    predicates = slot((1, list(lexicon.predicates.items())))
    opinion = slot((1, slots.OPINIONS))
    modals = slot((1, (MUST, WANT, CAN, SHOULD, WOULD_LIKE)))
    conditions = slot((1, slots.CONDITIONS))

    add("habit_front", habits, _with_time_in_front(PRESENT), who=who, what=what, when=slots.HABIT_TIME)
    add("habit_often", habits, _how_often, who=who, what=what, often=often)
    add("past_front", verbs, _with_time_in_front(PAST), who=who, what=what, when=past)
    add("past", verbs, _with_time_inside(PAST), who=who, what=what, when=past)
    add("future_front", intended, _with_time_in_front(FUTURE), who=who, what=what, when=future)
    add("future", intended, _with_time_inside(FUTURE), who=who, what=what, when=future)
    add("modal", intended, _modal, who=who, what=what, when=future, tense=modals)
    add("already", verbs, _already, who=who, what=what)
    places = [entry for entry in verbs if "place" in entry.uses]
    add("somewhere", places, _somewhere, who=who, what=what, where=slots.where(lexicon), when=past)
    add("passive", [entry for entry in verbs if _has_passive(entry.verb)], _passive, what=certain, when=past)
    requests = [entry for entry in verbs if "habit" in entry.uses or entry.verb.prefix]
    add("imperative", requests, _imperative, what=certain)

    add("negation_past", verbs, _negation(PAST), who=who, what=negated, when=past)
    add("negation_habit", habits, _negation(PRESENT), who=who, what=negated)
    add("question_past", verbs, _question, "?", who=who_asked, what=what, when=past)
    add("question_modal", intended, _modal_question, "?", who=who_asked, what=what, tense=slot((1, (CAN, SHOULD))))
    words = slot((1, slots.QUESTION_WORDS[:2]))
    add("question_word", verbs, _asking, "?", who=who_asked, what=what, word=words)

    add("that_past", verbs, _that(PAST), opinion=opinion, who=who, what=what, when=past)
    add("that_future", intended, _that(FUTURE), opinion=opinion, who=who, what=what, when=future)
    add("that_modal", intended, _that_modal, opinion=opinion, who=who, what=what, tense=modals)
    asked = slot((1, slots.QUESTION_WORDS))
    add("doubt", verbs, _doubt, doubt=slot((1, slots.DOUBTS)), word=asked, who=who, what=what)
    anybody = slot((1, slots.PRONOUNS))
    add("because", verbs, _because, somebody=anybody, is_so=predicates, who=who, what=what)
    add("although", intended, _although, who=_no_neuter(lexicon), what=what, tense=modals, is_so=predicates)
    add("condition", intended, _condition, condition=conditions, who=who, what=what)
    add("relative", verbs, _relative, who=_worker(lexicon), what=what, home=slots.homes(lexicon))
    add("effort", intended, _effort, when=past, who=who, effort=slot((1, slots.EFFORTS)), what=what)
    add("purpose", intended, _purpose, who=who, deed=slot((1, slots.DEEDS)), what=what)

    giving = {"who": slots.givers(lexicon), "whom": slots.receivers(lexicon), "what": what}
    add("giving", lexicon.giving, _giving, **giving, when=past)
    add("giving_modal", lexicon.giving, _wanting_to_give, **giving, tense=modals)
    add("going", lexicon.moving, _going, who=who, where=goal, when=past_day)
    add("going_future", lexicon.moving, _going_soon, who=who, where=goal, when=future_day)
    add("that_going", lexicon.moving, _that_going, opinion=opinion, who=who, where=goal, when=past_day)
    tenses = slot((1, (PRESENT, PAST, FUTURE)))
    add("happening", lexicon.happening, _happening, what=_event, tense=tenses, when=slots.EVENT_TIME)
    lying = [VerbEntry(LIE, lexicon.of_class("lies")), VerbEntry(STAND, lexicon.of_class("stands"))]
    add("being", lying, _being, what=certain, where=slot((1, slots.SPOTS)))
    bought = next(entry for entry in verbs if entry.verb.english == "buy")
    add("costing", [VerbEntry(COST, bought.objects)], _costing, what=certain, price=_price)
    paid = [entry for entry in verbs if "price" in entry.uses]
    add("buying", paid, _buying, who=who, what=what, price=_price, when=past)
    return templates


def _has_passive(verb: Verb) -> bool:
    """Verbs with an accusative, and no English preposition that would be left behind."""
    return not verb.preposition and verb.case == 1 and not verb.english.endswith((" for", " at"))


def _no_neuter(lexicon: Lexicon) -> Callable[[Any, Noun], Slot]:
    return lambda _, object: slots.subjects(lexicon, without=object, neuter=False)


def _worker(lexicon: Lexicon) -> Callable[[Any, Noun], Slot]:
    return lambda _, object: slots.workers(lexicon, without=object)


def _event(_: VerbEntry, object: Noun) -> Slot:
    return slots.events(object)


def _price(entry: VerbEntry, object: Noun) -> Slot:
    cheap = entry.verb.english not in ("buy", "sell", "cost")
    return slots.prices(object, rented=cheap)
