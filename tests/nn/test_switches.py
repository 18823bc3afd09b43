"""Switches of the attention layer: what each computes, what it costs, and what it is refused with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from leapformer.nn import KINDS, AttentionLayer, LeapModule, PriorProportion, build_attention
from tests.nn.oracles import close, heads, softmax

# The mechanisms that take rotary positions, with what else they then need.
ROTARY = {"softmax": {}, **{kind: {"output_norm": True} for kind in ("leap", "cosformer", "linear", "linear-elu")}}
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
@pytest.mark.parametrize("kind", [kind for kind in ROTARY if kind != "cosformer"])  # whose own proportion has a maximum
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


@torch.no_grad()
def test_linear_attention_turns_and_norms_features():
    layer, x = made("leap", rotary=True, qk_norm=True, output_norm=True, num_kv_heads=2), heads(2, 7, D, seed=3)
    q, k, v = (f(x).unflatten(-1, (-1, D // H)) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = (a.repeat_interleave(H // a.shape[2], 2) for a in (q.relu(), k.relu(), v))
    p_q, p_k = layer.q_proportion(q), layer.k_proportion(k)  # of features that are neither normed nor turned
    sigma = torch.cos(torch.pi / 2 * (p_q.permute(0, 2, 1)[..., None] - p_k.permute(0, 2, 1)[:, :, None]))
    q, k = (turned_by_hand(a * (a.square().sum(-1, keepdim=True) + 1e-6).rsqrt(), list(range(7)), 1e4) for a in (q, k))
    weights = torch.einsum("bthk,bshk->bhts", q, k) * sigma * torch.ones(7, 7).tril()
    wanted = layer.output_norm(torch.einsum("bhts,bshk->bthk", weights, v))
    close(layer(x, visible="causal")[0], layer.o_proj(wanted.flatten(-2)))


@torch.no_grad()
def test_a_norm_of_features_alone_leaves_queries_to_the_normaliser():
    """Divided by the sum of weights, the length of a query cancels: keys alone change."""
    layer, x = made("linear", qk_norm=True), heads(2, 7, D, seed=3)
    y = layer(x)[0]
    layer.q_proj.weight.mul_(3.0), layer.q_proj.bias.mul_(3.0)
    close(layer(x)[0], y)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("leap", {"rotary": True}, r"rotary: expected output_norm \(products of features may be negative\), got none"),
        ("linear", {"feature_map": "silu"}, "feature_map='silu': expected output_norm .*, got none"),
        (
            "leap",
            {"update": "delta", "cross": True},
            r"expected self-attention \(it is of a past\), got cross-att",
        ),
        ("leap", {"update": "delta", "delta_range": 3}, "delta_range: expected 1 or 2, got 3"),
        ("leap", {"decay_per": "token"}, "decay_per: expected 'head' or 'channel', got 'token'"),
        ("leap", {"update": "add"}, "update: expected 'sum' or 'delta', got 'add'"),
    ],
)
def test_switches_that_do_not_go_together_are_refused_at_once(kind, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        made(kind, **fields)
    assert "\n" not in str(error.value)


# ---- the delta rule


def by_delta(layer: AttentionLayer, x: torch.Tensor) -> torch.Tensor:
    """Token by token, of a layer with learned proportions and a decay."""
    features = [layer.feature_map(f(x).unflatten(-1, (-1, D // H))) for f in (layer.q_proj, layer.k_proj)]
    v, beta = layer.v_proj(x).unflatten(-1, (-1, D // H)), layer.delta.reach * torch.sigmoid(x @ layer.delta.weight.T)
    decay, state, found = layer.decay(x).exp(), x.new_zeros(len(x), H, 2 * D // H, D // H), []
    wide = []
    for a, proportion in zip(features, (layer.q_proportion, layer.k_proportion), strict=True):
        angle = torch.pi / 2 * proportion(a)
        a = a * (a.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        wide.append((torch.stack([angle.cos(), angle.sin()], -1)[..., None] * a[..., None, :]).flatten(-2))
    q, k = wide
    for t in range(x.shape[1]):
        state = state * decay[:, t, :, None, None]
        new = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + beta[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        found.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    y = torch.stack(found, 1)
    return layer.o_proj((y if layer.output_norm is None else layer.output_norm(y)).flatten(-2))


@pytest.mark.parametrize("fields", [{"output_norm": True}, {"feature_map": "silu", "delta_range": 2}], ids=str)
def test_a_layer_with_the_delta_rule(fields):
    layer, x = made("leap", update="delta", decay=True, **fields), heads(2, 70, D, seed=8)
    assert parameters(layer) == parameters(made("leap", decay=True, output_norm="output_norm" in fields)) + H * D
    y, state = layer(x, visible="causal", return_state=True)
    wanted = by_delta(layer, x)
    close(y, wanted, 1e-9)
    weights = list(layer.parameters())
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), weights) for out in (y, wanted)), strict=True):
        close(a, b, 1e-8)
    assert state.linear.kv.shape == (2, H, 2, D // H, D // H) and not state.linear.z.any()


def test_the_delta_rule_is_of_a_past():
    layer, x = made("leap", update="delta"), heads(1, 3, D, seed=9)
    assert not layer.capabilities.cross
    for context, found in ((None, "visible='all'"), (x, "a context")):
        with pytest.raises(ValueError, match=f"update='delta': expected causal self-attention .*, got {found}"):
            layer(x, context)
    keys = heads(1, 2, H, D // H, seed=10)
    with pytest.raises(ValueError, match="update='delta': expected keys of tokens .*, got keys alone"):
        layer.prefix_state(keys, keys)


# ---- decay per channel


def by_channels(layer: AttentionLayer, x: torch.Tensor) -> torch.Tensor:
    """Every weight written out, of a layer with learned proportions and the normaliser by sum."""
    q, k = (layer.feature_map(f(x).unflatten(-1, (-1, D // H))) for f in (layer.q_proj, layer.k_proj))
    v, decay = layer.v_proj(x).unflatten(-1, (-1, D // H)), layer.decay
    p_q, p_k = (torch.pi / 2 * p(a) for p, a in ((layer.q_proportion, q), (layer.k_proportion, k)))
    score = (x @ decay.down.T @ decay.weight.T).unflatten(-1, (H, -1)) + decay.bias
    sums = torch.nn.functional.logsigmoid(score).cumsum(1)
    kept = (sums[:, :, None] - sums[:, None]).exp() * torch.ones(x.shape[1], x.shape[1]).tril()[..., None, None]
    weights = torch.einsum("bthk,bshk,btshk->btsh", q, k, kept) * torch.cos(p_q[:, :, None] - p_k[:, None])
    y = torch.einsum("btsh,bshk->bthk", weights / weights.sum(2, keepdim=True).clamp(min=1e-6), v)
    return layer.o_proj(y.flatten(-2))


def test_a_layer_with_a_decay_per_channel():
    layer, x = made("leap", decay=True, decay_per="channel"), heads(2, 40, D, seed=8)
    assert parameters(layer) == parameters(made("leap")) + 16 * (D + D) + D
    with torch.no_grad():
        layer.decay.weight.normal_(std=1.0)  # decays that differ
    y, state = layer(x, visible="causal", return_state=True)
    wanted = by_channels(layer, x)
    close(y, wanted, 1e-9)
    weights = list(layer.parameters())
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), weights) for out in (y, wanted)), strict=True):
        close(a, b, 1e-8)
    assert state.linear.kv.shape == (2, H, 2, D // H, D // H) and state.linear.log_decay is None


def test_decays_per_channel_start_in_equal_ratios_of_time():
    decay = made("linear", decay=True, decay_per="channel", decay_scales=[2.0, 16.0]).decay
    kept = torch.nn.functional.logsigmoid(decay.bias)
    torch.testing.assert_close(
        -1 / kept, torch.tensor([2.0, 4.0, 8.0, 16.0], dtype=kept.dtype).expand(H, 4), rtol=1e-5, atol=0
    )


def test_a_decay_per_channel_is_of_a_past():
    layer, x = made("linear", decay=True, decay_per="channel"), heads(1, 3, D, seed=9)
    for context, found in ((None, "visible='all'"), (x, "a context")):
        with pytest.raises(ValueError, match=f"decay_per='channel': expected causal self-attention .*, got {found}"):
            layer(x, context)


# ---- a prior for the place


def test_a_prior_starts_as_a_soft_cosformer_and_learns_where_it_bends():
    layer = made("leap", proportion="prior", num_kv_heads=2)
    assert parameters(layer) == parameters(made("leap", num_kv_heads=2)) + 2 * (H + 2)
    prior, places = layer.k_proportion, torch.tensor([[0, 9, 63, 10_000]])
    x = heads(1, 4, 2, D // H, seed=11).relu()
    with torch.no_grad():
        prior.w2.zero_(), prior.b2.zero_()
        counts = (places[0] + 1).double()
        close(prior(x, places)[0, :, 0], counts / (counts + 64), 1e-7)  # log tau began in float32
        prior.slope.copy_(torch.tensor([2.0, 0.0])), prior.log_scale.copy_(torch.tensor([10.0, 7.0]).double().log())
        y = prior(x, places)[0]
    close(y[:, 0], (1 + (10 / counts) ** 2).reciprocal())
    close(y[:, 1], torch.full((4,), 0.5, dtype=y.dtype))


def test_a_prior_is_what_the_layer_weighs_by():
    layer, x = made("leap", proportion="prior"), heads(2, 7, D, seed=12)
    q, k = (f(x).unflatten(-1, (-1, D // H)).relu() for f in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x).unflatten(-1, (-1, D // H))
    p_q, p_k = (
        torch.pi / 2 * torch.sigmoid(torch.logit(LeapModule.forward(p, a)) + prior_of(p, 7))
        for p, a in ((layer.q_proportion, q), (layer.k_proportion, k))
    )
    weights = torch.einsum("bthk,bshk->btsh", q, k) * torch.cos(p_q[:, :, None] - p_k[:, None])
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
    wanted = layer.o_proj(torch.einsum("btsh,bshk->bthk", weights, v).flatten(-2))
    y, _ = layer(x)
    close(y, wanted)
    for a, b in zip(
        *(torch.autograd.grad(out.sin().sum(), list(layer.parameters())) for out in (y, wanted)), strict=True
    ):
        close(a, b, 1e-8)


def prior_of(module: PriorProportion, T: int) -> torch.Tensor:
    """a log((t + 1) / tau) of T places, [T, H]."""
    return module.slope * (torch.arange(1, T + 1).double()[:, None] / module.log_scale.exp()).log()


@torch.no_grad()
def test_a_prior_over_a_source_counts_its_real_states():
    layer, x, source = made("leap", proportion="prior"), heads(1, 3, D, seed=13), heads(1, 6, D, seed=14)
    mask = torch.tensor([[False, True, True, False, True, True]])
    close(layer(x, source, key_mask=mask)[0], layer(x, source[:, mask[0]])[0])
