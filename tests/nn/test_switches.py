"""Switches of the attention layer: what each computes, what it costs, and what it is refused with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from leapformer.nn import KINDS, AttentionLayer, build_attention
from tests.nn.oracles import close, heads, softmax

# The mechanisms that take rotary positions, with what else they then need.
ROTARY = {"softmax": {}}
D, H = 16, 4
SIZES = {"hidden_size": D, "num_heads": H, "max_positions": 32, "num_features": 8}


def made(kind: str, *, seed: int = 0, **fields) -> AttentionLayer:
    torch.manual_seed(seed)
    return build_attention(kind, **SIZES, **fields).double().eval()


def parameters(layer: AttentionLayer) -> int:
    return sum(p.numel() for p in layer.parameters())


# ---- the output gate


@torch.no_grad()
@pytest.mark.parametrize(("gate", "activation"), [("silu", F.silu), ("sigmoid", torch.sigmoid)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mechanism_takes_an_output_gate(kind, gate, activation):
    plain, gated, x = made(kind), made(kind, output_gate=gate), heads(2, 9, D, seed=1)
    assert parameters(gated) == parameters(plain) + D * D
    missing = gated.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["gate_proj.weight"] and not missing.unexpected_keys
    plain.o_proj = torch.nn.Identity()
    close(gated(x)[0], gated.o_proj(plain(x)[0] * activation(x @ gated.gate_proj.weight.T)))


@torch.no_grad()
def test_the_output_gate_stands_behind_the_output_norm_and_sees_what_the_convolution_gives():
    layer, x = made("leap", variant="gated", output_gate="silu"), heads(1, 7, D, seed=2)
    seen = {}
    layer.output_norm.register_forward_hook(lambda module, inputs, output: seen.update(y=output))
    y, _ = layer(x, visible="causal")
    convolved, _ = layer.conv(x)
    close(y, layer.o_proj(seen["y"].flatten(-2) * F.silu(layer.gate_proj(convolved))))


def test_an_unknown_output_gate_is_refused():
    with pytest.raises(ValueError, match=r"output_gate: expected one of \['sigmoid', 'silu'\] or None, got 'tanh'"):
        made("softmax", output_gate="tanh")


# ---- rotary positions


def turned_by_hand(x: torch.Tensor, places: list[int], base: float) -> torch.Tensor:
    """arXiv 2104.09864, eq. 15: every pair (i, i + K / 2) as a complex number, times exp(i place rate)."""
    K = x.shape[-1]
    pairs = torch.complex(x[..., : K // 2], x[..., K // 2 :])
    rates = torch.tensor([base ** (-2 * i / K) for i in range(K // 2)], dtype=x.dtype)
    angles = torch.tensor(places, dtype=x.dtype)[:, None, None] * rates
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_softmax_with_rotary_positions_and_normed_queries_and_keys(qk_norm):
    layer, x = made("softmax", rotary=True, rotary_base=50.0, qk_norm=qk_norm, num_kv_heads=2), heads(2, 7, D, seed=3)
    assert parameters(layer) == parameters(made("softmax", num_kv_heads=2)) + (2 * D // H if qk_norm else 0)
    q, k, v = (f(x).unflatten(-1, (-1, D // H)) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    if qk_norm:
        layer.q_norm.weight.copy_(heads(D // H, seed=4))
        q, k = (a * (a.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for a in (q, k))
        q = q * layer.q_norm.weight
    q, k = (turned_by_hand(a, list(range(7)), 50.0) for a in (q, k))
    wanted = softmax(q, *(a.repeat_interleave(2, 2) for a in (k, v)), torch.ones(7, 7).tril().bool())
    close(layer(x, visible="causal")[0], layer.o_proj(wanted.flatten(-2)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_positions_are_relative(kind):
    """All places moved by a million change nothing, and other distances do."""
    layer, x, places = made(kind, **ROTARY[kind], rotary=True), heads(1, 9, D, seed=5), torch.arange(9)[None]
    y, _ = layer(x, visible="causal", position_ids=places)
    far, _ = layer(x, visible="causal", position_ids=places + 1_000_000)
    close(far, y, 1e-8)  # float64 has a place of a million to 1e-10
    assert not torch.allclose(layer(x, visible="causal", position_ids=2 * places)[0], y, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ROTARY)
def test_nothing_is_turned_over_a_source(kind):
    turning, plain = made(kind, **ROTARY[kind], rotary=True), made(kind, **ROTARY[kind])
    x, source = heads(2, 5, D, seed=6), heads(2, 7, D, seed=7)
    close(turning(x, source)[0], plain(x, source)[0])


def test_rotary_positions_need_pairs_and_a_base():
    with pytest.raises(ValueError, match=r"rotary: expected an even head_dim \(numbers are turned in pairs\), got 5"):
        made("softmax", rotary=True, head_dim=5)
    with pytest.raises(ValueError, match="rotary_base: expected at least 1, got 0.5"):
        made("softmax", rotary=True, rotary_base=0.5)
