"""Every kind against its definition in plain Python, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from leapformer.tasks.synthetic.draws import uniforms
from leapformer.tasks.synthetic.kind import Kind
from leapformer.tasks.synthetic.kinds import KINDS, SETTINGS
from leapformer.tasks.synthetic.recalling import CopyAt, Recall, SelectiveCopy
from leapformer.tasks.synthetic.recipe import DataSection
from leapformer.tasks.synthetic.running import Addition, Brackets, Majority, Parity

NOTHING = -100


def recall(kind: Recall, tokens: list[int]) -> list[int]:
    shown = tokens[: 2 * kind.pairs]
    values = dict(zip(shown[::2], shown[1::2], strict=True))
    return [NOTHING] * len(shown) + [values.get(token, NOTHING) for token in tokens[len(shown) :]]


def copy_at(kind: CopyAt, tokens: list[int]) -> list[int]:
    text = len(tokens) - kind.questions * kind.digits
    answers = [NOTHING] * len(tokens)
    for start in range(text, len(tokens), kind.digits):
        number = 0
        for token in tokens[start : start + kind.digits]:
            number = kind.base * number + token - 1
        answers[start + kind.digits - 1] = tokens[number]
    return answers


def selective_copy(kind: SelectiveCopy, tokens: list[int]) -> list[int]:
    marked = [token - kind.vocabulary for token in tokens if kind.vocabulary < token < kind.ask]
    return [NOTHING] * (len(tokens) - kind.marked) + marked


def parity(kind: Parity, tokens: list[int]) -> list[int]:
    return [1 + tokens[: place + 1].count(2) % 2 for place in range(len(tokens))]


def addition(kind: Addition, tokens: list[int]) -> list[int]:
    return [1 + sum(token - 1 for token in tokens[: place + 1]) % 5 for place in range(len(tokens))]


def majority(kind: Majority, tokens: list[int]) -> list[int]:
    prefixes = [tokens[: place + 1] for place in range(len(tokens))]
    return [1 if prefix.count(1) >= prefix.count(2) else 2 for prefix in prefixes]


def brackets(kind: Brackets, tokens: list[int]) -> list[int]:
    return [5 + depth for depth in bracket_depths(kind, tokens)]


def bracket_depths(kind: Brackets, tokens: list[int]) -> Iterator[int]:
    opened: list[int] = []
    for token in tokens:
        if token in (1, 2):
            opened.append(token)
        else:
            assert token == opened.pop() + 2  # what closes is of the kind that was opened last
        assert len(opened) <= kind.depth
        yield len(opened)


Definition = Callable[..., list[int]]
CASES: list[tuple[Kind, int, Definition]] = [
    (Recall(), 64, recall),
    (Recall(pairs=3, vocabulary=7), 13, recall),  # an odd length and an odd vocabulary
    (Recall(pairs=4, vocabulary=8), 16, recall),  # every key, every value, every place
    (CopyAt(), 64, copy_at),
    (CopyAt(questions=2, digits=2, vocabulary=3), 104, copy_at),  # the longest text of two digits
    (CopyAt(questions=1, digits=1), 2, copy_at),
    (CopyAt(questions=3, digits=4, base=2), 20, copy_at),
    (SelectiveCopy(), 64, selective_copy),
    (SelectiveCopy(marked=5, vocabulary=2), 10, selective_copy),  # no noise
    (Parity(), 40, parity),
    (Addition(), 40, addition),
    (Majority(), 41, majority),
    (Brackets(), 80, brackets),
    (Brackets(depth=1), 7, brackets),
]


def some(kind: Kind, length: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    return kind.sequences(uniforms(7, "train", length, range(count), kind.draws(length)), length)


@pytest.mark.parametrize(("kind", "length", "define"), CASES)
def test_labels_are_those_of_the_definition(kind, length, define):
    assert kind.fault([length]) is None
    tokens, answers = some(kind, length)
    assert tokens.shape == answers.shape == (200, length) and tokens.dtype == answers.dtype == np.int64
    for sequence, answered in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert answered == define(kind, sequence)
    asked = answers[answers != NOTHING]
    assert tokens.min() >= 0 and tokens.max() < kind.vocab_size and asked.min() >= 1 and asked.max() < kind.vocab_size


def test_every_kind_has_a_case():
    assert {type(kind) for kind, _, _ in CASES} == set(KINDS.values())


@pytest.mark.parametrize(("kind", "length"), [(kind, length) for kind, length, _ in CASES if isinstance(kind, Recall)])
def test_recall_shows_each_key_and_each_value_once_and_asks_for_each_once(kind, length):
    tokens, answers = some(kind, length)
    for sequence, answered in zip(tokens.tolist(), answers.tolist(), strict=True):
        keys, values = sequence[0 : 2 * kind.pairs : 2], sequence[1 : 2 * kind.pairs : 2]
        assert len(set(keys)) == len(set(values)) == kind.pairs and max(keys) <= kind.keys < min(values)
        asked = [place for place, answer in enumerate(answered) if answer != NOTHING]
        assert sorted(sequence[place] for place in asked) == sorted(keys) and all(place % 2 == 0 for place in asked)
        assert sequence[2 * kind.pairs :].count(0) == length - 3 * kind.pairs  # blanks between


def test_selective_copy_marks_as_many_as_it_says_and_shows_no_answer():
    tokens, _ = some(SelectiveCopy(), 64)
    assert (tokens[:, -8:] == SelectiveCopy().ask).all()
    assert (((tokens > 16) & (tokens < SelectiveCopy().ask)).sum(axis=1) == 8).all()


@pytest.mark.parametrize("name", KINDS)
def test_every_id_occurs(name):
    kind = KINDS[name]()
    tokens, answers = some(kind, kind.default_length, 2000)
    ids = {*tokens.ravel().tolist(), *answers.ravel().tolist()} - {NOTHING}
    assert ids | {0} == set(range(kind.vocab_size))  # 0 closes a sequence


def test_recall_asks_near_the_pairs_more_often():
    """The paper's power law: of 24 places the first has a weight of 1, the last one of 24 ** -0.99."""
    _, answers = some(Recall(pairs=1), 50, 4000)
    asked = (answers[:, 2::2] != NOTHING).mean(axis=0)
    weights = np.arange(1, 25) ** -0.99
    wanted = weights / weights.sum()
    assert (np.abs(asked - wanted) < 5 * np.sqrt(wanted / 4000)).all()


def test_brackets_open_and_close_with_one_chance_in_two():
    tokens, answers = some(Brackets(depth=30), 30, 4000)  # the greatest depth is not reached before the end
    free = answers[:, :-1] > 5
    opens = (tokens[:, 1:] <= 2)[free]
    assert abs(opens.mean() - 0.5) < 5 * 0.5 / np.sqrt(opens.size)
    assert (tokens[:, 1:] <= 2)[~free].all()


def test_the_section_of_a_recipe_has_a_key_for_each_setting():
    keys = set(DataSection.model_fields) - {"kind", "length", "evaluate_at"}
    assert keys == set(SETTINGS)
    for name, kind in KINDS.items():
        section = DataSection(kind=name)
        assert section.task_kind == kind() and section.length == kind.default_length
        mine = {key: value for key, value in section.model_dump().items() if key in keys and value is not None}
        assert mine == vars(kind())
