"""The seven mechanisms beside softmax and linear attention: padding, gradients, refusals, random numbers, dtypes."""

import pytest
import torch

from leapformer.nn import EncoderBlock, LayerState, build_attention
from leapformer.ops import Staircase

D, H, T = 16, 2, 40
SMALL = {"num_features": 6, "block_size": 4, "random_blocks": 2, "max_positions": 48}
KINDS = ["performer", "linformer", "nystromformer", "skyformer", "reformer", "bigbird", "informer"]
BIDIRECTIONAL = KINDS[1:]
LENGTHS = (40, 23, 9, 1, 0)


def build(kind, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = build_attention(kind, hidden_size=D, num_heads=H, **(SMALL | arguments)).double().eval()
        for projection in (layer.q_proj, layer.k_proj):
            if projection is not None:
                projection.weight.data *= 3  # scores that differ, so that who is seen matters
    return layer


@pytest.fixture
def x():
    return torch.randn(len(LENGTHS), T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mask_of(side):
    slots, real = torch.arange(T), torch.tensor(LENGTHS)[:, None]
    if side == "right":
        return slots < real
    if side == "left":
        return slots >= T - real
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(T, generator=generator) < n for n in LENGTHS])


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left", "anywhere"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, side, x):
    layer, mask = build(kind), mask_of(side)
    padded, _ = layer(torch.where(mask[..., None], x, 7.0), key_mask=mask)
    for row, n in enumerate(LENGTHS):
        if n:
            alone, _ = layer(x[row : row + 1, mask[row]])
            torch.testing.assert_close(padded[row : row + 1, mask[row]], alone, atol=1e-10, rtol=1e-10)
        else:
            assert torch.equal(padded[row], layer.o_proj.bias.expand(T, D))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradients_are_finite_and_none_comes_from_padding(kind, training, x):
    layer, mask = build(kind, dropout=0.1).train(training), mask_of("right")
    x = x.masked_fill(~mask[..., None], 0).requires_grad_()
    y, _ = layer(x, key_mask=mask)
    names, weights = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(y[mask].square().sum(), [x, *weights])
    for name, grad in zip(["x", *names], grads, strict=True):
        assert grad.isfinite().all(), name
        assert (grad != 0).any(), name
    assert (grads[0][~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope(kind, x):
    layer, mask = build(kind), mask_of("right")
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))

    def loss(step):
        return layer(x + step * direction, key_mask=mask)[0][mask].square().sum()

    step = torch.zeros((), dtype=x.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(step), step)
    with torch.no_grad():
        measured = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(measured, slope, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 17])
def test_short_and_odd_lengths(kind, tokens, x):
    layer = build(kind)
    y, _ = layer(x[:1, :tokens])
    assert y.shape == (1, tokens, D) and y.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_repeats_itself_and_leaves_the_generator_alone(kind, x):
    layer = build(kind)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = layer(x)[0], layer(x)[0]
    assert torch.equal(first, second) and torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(layer(x[1:3])[0], first[1:3], atol=1e-12, rtol=1e-12)  # whatever else is in the batch


@torch.no_grad()
@pytest.mark.parametrize(("kind", "draws"), [(kind, kind in ("skyformer", "reformer", "informer")) for kind in KINDS])
def test_training_draws_from_the_torch_generator(kind, draws, x):
    layer = build(kind).train()
    torch.manual_seed(5)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(5)
    assert torch.equal(layer(x)[0], first)
    assert torch.equal(first, second) is not draws


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_draws_the_same_numbers_again(kind, x):
    block = EncoderBlock(build(kind, dropout=0.1).train(), hidden_size=D, intermediate_size=32).double()
    weights = list(block.parameters())
    torch.manual_seed(5)
    wanted = torch.autograd.grad(block(x)[0].square().sum(), weights)
    torch.manual_seed(5)
    y = torch.utils.checkpoint.checkpoint(lambda a: block(a)[0], x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), weights), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_its_dtype_and_nearly_the_same(kind, x):
    layer, x = build(kind).float(), x.float()
    if kind == "reformer":  # rounding may send a token to another bucket; with one chunk there is one
        layer.block_size = T
    if kind == "informer":  # and may choose another query
        layer.factor = T
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    exact, _ = layer(x)
    # bf16 has 8 bits; a few roundings in a row of projections and products.
    assert (y.float() - exact).norm() < 16 * 2**-8 * exact.norm()


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"visible": "causal"}, "expected visible='all' (it is bidirectional), got 'causal'"),
        ({"visible": Staircase(4, 4, 4)}, "expected visible='all' (it is bidirectional), got a Staircase"),
        ({"return_state": True}, "expected no state (it doesn't stream), got one or return_state=True"),
        ({"state": LayerState(torch.zeros(5, dtype=torch.int64))}, "expected no state (it doesn't stream)"),
        ({"cu_seqlens": torch.tensor([0, 40])}, "expected a key_mask for sequences of several lengths, got cu_seqlens"),
    ],
)
def test_what_a_mechanism_cannot_do_is_one_line(kind, arguments, message, x):
    with pytest.raises(ValueError) as caught:
        build(kind)(x, **arguments)
    assert str(caught.value).startswith(f"{kind} attention: {message}") and "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_capabilities_are_what_it_does(kind, x):
    layer = build(kind)
    can = layer.capabilities
    if can.cross:
        assert layer(x, x[:, :30])[0].shape == x.shape
    else:
        with pytest.raises(ValueError, match="expected self-attention, got a context"):
            layer(x, x[:, :30])
    longer = x.repeat(1, 2, 1)
    if can.arbitrary_length:
        assert layer(longer)[0].shape == longer.shape
    else:
        with pytest.raises(ValueError, match="at most max_positions=48 tokens, got 80"):
            layer(longer)
    assert (can.causal, can.streaming) == ((True, True) if kind == "performer" else (False, False))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_heads_are_repeated_heads(kind, x):
    if kind == "reformer":
        with pytest.raises(ValueError, match="with queries as keys: expected num_kv_heads=2, got 1"):
            build(kind, num_kv_heads=1)
        return
    grouped, full = build(kind, num_kv_heads=1), build(kind)
    weights = full.state_dict() | grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        weights[name] = torch.cat([weights[name]] * 2)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(x)[0], full(x)[0], atol=1e-12, rtol=1e-12)
