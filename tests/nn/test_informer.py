"""Informer: many chosen queries give softmax; otherwise the telling ones have it and the others the mean."""

import math

import torch
from transformers.models.informer.modeling_informer import InformerProbSparseAttention

from leapformer.nn import InformerAttention
from tests.nn.oracles import close, heads, softmax


def layer_of(factor, **arguments):
    layer = InformerAttention(16, 2, **arguments).double().eval()
    layer.factor = factor
    return layer


@torch.no_grad()
def test_a_large_factor_gives_softmax():
    q, k, v = (heads(2, 20, 2, 8, seed=seed) for seed in range(3))
    close(layer_of(20).mix(q, k, v, None), softmax(q, k, v))


@torch.no_grad()
def test_chosen_queries_have_softmax_and_the_others_the_mean():
    q, k, v = (heads(2, 60, 2, 8, seed=seed) for seed in range(3))
    y, exact, mean = layer_of(3).mix(q, k, v, None), softmax(q, k, v), v.mean(1, keepdim=True)
    as_softmax = torch.isclose(y, exact, atol=1e-12).all(-1)
    as_mean = torch.isclose(y, mean.expand_as(y), atol=1e-12).all(-1)
    assert (as_softmax ^ as_mean).all()
    assert (as_softmax.sum(1) == 3 * math.ceil(math.log(61))).all()
    # A chosen query's scores differ more, as measured on all keys: true on average though measured on a few.
    scores = torch.einsum("bthk,bshk->bths", q, k)
    telling = scores.amax(-1) - scores.mean(-1)
    assert telling[as_softmax].mean() > telling[as_mean].mean() + telling.std() / 2


@torch.no_grad()
def test_equals_transformers_on_a_sequence_said_twice(monkeypatch):
    """It measures on all keys where they are few, we on c ln n. Half of a sequence said twice measures as the whole."""
    factor, half = 3, 12
    layer = layer_of(factor)
    assert factor * math.ceil(math.log1p(2 * half)) == half
    oracle = InformerProbSparseAttention(16, 2, sampling_factor=factor).double().eval()
    for ours, theirs in (("q_proj",) * 2, ("k_proj",) * 2, ("v_proj",) * 2, ("o_proj", "out_proj")):
        getattr(layer, ours).load_state_dict(getattr(oracle, theirs).state_dict())
    layer.random = lambda count: (torch.arange(count) + 0.5) / (2 * half)  # the first half
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.arange(high))
    x = heads(2, half, 16, seed=3).repeat(1, 2, 1)
    theirs = oracle(x)[0]
    close(layer(x)[0], theirs)


def test_the_factor_comes_from_the_features_at_the_longest_length():
    layer = InformerAttention(16, 2, num_features=128, max_positions=4000)
    assert layer.factor == 16  # ceil(128 / ln 4000), as the paper's harness has it
