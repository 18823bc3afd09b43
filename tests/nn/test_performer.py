"""FAVOR+: an unbiased estimate whose error falls as M^-1/2, causal and streaming as linear attention is."""

import importlib
import warnings

import pytest
import torch

from leapformer.nn import RandomFeatures, build_attention
from leapformer.ops import linear_attention
from tests.nn.oracles import close, heads, scores, softmax, weighted

K = 8


def drawn(seed, features=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RandomFeatures(K, features).double()


def estimates(q, k, *, features, draws):
    """exp(q . k / sqrt(K)) as each of so many draws has it, [draws, T, S]."""
    return torch.stack([_estimate(drawn(seed, features), q, k) for seed in range(draws)])


def _estimate(features, q, k):
    phi_q, phi_k = features.of_keys(q, None, relative=False), features.of_keys(k, None, relative=False)
    return torch.einsum("bthm,bshm->ts", phi_q, phi_k)


@torch.no_grad()
def test_the_estimate_is_unbiased_and_its_error_falls_as_the_root_of_the_features():
    q, k = heads(1, 5, 1, K, seed=0, scale=0.5), heads(1, 7, 1, K, seed=1, scale=0.5)
    exact = scores(q, k)[0, 0].exp()
    few, many = (estimates(q, k, features=m, draws=400) for m in (16, 144))
    for found in (few, many):
        error = (found.mean(0) - exact).abs()
        assert (error < 5 * found.std(0) / 400**0.5).all()  # 35 numbers, five standard errors
    # The root of 9 is 3; each deviation of 400 draws is known to about 1/sqrt(800), heavy tails aside.
    assert 2.5 < (few.std(0) / many.std(0)).median() < 3.5


def test_directions_are_orthogonal_with_the_lengths_of_gaussian_vectors():
    directions = drawn(0, 20).directions
    for block in directions.split(K):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)
    lengths = torch.cat([drawn(seed, 64).directions.square().sum(1) for seed in range(50)])
    assert abs(lengths.mean() - K) < 5 * (2 * K / 3200) ** 0.5  # chi squared: mean K, variance 2 K


def test_projections_are_drawn_as_weights_are_and_saved():
    assert torch.equal(drawn(3).directions, drawn(3).directions)
    assert not torch.equal(drawn(3).directions, drawn(4).directions)
    layer = build_attention("performer", hidden_size=16, num_heads=2)
    assert layer.state_dict()["features.directions"].shape == (128, 8)
    assert "features.directions" not in dict(layer.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("visible", ["all", "causal"])
def test_it_is_softmax_with_estimated_weights(visible):
    layer = build_attention("performer", hidden_size=16, num_heads=2, num_features=32).double()
    x = heads(2, 12, 16, seed=2)
    q, k, v = (f(x).unflatten(-1, (2, 8)) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    phi_q, phi_k = (layer.features.of_keys(t, None, relative=False) for t in (q, k))
    weights = torch.einsum("bthm,bshm->bhts", phi_q, phi_k)
    if visible == "causal":
        weights = weights.tril()
    y = weighted(weights / weights.sum(-1, keepdim=True), v)
    close(layer(x, visible=visible)[0], layer.o_proj(y.flatten(-2)))


@torch.no_grad()
def test_more_features_come_nearer_to_softmax():
    q, k, v = (heads(1, 30, 2, K, seed=seed, scale=0.5) for seed in (3, 4, 5))
    exact, errors = softmax(q, k, v), []
    for count in (100, 10_000):
        features = drawn(1, count)
        phi_q, phi_k = features.of_queries(q), features.of_keys(k, None, relative=True)
        errors.append((linear_attention(phi_q, phi_k, v, eps=1e-30).output - exact).norm() / exact.norm())
    assert errors[1] < 0.05 and 4 < errors[0] / errors[1] < 25  # the root of 100 is 10


@torch.no_grad()
def test_pieces_with_a_state_equal_the_whole():
    layer, x = build_attention("performer", hidden_size=16, num_heads=2).double(), heads(2, 20, 16, seed=6)
    whole, _ = layer(x, visible="causal")
    state, parts = None, []
    for piece in x.split([1, 7, 12], dim=1):
        y, state = layer(piece, visible="causal", state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), whole)


def test_large_keys_and_queries_stay_finite():
    layer = build_attention("performer", hidden_size=16, num_heads=2)
    x = (1000 * torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(7))).requires_grad_()
    y, _ = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and grad.isfinite().all()


@torch.no_grad()
def test_equals_the_oracle_package_without_its_constant():
    with warnings.catch_warnings():  # it imports distutils
        warnings.simplefilter("ignore", DeprecationWarning)
        oracle = importlib.import_module("performer_pytorch.performer_pytorch")
    layer, x = build_attention("performer", hidden_size=16, num_heads=2).double(), heads(2, 12, 16, seed=8)
    q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    directions = layer.features.directions
    phi_q = oracle.softmax_kernel(q, projection_matrix=directions, is_query=True, eps=0)
    phi_k = oracle.softmax_kernel(k, projection_matrix=directions, is_query=False, eps=0)
    y = oracle.linear_attention(phi_q, phi_k, v).transpose(1, 2)
    close(layer(x)[0], layer.o_proj(y.flatten(-2)))
