"""Sequences are made from the seed, the split and their number alone; chance is counted."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from leapformer.models.loss import next_token_labels
from leapformer.tasks.synthetic.data import Sequences, chance, collate
from leapformer.tasks.synthetic.draws import STREAMS, choices, uniforms, weighted_choices, whole
from leapformer.tasks.synthetic.kinds import KINDS
from leapformer.tasks.synthetic.recalling import Recall, SelectiveCopy
from leapformer.tasks.synthetic.running import Addition, Brackets, Majority, Parity


def sequences(name: str = "recall", **changes) -> Sequences:
    return Sequences(KINDS[name](), **{"length": 64, "seed": 3, "stream": "train", "count": 50, **changes})


def test_random_numbers_of_an_example_are_its_own():
    first = uniforms(3, "train", 40, [5, 9, 2], 100)
    assert (first == uniforms(3, "train", 40, [2, 5, 9], 100)[[1, 2, 0]]).all()
    assert (first[:, :10] == uniforms(3, "train", 40, [5, 9, 2], 10)).all()
    assert first.min() >= 0 and first.max() < 1 and uniforms(3, "train", 40, [], 7).shape == (0, 7)


def test_random_numbers_are_the_same_everywhere():
    """So a validation set is that of everybody else; the figures are those of numpy 2.4 on x86-64."""
    found = uniforms(0, "validation", 40, [0, 511], 2)
    assert found.tolist() == [[0.41645831313800197, 0.512803928015058], [0.3216844350292215, 0.9134008680036549]]


def test_seeds_splits_and_lengths_are_streams_of_their_own():
    """No number occurs twice: of 2**53 equally likely ones two of these 28,800 agree with a chance of 5e-8."""
    drawn = [
        uniforms(seed, stream, length, range(40), 10)
        for seed in (0, 1, 2**32 - 1)
        for stream in STREAMS
        for length in (40, 80, 160, 41, 64, 1 << 20)
    ]
    numbers = np.concatenate(drawn).ravel()
    assert len(numbers) == 28_800 and len(np.unique(numbers)) == len(numbers)


def test_choices():
    uniform = uniforms(0, "train", 1, range(6000), 3)
    assert {tuple(row) for row in choices(uniform, 2).tolist()} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }
    assert sorted({*whole(uniform, 5).ravel().tolist()}) == [0, 1, 2, 3, 4]
    # The first is 0, 1, 2 with chances of 1, 2, 3 in 6, and after 2 comes 1 with 2 in 3.
    drawn = weighted_choices(uniform, np.array([1.0, 2.0, 3.0]), 3)
    firsts = np.bincount(drawn[:, 0], minlength=3) / 6000
    assert np.abs(firsts - np.array([1, 2, 3]) / 6).max() < 5 * 0.5 / np.sqrt(6000)
    after = drawn[drawn[:, 0] == 2, 1]
    assert abs((after == 1).mean() - 2 / 3) < 5 * 0.5 / np.sqrt(len(after))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_asked_after_a_token_is_where_the_model_looks(name):
    dataset = sequences(name)
    tokens, answers = dataset.answered(range(50))
    batch = dataset.batch(range(50))
    assert batch["input_ids"][:, :-1].tolist() == tokens.tolist() and (batch["input_ids"][:, -1] == 0).all()
    targets = next_token_labels(batch["labels"])  # place t of the model's logits is scored on this
    assert targets[:, :-1].tolist() == answers.tolist() and (targets[:, -1] == -100).all()


@pytest.mark.parametrize("name", KINDS)
def test_an_item_is_the_same_alone_in_a_batch_and_in_another_process(name):
    dataset = sequences(name)
    alone = collate([dataset[index] for index in range(50)])
    copied = pickle.loads(pickle.dumps(dataset))
    for workers in (0, 2) if name == "recall" else (0,):
        loader = DataLoader(
            copied,
            batch_size=7,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            collate_fn=collate,
        )
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [7] * 7 + [1]
        for key, rows in alone.items():
            assert torch.equal(torch.cat([batch[key] for batch in batches]), rows)


def test_an_item_that_is_not_there():
    for index in (50, -1):
        with pytest.raises(IndexError, match=f"sequence {index} of 50"):
            sequences()[index]


def test_seeds_and_splits_share_no_sequence():
    found = [
        tuple(row.tolist())
        for changes in ({}, {"seed": 4}, {"stream": "validation"}, {"stream": "test"}, {"stream": "counted"})
        for row in sequences("addition", **changes).batch(range(50))["input_ids"]
    ]
    assert len(set(found)) == len(found) == 250


# ---- chance


def test_chance_of_equally_likely_answers():
    for kind, expected in ((Parity(), 1 / 2), (Addition(), 1 / 5), (SelectiveCopy(), 1 / 16)):
        dataset = Sequences(kind, length=64, seed=0, stream="test", count=512)
        answers = (dataset.answered(range(512))[1] != -100).sum()
        # Answers of a sequence hang together, and at worst all of them do.
        assert abs(chance(dataset) - expected) < 5 * np.sqrt(expected * (1 - expected) / min(answers, 512))
    assert chance(sequences()) == 1 / Recall().pairs


def test_chance_where_the_place_tells():
    """Of two symbols after two symbols the first leads, or both are as often, three times in four; after one, half of
    the time. Of brackets at places 1 and 2 the depths are 1, and 0 or 2.
    """
    majority = Sequences(Majority(), length=2, seed=0, stream="test", count=4096)
    assert abs(chance(majority) - (1 / 2 + 3 / 4) / 2) < 5 * 0.5 / np.sqrt(4096)
    brackets = Sequences(Brackets(), length=2, seed=0, stream="test", count=4096)
    assert abs(chance(brackets) - (1 + 1 / 2) / 2) < 5 * 0.5 / np.sqrt(4096)


def test_chance_says_nothing_right_at_a_place_that_was_never_counted(monkeypatch):
    monkeypatch.setattr("leapformer.tasks.synthetic.data.COUNTED_TOKENS", 0)  # one sequence
    dataset = sequences("copy-at")
    assert 0 <= chance(dataset) < 1
