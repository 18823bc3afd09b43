"""Adaptive input and softmax: equal to the plain formulas, and the sizes of Baevski and Auli."""

from __future__ import annotations

import pytest
import torch

from leapformer.models import AdaptiveEmbedding, AdaptiveSoftmax
from tests.models.builders import tiny_model, tokens

CUTOFFS = [5, 12]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(29, 16, cutoffs=CUTOFFS, factor=4).double()
    return embedding, AdaptiveSoftmax(29, 16, cutoffs=CUTOFFS).double()


def test_every_word_is_its_bands_embedding_projected(pair):
    embedding, _ = pair
    ids = torch.arange(29).view(1, 29)
    rows = [e.weight @ p.weight.T for e, p in zip(embedding.embeddings, embedding.projections, strict=True)]
    torch.testing.assert_close(embedding(ids), torch.cat(rows)[None])
    assert [tuple(e.weight.shape) for e in embedding.embeddings] == [(5, 16), (7, 4), (17, 1)]


def test_log_probabilities_sum_to_one_and_agree_with_the_loss(pair):
    embedding, softmax = pair
    hidden, targets = torch.randn(40, 16, dtype=torch.float64), torch.arange(40) % 29
    logs = softmax.log_probabilities(hidden, embedding.weights())
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(40, dtype=torch.float64))
    losses = softmax.token_losses(hidden, targets, embedding.weights())
    torch.testing.assert_close(losses, -logs.gather(1, targets[:, None])[:, 0])


def test_ignored_targets_cost_nothing(pair):
    embedding, softmax = pair
    hidden = torch.randn(4, 16, dtype=torch.float64)
    losses = softmax.token_losses(hidden, torch.tensor([-100, 3, 28, -100]), embedding.weights())
    assert losses[0] == losses[3] == 0
    assert (losses[1:3] > 0).all()


def test_too_many_bands_for_the_width_are_refused():
    with pytest.raises(ValueError, match="expected hidden_size of at least factor"):
        AdaptiveEmbedding(29, 8, cutoffs=CUTOFFS, factor=4)


def test_a_model_with_adaptive_bands_trains_generates_and_survives_saving(tmp_path):
    model = tiny_model(adaptive_cutoffs=CUTOFFS)
    ids = tokens(2, 9)
    output = model(ids, labels=ids)
    assert output.logits is None
    logs = model(ids).logits
    expected = -logs[:, :-1].gather(2, ids[:, 1:, None]).mean()
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, logs)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_words_of_every_band_start_with_the_same_variance():
    embedding = tiny_model(hidden_size=256, vocab_size=600, adaptive_cutoffs=[200, 400]).model.embed_tokens
    for first in (0, 200, 400):
        assert embedding(torch.arange(first, first + 200)).std().item() == pytest.approx(0.3, rel=0.2)
