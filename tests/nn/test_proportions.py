"""LeaP modules, positions, feature maps, re-weightings and the short convolution, each against its formula."""

import math

import pytest
import torch
from torch.nn import functional as F

from leapformer.nn import (
    FEATURE_MAPS,
    REWEIGHTINGS,
    LeapModule,
    LearnedPositions,
    PositionProportion,
    ShortConvolution,
    SinusoidalPositions,
    hidden_for_share,
    leap_parameters,
)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("hidden", [1, 5])
def test_leap_module_follows_the_formula(heads, hidden):
    torch.manual_seed(0)
    module = LeapModule(4, hidden=hidden, heads=heads).double()
    x = torch.rand(2, 7, 3, 4, dtype=torch.float64)
    got = module(x)
    for h in range(3):
        w1, b1, w2, b2 = (None if w is None else w[h % heads] for w in module.weights())
        inner = x[:, :, h] if w1 is None else torch.relu(x[:, :, h] @ w1.T + b1)
        torch.testing.assert_close(got[:, :, h], torch.sigmoid(inner @ w2 + b2))
    assert sum(p.numel() for p in module.parameters()) == heads * leap_parameters(4, hidden)


def test_the_papers_module_has_the_papers_parameters():
    assert 4 * leap_parameters(32, 1) == 132 and 4 * leap_parameters(32, 8) == 4 * (34 * 8 + 1)
    assert 32 * leap_parameters(128, 32) == 133_152


def test_bins_round_but_pass_the_gradient():
    torch.manual_seed(0)
    module = LeapModule(4, bins=3)
    x = torch.rand(1, 50, 1, 4)
    smooth = LeapModule(4)
    smooth.load_state_dict(module.state_dict())
    assert set(module(x).detach().flatten().tolist()) <= {0.0, 0.5, 1.0}
    got, wanted = (torch.autograd.grad(m(x).sum(), m.w2)[0] for m in (module, smooth))
    torch.testing.assert_close(got, wanted)


def test_spread_start_spreads_the_proportions():
    x = torch.rand(1, 400, 1, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    default, spread = (LeapModule(32, start=start)(x).std() for start in ("default", "spread"))
    assert spread > 2 * default


def test_share_chooses_the_nearest_size():
    assert hidden_for_share(0.002, parameters=67_072, modules=4, head_dim=32) == 1
    assert hidden_for_share(0.0163, parameters=67_072, modules=4, head_dim=32) == 8
    with pytest.raises(ValueError, match="between 0 and 1"):
        hidden_for_share(2, parameters=100, modules=4, head_dim=32)


def test_positions_count_from_one():
    p = PositionProportion(10)(torch.arange(10)[None])
    torch.testing.assert_close(p[0, :, 0], torch.arange(1, 11) / 10)


@pytest.mark.parametrize("name", REWEIGHTINGS)
def test_reweightings_split_their_formula(name):
    formula = {
        "cosine": lambda a, b: torch.cos(math.pi / 2 * (a - b)),
        "quadratic": lambda a, b: 1 - (a - b) ** 2,
    }[name]
    a, b = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = REWEIGHTINGS[name]()
    products = sigma.factors_q(a) @ sigma.factors_k(b).T
    assert sigma.factors_q(a).shape[-1] == sigma.rank
    torch.testing.assert_close(products, formula(a[:, None], b[None]))


def test_feature_maps_are_not_negative_but_one():
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(FEATURE_MAPS["elu"](x), torch.where(x > 0, x + 1, x.exp()))
    assert {name for name, f in FEATURE_MAPS.items() if (f(x) < 0).any()} == {"silu"}


def test_convolution_equals_pytorchs_and_starts_near_the_identity():
    torch.manual_seed(0)
    conv = ShortConvolution(6, width=4).double()
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    y, tail = conv(x)
    weight = conv.weight.flip(0).T[:, None]
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight, groups=6).transpose(1, 2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(tail, x[:, -3:])
    assert torch.equal(conv.weight[0], torch.ones(6, dtype=torch.float64))


def test_position_vectors():
    vectors = SinusoidalPositions(8)(torch.tensor([[0, 5]]))
    torch.testing.assert_close(vectors[0, 0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(vectors[0, 1, 0], torch.tensor(math.sin(5.0)))
    assert LearnedPositions(3, 8)(torch.tensor([[2]])).shape == (1, 1, 8)
