"""Every layer: step by step = whole, splits, padding, packing, no future, state handling."""

import pytest
import torch

from leapformer.nn import DecoderBlock, SoftmaxAttention, build_attention
from leapformer.ops import Staircase

LAYERS = {
    "leap": {"kind": "leap"},
    "leap per head": {"kind": "leap", "leap_per_head": True, "num_kv_heads": 2},
    "leap linear module": {"kind": "leap", "leap_hidden": 1},
    "leap binned": {"kind": "leap", "leap_bins": 5},
    "leap quadratic": {"kind": "leap", "reweighting": "quadratic"},
    "leap gated": {"kind": "leap", "variant": "gated"},
    "decay alone": {"kind": "leap", "decay": True},
    "grouped gated": {"kind": "leap", "variant": "gated", "num_kv_heads": 2},
    "cosformer": {"kind": "cosformer", "max_positions": 40},
    "cosformer gated": {"kind": "cosformer", "variant": "gated", "max_positions": 40},
    "linear": {"kind": "linear"},
    "linear elu": {"kind": "linear", "feature_map": "elu"},
    "softmax": {"kind": "softmax"},
    "softmax conv": {"kind": "softmax", "conv_width": 4},
    "softmax grouped": {"kind": "softmax", "num_kv_heads": 2},
    "softmax output gate": {"kind": "softmax", "output_gate": "sigmoid"},
    "softmax rotary": {"kind": "softmax", "rotary": True, "qk_norm": True, "num_kv_heads": 2},
    "linear rotary": {"kind": "linear", "variant": "gated", "rotary": True, "qk_norm": True, "num_kv_heads": 2},
    "leap rotary": {"kind": "leap", "output_norm": True, "rotary": True},
    "leap normed features": {"kind": "leap", "qk_norm": True},
    "cosformer delta": {"kind": "cosformer", "max_positions": 40, "update": "delta"},
    "leap delta gated": {"kind": "leap", "variant": "gated", "update": "delta", "num_kv_heads": 2, "rotary": True},
    "linear delta silu": {"kind": "linear", "feature_map": "silu", "update": "delta", "delta_range": 2},
    "running delta": {"kind": "leap", "proportion": "running", "clocks": 2, "variant": "gated", "update": "delta"},
    "leap channel decay": {"kind": "leap", "decay": True, "decay_per": "channel", "num_kv_heads": 2},
    "linear channel gated": {"kind": "linear", "variant": "gated", "decay_per": "channel", "rotary": True},
    "leap channel delta": {"kind": "leap", "variant": "gated", "decay_per": "channel", "update": "delta"},
    "leap prior": {"kind": "leap", "proportion": "prior", "num_kv_heads": 2, "leap_bins": 9},
    "leap prior gated": {"kind": "leap", "proportion": "prior", "variant": "gated", "update": "delta"},
    "leap output gate": {"kind": "leap", "variant": "gated", "output_gate": "silu"},
}
B, T, D = 3, 21, 16


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return build_attention(hidden_size=D, num_heads=4, **LAYERS[request.param]).double().eval()


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [list(range(1, T)), [1], [8, 9, 20]])
def test_pieces_with_state_equal_the_whole(layer, x, cuts):
    whole, _ = layer(x, visible="causal")
    state, parts = None, []
    for start, end in zip([0, *cuts], [*cuts, T], strict=True):
        y, state = layer(x[:, start:end], visible="causal", state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), whole)
    assert state.length.tolist() == [T] * B


@torch.no_grad()
def test_left_and_right_padding_change_nothing(layer, x):
    n = 13
    alone, _ = layer(x[:1, :n], visible="causal")
    real = torch.arange(T) < n
    right = torch.where(real[:, None], x[:1], 7.0)
    padded, _ = layer(right, visible="causal", key_mask=real[None])
    close(padded[:, :n], alone)

    left, mask = right.flip(1), real.flip(0)[None]
    left[:, T - n :] = x[:1, :n]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    padded, state = layer(left, visible="causal", key_mask=mask, position_ids=positions, return_state=True)
    close(padded[:, T - n :], alone)
    follow, _ = layer(
        x[:1, n : n + 1], visible="causal", state=state, position_ids=torch.tensor([[n]]), return_state=True
    )
    close(follow, layer(x[:1, : n + 1], visible="causal")[0][:, -1:])


@torch.no_grad()
def test_goes_on_after_right_padding(layer, x):
    n = 13
    _, state = layer(x[:1], visible="causal", key_mask=(torch.arange(T) < n)[None], return_state=True)
    assert state.length.tolist() == [n]
    # A row of nothing but padding leaves the state as it was.
    _, state = layer(x[1:2, :5], visible="causal", key_mask=torch.zeros(1, 5, dtype=torch.bool), state=state,
                     position_ids=torch.full((1, 5), n), return_state=True)  # fmt: skip
    here = torch.tensor([[n]])
    y, _ = layer(x[:1, n : n + 1], visible="causal", state=state, position_ids=here, return_state=True)
    close(y, layer(x[:1, : n + 1], visible="causal")[0][:, -1:])


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_go_on_from_their_states(layer, x, masked):
    bounds, more = torch.tensor([0, 2, 14], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    if isinstance(layer, SoftmaxAttention):
        with pytest.raises(ValueError, match="no state with cu_seqlens"):
            layer(x[:1, :14], visible="causal", cu_seqlens=bounds, return_state=True)
        return
    mask = torch.arange(14)[None] < (11 if masked else 14)  # the second sequence ends in padding
    _, state = layer(x[:1, :14], visible="causal", cu_seqlens=bounds, key_mask=mask, return_state=True)
    n = int(mask.sum())
    assert state.length.tolist() == [2, n - 2]
    y, state = layer(x[1:2, :3], visible="causal", cu_seqlens=more, state=state, return_state=True)
    first, second = torch.cat([x[:1, :2], x[1:2, :1]], 1), torch.cat([x[:1, 2:n], x[1:2, 1:3]], 1)
    close(y[:, :1], layer(first, visible="causal")[0][:, -1:])
    close(y[:, 1:], layer(second, visible="causal")[0][:, -2:])
    assert state.length.tolist() == [3, n]


@torch.no_grad()
def test_restore_over_a_mask_that_came_later(layer, x):
    _, state = layer(x[:, :5], visible="causal", return_state=True)
    kept = state.snapshot()
    wanted, _ = layer(x[:, 5:6], visible="causal", state=state.snapshot(), return_state=True)
    mask = torch.tensor([[False], [True], [True]])
    _, state = layer(x[:, 6:7], visible="causal", key_mask=mask, state=state, return_state=True)
    state.restore(kept)
    close(layer(x[:, 5:6], visible="causal", state=state, return_state=True)[0], wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["leap", "softmax"])
def test_packed_cross_attention_with_a_staircase_each(kind, x):
    torch.manual_seed(0)
    layer = build_attention(kind, hidden_size=D, num_heads=4).double()
    context = torch.randn(1, 40, D, dtype=torch.float64)
    q_bounds, k_bounds = (torch.tensor(b, dtype=torch.int32) for b in ([0, 9, T], [0, 15, 40]))
    stairs = Staircase(torch.tensor([2, 5]), 1)
    y, _ = layer(x[:1], context, visible=stairs, cu_seqlens=q_bounds, cu_seqlens_k=k_bounds)
    close(y[:, :9], layer(x[:1, :9], context[:, :15], visible=Staircase(2, 1))[0])
    close(y[:, 9:], layer(x[:1, 9:], context[:, 15:], visible=Staircase(5, 1))[0])


def test_no_gradient_reaches_the_future(layer, x):
    x.requires_grad_()
    y, _ = layer(x, visible="causal")
    (grad,) = torch.autograd.grad(y[:, 9].square().sum(), x)
    assert torch.count_nonzero(grad[:, 10:]) == 0
    assert torch.count_nonzero(grad[:, 9]) > 0


@torch.no_grad()
def test_packed_sequences_equal_separate_ones(layer, x):
    bounds = [0, 5, 6, 21]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed, _ = layer(x[:1], visible="causal", cu_seqlens=cu_seqlens)
    separate = [layer(x[:1, a:b], visible="causal")[0] for a, b in zip(bounds, bounds[1:], strict=False)]
    close(packed, torch.cat(separate, 1))


@torch.no_grad()
def test_reorder_snapshot_and_restore(layer, x):
    _, state = layer(x[:, :5], visible="causal", return_state=True)
    kept = state.snapshot()
    index = torch.tensor([2, 0, 0])
    reordered = state.reorder(index)
    expected, _ = layer(x[:, :6][index], visible="causal")
    got, _ = layer(x[:, 5:6][index], visible="causal", state=reordered, return_state=True)
    close(got, expected[:, -1:])
    first, moved = layer(x[:, 5:6], visible="causal", state=state, return_state=True)
    moved.restore(kept)
    again, _ = layer(x[:, 5:6], visible="causal", state=moved, return_state=True)
    close(first, again)
    assert kept.nbytes > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["leap", "softmax", "linear"])
def test_cross_attention_sees_what_it_may(kind, x):
    torch.manual_seed(0)
    layer = build_attention(kind, hidden_size=D, num_heads=4).double()
    context = torch.randn(B, 30, D, dtype=torch.float64)
    wait = Staircase.wait_k(2, 3)
    y, _ = layer(x, context, visible=wait)
    for i in (0, 4, 20):
        seen = min((2 + i) * 3, 30)
        close(layer(x[:, i : i + 1], context[:, :seen])[0], y[:, i : i + 1])
    counts = wait.counts(T, 30)
    close(layer(x, context, visible=counts)[0], y)


@torch.no_grad()
def test_linear_state_is_updated_in_place(x):
    layer = build_attention("leap", hidden_size=D, num_heads=4, variant="gated").double()
    _, state = layer(x[:, :5], visible="causal", return_state=True)
    address, size = state.linear.kv.data_ptr(), state.nbytes
    _, after = layer(x[:, 5:6], visible="causal", state=state, return_state=True)
    assert after is state and state.linear.kv.data_ptr() == address and state.nbytes == size


def test_a_padded_sample_of_nans_is_harmless(layer, x):
    x = x.clone()
    x[0] = torch.nan
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0] = False
    x.requires_grad_()
    # The projections of the padded row are NaN; nothing of it may reach another row or a weight.
    y, _ = layer(x.masked_fill(~mask[..., None], 0), visible="causal", key_mask=mask)
    assert y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), list(layer.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


def test_cosformer_refuses_what_is_too_long(x):
    layer = build_attention("cosformer", hidden_size=D, num_heads=4, max_positions=20).double()
    with pytest.raises(ValueError, match="at most max_positions=20 tokens, got 21"):
        layer(x, visible="causal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "leaf"}, "got 'leaf'"),
        ({"kind": "leap", "variant": "fast"}, "got 'fast'"),
        ({"kind": "leap", "feature_map": "exp"}, "got 'exp'"),
        ({"kind": "leap", "reweighting": "sine"}, "got 'sine'"),
        ({"kind": "leap", "num_kv_heads": 3}, "num_kv_heads=3"),
        ({"kind": "leap", "leap_bins": 1}, "bins >= 2"),
        ({"kind": "leap", "leap_start": "far"}, "got 'far'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_attention(hidden_size=D, num_heads=4, **arguments)


COMPILED = {
    "leap": {"kind": "leap", "variant": "gated"},
    "cosformer": {"kind": "cosformer"},
    "softmax": {"kind": "softmax"},
    "softmax rotary": LAYERS["softmax rotary"],
    "delta": LAYERS["leap delta gated"],
    "channel delta": LAYERS["leap channel delta"],
}


@pytest.mark.parametrize("fields", COMPILED.values(), ids=COMPILED.keys())
def test_compiles_whole_and_trains_under_checkpointing(fields, x):
    torch.manual_seed(0)
    layer = build_attention(hidden_size=D, num_heads=4, **fields)
    block = DecoderBlock(layer, hidden_size=D, intermediate_size=32).double()
    expected, _ = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, _ = compiled(x)
    close(got, expected)
    names, weights = zip(*block.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected.square().sum(), weights)
    y = torch.utils.checkpoint.checkpoint(lambda a: block(a)[0], x, use_reentrant=False)
    for name, a, b in zip(names, torch.autograd.grad(y.square().sum(), weights), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=name)
    for a, b in zip(torch.autograd.grad(got.square().sum(), weights), wanted, strict=True):
        close(a, b)


def test_block_with_cross_attention_needs_a_context(x):
    parts = [build_attention("leap", hidden_size=D, num_heads=4) for _ in range(2)]
    block = DecoderBlock(parts[0], cross_attention=parts[1], hidden_size=D, intermediate_size=32).double()
    assert block(x, torch.randn(B, 9, D, dtype=torch.float64))[0].shape == x.shape
    with pytest.raises(ValueError, match="expected a context"):
        block(x)


SWITCHES = {"rotary": True, "qk_norm": True, "output_gate": "silu"}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, SWITCHES, {"update": "delta"}, {"decay_per": "channel"}], ids=str)
@pytest.mark.parametrize("kind", ["leap", "softmax"])
def test_autocast_gives_its_dtype_and_the_same_step_by_step(kind, fields, x):
    torch.manual_seed(0)
    layer, x = build_attention(kind, hidden_size=D, num_heads=4, variant="gated", conv_width=4, **fields), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = layer(x, visible="causal")
        state, parts = None, []
        for t in range(T):
            y, state = layer(x[:, t : t + 1], visible="causal", state=state, return_state=True)
            parts.append(y)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(whole.float(), layer(x, visible="causal")[0], atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("fields", [{}, {"rotary": True, "update": "delta"}], ids=str)
@pytest.mark.parametrize("kind", ["leap", "softmax"])
def test_packed_sequences_compile_whole(kind, fields, x):
    torch.manual_seed(0)
    layer = build_attention(kind, hidden_size=D, num_heads=4, variant="gated", conv_width=4, **fields).double()
    cu_seqlens = torch.tensor([0, 5, T], dtype=torch.int32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(
        compiled(x[:1], visible="causal", cu_seqlens=cu_seqlens)[0],
        layer(x[:1], visible="causal", cu_seqlens=cu_seqlens)[0],
    )
