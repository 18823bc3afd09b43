"""Linformer: identities as projections give softmax, and it is what its oracle package computes."""

import torch
from linformer import LinformerSelfAttention

from leapformer.nn import build_attention
from tests.nn.oracles import close, heads, softmax


def layer_of(features, positions, **arguments):
    arguments = {"hidden_size": 16, "num_heads": 2, "num_features": features, "max_positions": positions} | arguments
    return build_attention("linformer", **arguments).double()


@torch.no_grad()
def test_identities_give_softmax():
    layer = layer_of(20, 20)
    for projection in (layer.key_projection, layer.value_projection):
        projection.copy_(torch.eye(20))
    q, k, v = (heads(2, 20, 2, 8, seed=seed) for seed in range(3))
    close(layer.mix(q, k, v, None), softmax(q, k, v))


@torch.no_grad()
def test_equals_the_oracle_package():
    layer, oracle = layer_of(5, 20, bias=False), LinformerSelfAttention(16, 20, k=5, heads=2).double()
    oracle.to_q.weight.copy_(layer.q_proj.weight)
    oracle.to_k.weight.copy_(layer.k_proj.weight)
    oracle.to_v.weight.copy_(layer.v_proj.weight)
    oracle.to_out.weight.copy_(layer.o_proj.weight)
    oracle.to_out.bias.zero_()
    oracle.proj_k.copy_(layer.key_projection.T)
    oracle.proj_v.copy_(layer.value_projection.T)
    for tokens in (20, 13):
        x = heads(2, tokens, 16, seed=3)
        close(layer(x)[0], oracle(x))


def test_projections_start_with_variance_one_over_their_rows():
    layer = layer_of(64, 500)
    # 32,000 numbers know their variance to a relative sqrt(2 / 32,000); four of that.
    assert abs(64 * layer.key_projection.var() - 1) < 4 * (2 / 32_000) ** 0.5
    assert sum(p.numel() for p in (layer.key_projection, layer.value_projection)) == 2 * 64 * 500
