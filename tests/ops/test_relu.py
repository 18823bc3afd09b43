"""`relu=True` is attention of relu(q) and relu(k), against the formula, with the gradients of q and k themselves."""

import pytest
import torch

from leapformer.ops import linear_attention
from tests.ops.oracle import attend, check, check_low, make_case, results_and_gradients, takes

CASES = {
    "everything": {},
    "masked keys": {"mask": True},
    "grouped heads": {"H": 4, "G": 2},
    "many chunks": {"T": 150, "B": 1},
    "wide": {"K": 20, "V": 17},
    "initial state": {"state": True},
    "numerator": {"normalize": False},
    "packed": {"lengths": (3, 0, 70, 5)},
}


@pytest.mark.parametrize("R", (0, 1, 2, 3))
@pytest.mark.parametrize("visible", ("all", "causal", "wait-k"))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, visible, R, impl):
    check(make_case(visible, R=R, relu=True, seed=R, **CASES[name]), impl)


@pytest.mark.parametrize("R", (0, 2))
def test_decay(R, impl):
    check(make_case("causal", T=70, R=R, decay=True, state=True, relu=True), impl)


def test_factors_of_any_sign(impl):
    case = make_case("causal", R=2, relu=True, normalize=False)
    case.leaves["q_factors"] = case.leaves["q_factors"] - 0.5
    check(case, impl)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision(dtype, impl):
    if takes(impl, dtype):
        check_low(make_case("causal", T=70, R=2, relu=True).away_from_zero().to(dtype), impl)


def test_gradient_is_exactly_zero_where_relu_cut(impl):
    case = make_case("causal", T=70, R=2, relu=True)
    _, gradients = results_and_gradients(case, lambda c: c.call(impl))
    for name in ("q", "k"):
        cut = case.leaves[name] <= 0
        assert cut.any() and not cut.all()
        assert (gradients[name][cut] == 0).all() and (gradients[name][~cut] != 0).any()


def test_one_token(impl):
    q, k = (torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    with torch.no_grad():
        one = attend(q, k, q, visible="causal", relu=True, impl=impl).output
        other = attend(q.relu(), k.relu(), q, visible="causal", impl=impl).output
    assert one.any() and torch.equal(one, other)


@pytest.mark.parametrize("fullgraph_backend", ("aot_eager",))
def test_compiles(fullgraph_backend):
    q, k, v = (torch.randn(1, 70, 2, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))

    def attention(q, k, v):
        return linear_attention(q, k, v, visible="causal", relu=True).output

    compiled = torch.compile(attention, fullgraph=True, backend=fullgraph_backend)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
