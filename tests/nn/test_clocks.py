"""Running proportions: clocks against sums written out in float64, split anywhere, for as long as one likes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import silu

from leapformer.nn import build_attention
from leapformer.nn.clocks import Clocks
from leapformer.ops import Staircase
from tests.nn.oracles import close

D, H, K = 12, 2, 6


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(**fields):
    torch.manual_seed(1)
    fields = {"variant": "gated", "proportion": "running", "leap_hidden": 3, **fields}
    return build_attention("leap", hidden_size=D, num_heads=H, **fields).double()


def steps_of(module, x):
    """sigmoid(w2 . relu(w1 x + b1) + b2) of each token and head, head by head, from x [B, T, heads, K]."""
    found = []
    for head in range(x.shape[2]):
        own = [w[head if len(w) > 1 else 0] for w in (module.w1, module.b1, module.w2, module.b2)]
        found.append(torch.sigmoid(torch.relu(x[:, :, head] @ own[0].T + own[1]) @ own[2] + own[3]))
    return torch.stack(found, dim=2)


def written_out(layer, x, context=None, *, sees):
    """The layer's output, key by key. sees(i, j): whether query i sees key j."""
    source = x if context is None else context
    if layer.conv is not None:
        x = layer.conv(x)[0]
        source = x if context is None else context
    q = layer.q_proj(x).unflatten(-1, (H, K)).relu()
    k, v = (p(source).unflatten(-1, (layer.num_kv_heads, K)) for p in (layer.k_proj, layer.v_proj))
    k, clocks = k.relu(), layer.clocks
    running_k = steps_of(clocks.k_steps, k).cumsum(1)
    share = H // layer.num_kv_heads
    k, v, running_k = (t.repeat_interleave(share, 2) for t in (k, v, running_k))
    running_q = running_k if context is None else steps_of(clocks.q_steps, q).cumsum(1)
    if layer.q_proportion is not None:
        running_q = running_q + steps_of(layer.q_proportion, q)
        running_k = running_k + steps_of(layer.k_proportion, k[:, :, ::share]).repeat_interleave(share, 2)
    theta = clocks.log_rates.exp().repeat_interleave(share, 0)
    fades = context is None and layer.decay is not None
    decay = layer.decay(x) if fades else x.new_zeros(*x.shape[:2], H)
    out = torch.zeros_like(q)
    for i in range(x.shape[1]):
        for j in range(source.shape[1]):
            if sees(i, j):
                between = decay[:, j + 1 : i + 1].sum(1) if j <= i else decay[:, i:j].sum(1)
                sigma = (theta * (running_q[:, i] - running_k[:, j])[..., None]).cos().sum(-1)
                weight = (q[:, i] * k[:, j]).sum(-1) * sigma * between.exp()
                out[:, i] += weight[..., None] * v[:, j]
    return layer.o_proj(layer.output_norm(out).flatten(-2))


FORMS = {
    "one clock": {},
    "two clocks": {"clocks": 2},
    "places": {"leap_places": True},
    "grouped": {"num_kv_heads": 1, "clocks": 2, "leap_places": True},
    "per head": {"leap_per_head": True},
    "no decay": {"decay": False, "conv_width": 0},
    "wide rates": {"clock_rate": 2 * math.pi, "clock_decades": 0.5},
}
forms = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS.keys())


@forms
@pytest.mark.parametrize("visible", ["causal", "all", "blocks"])
def test_self_attention_is_the_sum_written_out(fields, visible):
    layer, x = made(**fields), numbers(2, 13, D)
    sees = {"causal": lambda i, j: j <= i, "all": lambda i, j: True, "blocks": lambda i, j: j < (i // 4 + 1) * 4}
    y, _ = layer(x, visible=Staircase.blocks(4) if visible == "blocks" else visible)
    close(y, written_out(layer, x, sees=sees[visible]))


@forms
def test_cross_attention_is_the_sum_written_out(fields):
    layer, x, source = made(cross=True, **fields | {"decay": False}), numbers(2, 7, D), numbers(2, 11, D, seed=2)
    y, _ = layer(x, source, visible=Staircase.wait_k(2, 1))
    close(y, written_out(layer, x, source, sees=lambda i, j: j < 2 + i))


@forms
def test_a_sequence_goes_on_from_its_state_with_gradients(fields):
    layer, x = made(**fields), numbers(1, 12, D).requires_grad_()
    whole, last = layer(x, visible="causal", return_state=True)
    wanted = torch.autograd.grad(whole.sin().sum(), [x, *layer.parameters()], retain_graph=True)
    state, parts = None, []
    for piece in x.split([5, 1, 0, 6], dim=1):
        y, state = layer(piece, visible="causal", state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), whole)
    close((state.clock - last.clock).cos(), torch.ones_like(last.clock))
    found = torch.autograd.grad(torch.cat(parts, 1).sin().sum(), [x, *layer.parameters()])
    for own, expected in zip(found, wanted, strict=True):
        close(own, expected, 1e-9)
    assert all(gradient.abs().max() > 0 for gradient in wanted)


def test_a_plain_feature_map_that_is_no_relu_goes_too():
    layer, x = made(feature_map=silu, conv_width=0), numbers(1, 5, D)
    y, state = layer(x, visible="causal", return_state=True)
    k = silu(layer.k_proj(x).unflatten(-1, (H, K)))
    turned = steps_of(layer.clocks.k_steps, k).sum(1)[..., None] * layer.clocks.log_rates.exp()
    close((state.clock - turned).cos(), torch.ones_like(turned))


def test_the_start():
    clocks = Clocks(K, 3, 3, clocks=2)
    rates = clocks.log_rates.detach().exp().flatten()
    torch.testing.assert_close(rates, math.pi / 2 * 10 ** (-2 * torch.arange(6) / 5), rtol=1e-6, atol=0)
    # The first turns a quarter in a step, the last one needs a hundred steps for that.
    assert rates[0].item() == pytest.approx(math.pi / 2) and rates[-1].item() == pytest.approx(math.pi / 200)


def test_angles_are_as_exact_after_a_million_tokens():
    """In float32, in pieces, beside the sum of the same steps in float64: off by the rounding of one angle alone."""
    torch.manual_seed(0)
    clocks, clock = Clocks(K, 2, 2, rate=2 * math.pi), None
    total, rates = torch.zeros(2, dtype=torch.float64), clocks.log_rates.double().exp()[:, 0]
    with torch.no_grad():
        for piece in range(200):
            k = torch.randn(1, 5000, 2, K, generator=torch.Generator().manual_seed(piece)).relu()
            total = total + clocks.k_steps(k)[0].double().sum(0)
            _, angles, clock, _ = clocks(k, past=(clock, None))
        assert angles.dtype == torch.float32 and clock.dtype == torch.float64
        assert 0 <= angles.min() and angles.max() <= 2 * math.pi + 1e-6
        exact = total * rates
        assert exact.min() > 1e4  # turns enough for float32 sums to have lost everything
        half_unit = 2 * math.pi * torch.finfo(torch.float32).eps / 2
        assert (angles[0, -1, :, 0].double() - exact).cos().min() >= math.cos(half_unit + 1e-7)


def test_packed_sequences_start_anew_and_empty_ones_keep_their_clock():
    clocks, k = Clocks(K, H, H, clocks=3).double(), numbers(1, 9, H, K)
    bounds, past = torch.tensor([0, 4, 4, 9]), numbers(3, H, 3, seed=4)
    _, angles, clock, _ = clocks(k, past=(past, None), cu_seqlens_k=bounds)
    for row, part in enumerate((slice(0, 4), slice(4, 4), slice(4, 9))):
        alone = clocks(k[:, part], past=(past[row : row + 1], None))
        close((angles[:, part] - alone.keys).cos(), torch.ones_like(alone.keys))
        close((clock[row] - alone.clock[0]).cos(), torch.ones_like(clock[row]))
    close(clock[1], past[1])
    _, angles, clock, _ = clocks(k[:, :0], cu_seqlens_k=torch.tensor([0, 0]))
    assert angles.shape == (1, 0, H, 3) and clock.eq(0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_norm": False}, "proportion='running': expected output_norm"),
        ({"clocks": 0}, "Clocks: expected clocks >= 1"),
        ({"clock_rate": 0.0}, "Clocks: .*rate > 0"),
        ({"clock_decades": -1.0}, "Clocks: .*decades >= 0"),
        ({"decay_scales": (4.0, 2.0)}, "decay_scales: expected .*0 < shortest <= longest, got"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        made(**fields)


def test_cross_attention_has_to_be_asked_for():
    with pytest.raises(ValueError, match="expected cross=True for cross-attention, got cross=False"):
        made()(numbers(1, 3, D), numbers(1, 4, D))


def test_time_scales_of_the_decay():
    layer = made(decay_scales=(4.0, 256.0))
    log_decay = torch.nn.functional.logsigmoid(layer.decay.bias)
    torch.testing.assert_close(-1 / log_decay, torch.tensor([4.0, 256.0], dtype=torch.float64), rtol=1e-4, atol=0)
