"""Padding anywhere and packing change nothing: layers, the convolution, their states and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from leapformer.nn import DecoderBlock, LayerState, ShortConvolution, build_attention
from leapformer.nn.packing import token_positions
from tests.nn.oracles import close

D = 8
LAYERS = {
    "leap": {"kind": "leap"},
    "leap-gated": {"kind": "leap", "variant": "gated"},
    "running": {"kind": "leap", "variant": "gated", "proportion": "running"},
    "running-grouped": {
        "kind": "leap",
        "variant": "gated",
        "proportion": "running",
        "num_kv_heads": 1,
        "clocks": 2,
        "leap_places": True,
    },
    "leap-conv2": {"kind": "leap", "conv_width": 2},
    "cosformer": {"kind": "cosformer", "max_positions": 40},
    "cosformer-gated": {"kind": "cosformer", "max_positions": 40, "variant": "gated", "num_kv_heads": 1},
    "linear-conv6": {"kind": "linear", "conv_width": 6, "feature_map": "elu"},
    "performer-conv": {"kind": "performer", "num_features": 8, "conv_width": 3},
    "softmax": {"kind": "softmax"},
    "softmax-conv": {"kind": "softmax", "conv_width": 4},
    "softmax-rotary": {"kind": "softmax", "conv_width": 4, "rotary": True, "qk_norm": True},
    "leap-rotary": {"kind": "leap", "output_norm": True, "rotary": True, "qk_norm": True},
    "leap-delta": {"kind": "leap", "variant": "gated", "update": "delta", "num_kv_heads": 1, "rotary": True},
    "linear-delta": {"kind": "linear", "feature_map": "silu", "update": "delta", "delta_range": 2},
    "leap-channel": {"kind": "leap", "variant": "gated", "decay_per": "channel", "num_kv_heads": 1},
    "leap-prior": {"kind": "leap", "proportion": "prior", "num_kv_heads": 1},
    "softmax-output-gate": {"kind": "softmax", "conv_width": 4, "output_gate": "silu"},
}
layers = pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS.keys())
# Without those that are of a past alone, and have no place for keys that no token was projected to.
SUMS = {name: fields for name, fields in LAYERS.items() if not {"update", "decay_per"} & fields.keys()}
sums = pytest.mark.parametrize("fields", SUMS.values(), ids=SUMS.keys())


def made(fields: dict) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_attention(hidden_size=D, num_heads=2, **fields).double().eval()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask_of(text: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in text.split()])


def spread(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows of real tokens at the places of a mask [B, T]; padding is something large."""
    out = torch.full((*mask.shape, D), 7.0, dtype=x.dtype)
    return out.masked_scatter(mask[..., None], x)


MASKS = ["..xxxxx", "xxxxx..", "x.xx..xxx", ".x.x.x.xx", "....xxxxx.xx."]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", [2, 4, 7])
def test_the_convolution_skips_padding(mask, width):
    mask = mask_of(mask)
    conv, real = ShortConvolution(D, width=width).double(), int(mask.sum())
    x, past = numbers(1, real, D).requires_grad_(), numbers(1, width - 1, D, seed=1).requires_grad_()
    y, tail = conv(x, past=past)
    expected = torch.autograd.grad((y.square().sum() + tail.sin().sum()), [x, past, conv.weight])
    padded, tail_padded = conv(spread(x, mask), key_mask=mask, past=past)
    close(padded[mask], y[0])
    close(tail_padded, tail)
    assert padded.isfinite().all()
    loss = padded[mask].square().sum() + tail_padded.sin().sum()
    for found, wanted in zip(torch.autograd.grad(loss, [x, past, conv.weight]), expected, strict=True):
        close(found, wanted)


def test_the_convolution_goes_on_over_chunks_that_are_padded_anywhere():
    conv, x = ShortConvolution(D, width=4).double(), numbers(1, 12, D)
    expected, last = conv(x)
    past, found, start = None, [], 0
    for text in ("...", ".x", "xx.", "..x.x.x", "x", ".", "x.xx.xx"):
        mask = mask_of(text)
        end = start + int(mask.sum())
        y, past = conv(spread(x[:, start:end], mask), key_mask=mask, past=past)
        found.append(y[mask])
        start = end
    close(torch.cat(found), expected[0])
    close(past, last)


@pytest.mark.parametrize("visible", ["causal", "all"])
@layers
def test_padding_anywhere_changes_nothing(fields, visible):
    if visible == "all" and fields not in SUMS.values():
        with pytest.raises(ValueError, match="expected causal self-attention .*, got visible='all'"):
            made(fields)(numbers(1, 3, D))
        return
    layer, mask = made(fields), mask_of("..xxxxx.. x.x.xx..x .xxxxxx.x")
    rows = [numbers(1, int(row.sum()), D, seed=n) for n, row in enumerate(mask)]
    padded = torch.cat([spread(x, row[None]) for x, row in zip(rows, mask, strict=True)]).requires_grad_()
    y, _ = layer(padded, visible=visible, key_mask=mask)
    (gradient,) = torch.autograd.grad(y[mask].square().sum(), padded)
    for n, (x, row) in enumerate(zip(rows, mask, strict=True)):
        x = x.requires_grad_()
        alone, _ = layer(x, visible=visible)
        close(y[n][row], alone[0])
        close(gradient[n][row], torch.autograd.grad(alone.square().sum(), x)[0][0])
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("grad", [True, False])
@layers
def test_a_later_turn_may_be_padded_anywhere(fields, grad):
    layer, x = made(fields), numbers(2, 12, D)
    expected, _ = layer(x, visible="causal")
    found, state = [], None
    with torch.set_grad_enabled(grad):
        for start, end, text in ((0, 5, "xxxxx xxxxx"), (5, 8, "..xxx x.x.x"), (8, 9, "x x"), (9, 12, "xx.x .xxx")):
            mask = mask_of(text)
            piece = torch.cat([spread(row[None], real[None]) for row, real in zip(x[:, start:end], mask, strict=True)])
            y, state = layer(piece, visible="causal", key_mask=mask, state=state, return_state=True)
            found.append(y[mask].view(2, end - start, D))
    close(torch.cat(found, 1), expected)
    assert isinstance(state, LayerState) and state.length.tolist() == [12, 12]


@layers
def test_packed_sequences_with_padding_are_as_if_alone(fields):
    layer = made(fields)
    texts = ["..xxx", "x.x.xx.", "xx", "...x", "xxxxxx"]
    mask = mask_of("".join(texts))
    bounds = torch.tensor([0, *itertools.accumulate(map(len, texts))], dtype=torch.int32)
    rows = [numbers(1, text.count("x"), D, seed=n).requires_grad_() for n, text in enumerate(texts)]
    packed = spread(torch.cat(rows, 1), mask)
    y, state = layer(
        packed, visible="causal", key_mask=mask, cu_seqlens=bounds, return_state=fields["kind"] != "softmax"
    )
    alone = torch.cat([layer(x, visible="causal")[0] for x in rows], 1)
    close(y[mask], alone[0])
    for found, expected in zip(
        torch.autograd.grad(y[mask].square().sum(), rows, retain_graph=True),
        torch.autograd.grad(alone.square().sum(), rows),
        strict=True,
    ):
        close(found, expected)
    if state is not None:
        assert state.length.tolist() == [text.count("x") for text in texts]
        more = numbers(1, 5, D, seed=9)
        on, _ = layer(more, visible="causal", cu_seqlens=torch.arange(6, dtype=torch.int32), state=state.snapshot())
        for n, x in enumerate(rows):
            close(on[:, n : n + 1], layer(torch.cat([x, more[:, n : n + 1]], 1), visible="causal")[0][:, -1:])


def test_random_paddings_and_packings():
    generator = torch.Generator().manual_seed(5)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for case in range(60):
        fields = list(LAYERS.values())[draw(len(LAYERS))]
        layer = made(fields | ({} if draw(2) else {"conv_width": 2 + draw(5)}))
        counts = [draw(7) for _ in range(1 + draw(4))]
        masks = [torch.randperm(n + draw(5), generator=generator) < n for n in counts]
        masks = [mask if len(mask) else torch.tensor([False]) for mask in masks]
        bounds = torch.tensor([0, *itertools.accumulate(map(len, masks))])
        mask = torch.cat(masks)[None]
        rows = [numbers(1, n, D, seed=case * 10 + i) for i, n in enumerate(counts)]
        y, _ = layer(spread(torch.cat(rows, 1), mask), visible="causal", key_mask=mask, cu_seqlens=bounds)
        alone = [layer(x, visible="causal")[0] for x in rows if x.shape[1]]
        close(y[mask], torch.cat(alone, 1)[0] if alone else y[mask])


def test_positions_count_real_tokens_in_rows_and_in_packed_sequences():
    cpu = torch.device("cpu")
    assert token_positions(4, cpu).tolist() == [[0, 1, 2, 3]]
    assert token_positions(4, cpu, key_mask=mask_of(".xx. xxxx")).tolist() == [[0, 0, 1, 1], [0, 1, 2, 3]]
    packed = token_positions(7, cpu, key_mask=mask_of(".xx.x.x"), cu_seqlens=torch.tensor([0, 2, 7]))
    assert packed.tolist() == [[0, 0, 0, 0, 1, 1, 2]]
    on = token_positions(4, cpu, cu_seqlens=torch.tensor([0, 3, 4]), first=torch.tensor([10, 20]))
    assert on.tolist() == [[10, 11, 12, 20]]


@pytest.mark.parametrize(
    ("B", "bounds", "message"),
    [
        (
            2,
            torch.tensor([0, 2, 5]),
            r"with cu_seqlens: expected a batch of 1 \(packed sequences lie in one row\), got 2",
        ),
        (1, torch.tensor([0, 2, 6]), "expected cu_seqlens rising from 0 to the 5 slots, got 0 ... 6"),
        (1, torch.tensor([1, 2, 5]), "expected cu_seqlens rising from 0 to the 5 slots, got 1 ... 5"),
        (1, torch.tensor([0, 4, 2, 5]), "got a fall"),
        (1, torch.tensor([[0, 5]]), r"expected cu_seqlens int32 or int64 \[N \+ 1\], N >= 1, got torch.int64 \[1, 2\]"),
        (1, torch.tensor([0.0, 5.0]), "got torch.float32"),
    ],
)
def test_bounds_that_do_not_fit_are_refused_at_every_door(B, bounds, message):
    x = numbers(B, 5, D)
    doors = [ShortConvolution(D).double(), *(made(fields) for fields in LAYERS.values())]
    doors.append(DecoderBlock(made(LAYERS["softmax"]), hidden_size=D, intermediate_size=D).double())
    for door in doors:
        with pytest.raises(ValueError, match=message) as error:
            door(x, cu_seqlens=bounds)
        assert "\n" not in str(error.value)


@sums
def test_a_prefix_of_keys_and_values_is_seen_like_tokens(fields):
    """Keys and values that the layer itself would project, given as a prefix, are a past without a convolution and
    decay.
    """
    layer, x = (
        made({**fields, "decay": False, "conv_width": 0} if "variant" in fields else {**fields, "conv_width": 0}),
        None,
    )
    x = numbers(2, 9, D)
    k, v = (proj(x[:, :4]).unflatten(-1, (layer.num_kv_heads, layer.head_dim)) for proj in (layer.k_proj, layer.v_proj))
    expected, _ = layer(x, visible="causal")
    found, _ = layer(x[:, 4:], visible="causal", state=layer.prefix_state(k, v))
    close(found, expected[:, 4:])


def test_a_prefix_of_another_shape_is_refused():
    layer = made(LAYERS["leap"])
    with pytest.raises(ValueError, match=r"prefix: expected keys and values \[B, S, 2, 4\], got \[1, 3, 4, 2\] and"):
        layer.prefix_state(numbers(1, 3, 4, 2), numbers(1, 3, 4, 2))
