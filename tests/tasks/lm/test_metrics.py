"""Sums of nats to perplexities."""

import math

import numpy as np
import pytest
import torch

from leapformer.tasks.lm.metrics import LossByPosition, bits_per_byte, word_perplexity
from leapformer.tasks.lm.packing import PackedDataset, iterate_batches


def test_per_word_and_per_byte():
    assert word_perplexity(10 * math.log(50), 10) == pytest.approx(50)
    assert bits_per_byte(16 * math.log(2), 8) == pytest.approx(2)
    assert word_perplexity(1e6, 1) == math.inf


@pytest.mark.parametrize("function", [word_perplexity, bits_per_byte])
def test_nothing_to_divide_by(function):
    with pytest.raises(ValueError, match="expected a positive number of (words|bytes), got 0"):
        function(1.0, 0)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(across, dtype):
    tokens = np.random.default_rng(1).integers(0, 16, 101).astype(np.int32)
    dataset = PackedDataset(tokens, block_size=8, document_starts=np.array([0, 30]), across_documents=across)
    sums = LossByPosition(7)
    for batch in iterate_batches(dataset, batch_size=4):
        labels = batch["labels"]
        losses = torch.full((labels.shape[0], labels.shape[1] - 1), 2.0, dtype=dtype)
        losses[labels[:, 1:] == -100] = float("nan")
        sums.add(losses, labels, position_ids=batch.get("position_ids"))
    result = sums.metrics(words=50, size=200)
    assert result.loss == 2.0
    assert result.tokens == sums.tokens == 100
    assert result.word_perplexity == pytest.approx(math.exp(4))
    assert result.bits_per_byte == pytest.approx(1 / math.log(2))
    assert result.as_dict() == vars(result)


def test_losses_are_summed_at_the_position_they_are_made_from():
    sums = LossByPosition(3)
    labels = torch.tensor([[5, 6, 7, -100], [5, 6, 7, 8]])
    sums.add(torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]]), labels)
    assert sums.nats.tolist() == [4.0, 6.0, 5.0]
    assert sums.counts.tolist() == [2, 2, 1]
    assert sums.perplexity() == [
        {"start": 0, "end": 1, "tokens": 2, "perplexity": pytest.approx(math.exp(2))},
        {"start": 1, "end": 2, "tokens": 2, "perplexity": pytest.approx(math.exp(3))},
        {"start": 2, "end": 3, "tokens": 1, "perplexity": pytest.approx(math.exp(5))},
    ]
    (whole,) = sums.perplexity(bins=1)
    assert whole == {"start": 0, "end": 3, "tokens": 5, "perplexity": pytest.approx(math.exp(3))}


def test_positions_without_tokens_are_left_out():
    sums = LossByPosition(6)
    sums.add(torch.tensor([[1.0, 1.0]]), torch.tensor([[0, 1, 2]]), position_ids=torch.tensor([[4, 5, 0]]))
    assert [row["start"] for row in sums.perplexity()] == [4, 5]
    assert [(row["start"], row["end"]) for row in sums.perplexity(bins=2)] == [(3, 6)]


def test_sums_do_not_lose_small_losses():
    sums = LossByPosition(1)
    labels = torch.zeros(100_000, 2, dtype=torch.int64)
    sums.add(torch.full((100_000, 1), 0.1), labels)
    assert sums.total_nats == pytest.approx(100_000 * float(np.float32(0.1)), rel=1e-12)


def test_bad_shapes():
    sums = LossByPosition(2)
    labels = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"losses: expected shape \(1, 2\) for labels \(1, 3\), got \(1, 3\)"):
        sums.add(torch.zeros(1, 3), labels)
    with pytest.raises(ValueError, match=r"position_ids: expected shape \(1, 3\), got \(1, 2\)"):
        sums.add(torch.zeros(1, 2), labels, position_ids=labels[:, :2])
    with pytest.raises(ValueError, match="position_ids: expected less than 2, got 7"):
        sums.add(torch.zeros(1, 2), labels, position_ids=labels + 7)
    with pytest.raises(ValueError, match="positive number of predicted tokens"):
        sums.metrics(words=1, size=1)
    with pytest.raises(ValueError, match="positive number of positions, got 0"):
        LossByPosition(0)
