"""Angles of queries and keys in place of factors."""

import math

import pytest
import torch

from leapformer.ops import linear_attention
from tests.ops.oracle import (
    VISIBILITIES,
    Case,
    assert_near,
    attend,
    check,
    check_low,
    make_case,
    needs,
    results_and_gradients,
    takes,
)

FORMS = {
    "one": {"angles": 1},
    "two": {"angles": 2, "T": 70, "H": 1, "K": 2, "V": 2},
    "three": {"angles": 3},
    "grouped heads": {"angles": 1, "H": 4, "G": 2},
    "shared by heads": {"angles": 2, "H": 4, "G": 2, "factor_heads": False},
    "one key head": {"angles": 2, "H": 3, "G": 1},
    "keys of another length": {"angles": 1, "S": 10},
    "mask and state": {"angles": 2, "T": 70, "H": 2, "G": 1, "K": 2, "V": 2, "mask": True, "state": True},
    "numerator": {"angles": 2, "normalize": False, "state": True, "mask": True},
    "relu": {"angles": 1, "relu": True, "eps": 0.1},
    "packed": {"angles": 2, "lengths": [3, 0, 66, 1], "H": 1, "K": 2, "V": 2},
    "packed and grouped": {"angles": 1, "lengths": [4, 1, 5], "state": True, "H": 4, "G": 2, "mask": True},
}


@pytest.mark.parametrize("m", (1, 2))
def test_reference_is_the_definition(m):
    """The weight of query i and key j is q_i . k_j times the sum of the cosines of their angles' differences."""
    case = make_case("causal", T=9, B=1, H=1, angles=m, normalize=False)
    x = case.leaves
    for name in ("q_angles", "k_angles"):
        x[name] = 50 * x[name] - 20  # of any size
    leaves = {name: t.requires_grad_() for name, t in x.items() if t is not None}
    q, k, v, q_angles, k_angles = (t[0, :, 0] for t in leaves.values())
    rows = []
    for i in range(9):
        weights = [(q[i] @ k[j]) * (q_angles[i] - k_angles[j]).cos().sum() for j in range(i + 1)]
        rows.append(sum((w * v[j] for j, w in enumerate(weights)), torch.zeros_like(v[0])))
    expected = torch.stack(rows)[None, :, None]
    probe = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    for found in (case.call("reference").output, case.formula()[0]):  # the formula, with which the others are compared
        assert_near(found, expected)
        gradients = (torch.autograd.grad((t * probe).sum(), list(leaves.values()), retain_graph=True)
                     for t in (found, expected))  # fmt: skip
        for name, got, wanted in zip(leaves, *gradients, strict=True):
            assert_near(got, wanted, name=f"gradient of {name}")


def test_state_holds_the_cosines_first(impl):
    case = make_case(T=70, H=1, K=2, V=2, angles=2)
    x, state = case.leaves, case.call(impl).state
    factors = torch.cat([x["k_angles"].cos(), x["k_angles"].sin()], -1)
    assert_near(state.z, torch.einsum("bshr,bshk->bhrk", factors, x["k"]))
    assert_near(state.kv, torch.einsum("bshr,bshk,bshv->bhrkv", factors, x["k"], x["v"]))


@pytest.mark.parametrize("visible", VISIBILITIES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_state_and_gradients(form, visible, impl, poisoned_memory):
    options = {k: v for k, v in FORMS[form].items() if k != "S" or visible != "causal"}
    check(make_case(visible, **options), impl)


@pytest.mark.parametrize("visible", ("causal", "all", (3, 5, 5, 2)))
@pytest.mark.parametrize("form", ("two", "grouped heads", "shared by heads", "mask and state", "packed and grouped"))
def test_with_a_decay(form, visible, impl):
    if visible != "causal":
        needs(impl, "later_decay")
    case = make_case(visible, decay=True, **FORMS[form])
    case.leaves["log_decay"][:, ::7] = -math.inf
    check(case, impl)


@pytest.mark.parametrize("length", (0, 1, 63, 64, 65, 100, 200))
@pytest.mark.parametrize("visible", ("all", "causal", "blocks", "wait-k"))
def test_lengths(visible, length, impl):
    check(make_case(visible, T=length, B=1, H=1, K=2, V=2, angles=2, state=True), impl)


@pytest.mark.parametrize("visible", ("all", "causal", "wait-k"))
@pytest.mark.parametrize("size", (10.0, 1e4))
def test_angles_of_any_size(size, visible, impl):
    """Clocks run on: what counts is the difference of two large angles, in the precision in which these are given."""
    case = make_case(visible, T=100, B=1, H=2, angles=2, normalize=False)
    for name in ("q_angles", "k_angles"):
        case.leaves[name] = size * (case.leaves[name] - 0.3)
    check(case, impl)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("visible", ("all", "causal", "wait-k"))
def test_garbage_in_masked_slots_is_never_read(visible, packed, impl):
    options = {"lengths": [40, 0, 30]} if packed else {"T": 70}
    case = make_case(visible, H=2, G=1, K=2, V=2, angles=2, mask=True, state=True, **options)
    for name in ("k", "v", "k_angles"):
        case.leaves[name][~case.key_mask] = math.nan
    check(case, impl)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", ("two", "shared by heads", "mask and state", "packed"))
@pytest.mark.parametrize("visible", ("all", "causal", "wait-k"))
def test_below_float64(visible, form, dtype, impl):
    """Angles stay in float32, as clocks do: in a dtype that rounds them they would say another position."""
    if takes(impl, dtype):
        case = make_case(visible, **FORMS[form]).away_from_zero().to(dtype)
        for name in ("q_angles", "k_angles"):
            case.leaves[name] = case.leaves[name].float()
        check_low(case, impl)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_angles_of_another_dtype(dtype, impl):
    """Gradients come in each one's own."""
    case = make_case("causal", T=70, H=1, angles=1).to(torch.float32)
    for name in ("q_angles", "k_angles"):
        case.leaves[name] = case.leaves[name].to(dtype)
    found, gradients = results_and_gradients(case, lambda c: run_as_given(c, impl))
    exact, exact_gradients = results_and_gradients(case.to(torch.float64), Case.formula)
    assert gradients["q_angles"].dtype == gradients["k_angles"].dtype == dtype
    for name, expected in exact.items():
        assert_near(found[name], expected, 1e-5, name)
    for name, expected in exact_gradients.items():
        assert_near(gradients[name], expected, 1e-2 if gradients[name].dtype == torch.bfloat16 else 1e-5, name)


def run_as_given(case, impl):
    x = case.leaves
    angles = {name: x[name] for name in ("q_angles", "k_angles")}
    return linear_attention(x["q"], x["k"], x["v"], visible="causal", return_state=True, impl=impl, **angles)


@pytest.mark.parametrize("decay", (False, True))
@pytest.mark.parametrize("pieces", ((0, 1, 99), (63, 64, 65), (50,)))
def test_split_and_resume(pieces, decay, impl):
    case = make_case("causal", T=100, H=2, G=1, angles=2, mask=True, decay=decay)
    whole, outputs, state, start = case.call(impl), [], None, 0
    for stop in (*pieces, 100):
        output, state = part(case, start, stop, state, impl)
        outputs.append(output)
        start = stop
    assert_near(torch.cat(outputs, 1), whole.output)
    assert_near(state.kv, whole.state.kv)
    assert_near(state.z, whole.state.z)


def part(case, start, stop, state, impl, **keywords):
    x = {name: None if t is None else t[:, start:stop] for name, t in case.leaves.items()}
    named = {name: x[name] for name in ("q_angles", "k_angles", "log_decay")}
    mask = None if case.key_mask is None else case.key_mask[:, start:stop]
    keywords = {"visible": "causal", "return_state": True, **keywords}
    return attend(x["q"], x["k"], x["v"], key_mask=mask, initial_state=state, impl=impl, **named, **keywords)


@pytest.mark.parametrize("decay", (False, True))
def test_decoding_token_by_token(decay, impl):
    case = make_case("causal", T=20, H=4, G=2, angles=1, decay=decay)
    whole, state, outputs = case.call(impl), None, []
    with torch.no_grad():
        for t in range(20):
            output, state = part(case, t, t + 1, state, impl, update_state=state is not None)
            outputs.append(output)
    assert_near(torch.cat(outputs, 1), whole.output)
    assert_near(state.kv, whole.state.kv)


@pytest.mark.parametrize("decay", (False, True))
def test_gradcheck(decay, float64_impl):
    case = make_case("causal", T=4, B=1, H=2, G=1, K=2, V=2, angles=2, decay=decay, state=True)
    names = [name for name, t in case.leaves.items() if t is not None]

    def run(*tensors):
        leaves = dict.fromkeys(case.leaves) | dict(zip(names, tensors, strict=True))
        result = Case(leaves, case.visible, case.counts, case.spans).call(float64_impl)
        return result.output, *(t for t in result.state if t is not None)

    assert torch.autograd.gradcheck(run, tuple(case.leaves[name].requires_grad_() for name in names))


def test_only_what_needs_a_gradient_gets_one(impl):
    for wanted in ("q", "k", "q_angles", "k_angles"):
        case = make_case("causal", T=70, H=1, angles=1, normalize=False)
        case.leaves[wanted].requires_grad_()
        case.call(impl).output.square().sum().backward()
        assert case.leaves[wanted].grad.ne(0).any()
        assert all(t is None or t.grad is None for name, t in case.leaves.items() if name != wanted)
