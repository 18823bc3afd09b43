"""A log decay of -inf is an exact reset, finite decays of any size are exact, and no normaliser is negative."""

import pytest
import torch

from leapformer.ops import LeapWeights, LinearState, cosine_factors, leap_attention, linear_attention
from tests.ops.oracle import Case, assert_near, attend, check, make_case, results_and_gradients, takes

INF = float("inf")
FORMS = {
    "plain": {"T": 70, "B": 1, "H": 1},
    "everything": {"T": 130, "H": 4, "G": 2, "R": 2, "mask": True, "state": True, "K": 2, "V": 2},
    "numerator": {"T": 66, "H": 2, "normalize": False, "state": True},
    "packed": {"lengths": [65, 0, 5, 64], "H": 2, "state": True, "K": 2, "V": 2},
}
PATTERNS = {  # of the decays that stand among the others, and how often
    "one reset": ([-INF], 0.02),
    "many resets": ([-INF], 0.5),
    "all resets": ([-INF], 1.0),
    "strong": ([-1e6], 0.1),
    "very strong": ([-1e30], 0.1),
    "all sizes": ([-INF, -1e30, -1e6, -150.0, -99.0, -50.0, 0.0], 0.7),
}


def with_decays(values, share, **form) -> Case:
    case = make_case("causal", decay=True, **form)
    decay = case.leaves["log_decay"]
    generator = torch.Generator().manual_seed(5)
    where = torch.rand(decay.shape, generator=generator) < share
    picked = torch.tensor(values, dtype=decay.dtype)[torch.randint(len(values), decay.shape, generator=generator)]
    case.leaves["log_decay"] = torch.where(where, picked, decay)
    return case


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", FORMS)
def test_strong_decays_are_exact(form, pattern, impl):
    check(with_decays(*PATTERNS[pattern], **FORMS[form]), impl)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("value", (-1e6, -1e30, -INF))
def test_what_follows_a_strong_decay_keeps_its_precision(value, dtype, impl):
    """Differences of running sums in float32 lost 0.025 behind -1e6, and everything behind -1e30."""
    if not takes(impl, dtype):
        return
    case = with_decays([value], 0.1, T=100, H=1, B=1).away_from_zero().to(dtype)
    case.leaves["log_decay"] = case.leaves["log_decay"].float()  # else its small steps are rounded
    exact, exact_gradients = results_and_gradients(case.to(torch.float64), Case.formula)
    found, gradients = results_and_gradients(case, lambda c: c.call(impl))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for name, expected in (exact | {f"of {n}": g for n, g in exact_gradients.items()}).items():
        if name != "decay":
            assert_near((found | {f"of {n}": g for n, g in gradients.items()})[name], expected, tolerance, name)


@pytest.mark.parametrize("value", (-INF, -1e30))
def test_a_reset_is_exact(value, impl):
    """Bit for bit what comes without the past, and no gradient to it or to the reset."""
    case = make_case("causal", T=100, H=2, decay=True, state=True)
    case.leaves["log_decay"][:, 70] = value
    leaves = {n: None if t is None else t.requires_grad_() for n, t in case.leaves.items()}
    result = case.call(impl)
    assert result.state.log_decay.eq(result.state.log_decay.min()).all() and result.state.log_decay.max() <= value
    past = {n: leaves[n] for n in ("q", "k", "v", "log_decay", "kv", "z")}
    gradients = dict(
        zip(
            past,
            torch.autograd.grad(result.output[:, 70:].square().sum() + result.state.kv.sum(), list(past.values())),
            strict=True,
        )
    )
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if name in ("kv", "z"):
            assert gradient.eq(0).all(), name
        elif name != "q":
            end = 71 if name == "log_decay" else 70
            assert gradient[:, 70:].ne(0).any(), name
            assert_near(gradient[:, :end], torch.zeros_like(gradient[:, :end]), name=name)
    assert gradients["log_decay"][:, 70].eq(0).all()
    again = {n: None if t is None else t.detach()[:, 70:] for n, t in case.leaves.items()}
    alone = attend(again["q"], again["k"], again["v"], visible="causal", log_decay=again["log_decay"], impl=impl)
    assert_near(result.output[:, 70:], alone.output, 1e-13)


@pytest.mark.parametrize("pieces", ((70,), (69, 70, 71), (64, 65)))
def test_split_and_resume_at_a_reset(pieces, impl):
    case = with_decays([-INF, -1e30], 0.05, T=100, H=2, G=1, R=2, mask=True)
    case.leaves["log_decay"][:, 70] = -INF
    whole, outputs, state, start = case.call(impl), [], None, 0
    for stop in (*pieces, 100):
        x = {n: None if t is None else t[:, start:stop] for n, t in case.leaves.items()}
        output, state = attend(
            x["q"],
            x["k"],
            x["v"],
            x["q_factors"],
            x["k_factors"],
            visible="causal",
            log_decay=x["log_decay"],
            key_mask=case.key_mask[:, start:stop],
            initial_state=state,
            return_state=True,
            impl=impl,
        )
        outputs.append(output)
        start = stop
    assert_near(torch.cat(outputs, 1), whole.output)
    assert_near(state.kv, whole.state.kv)
    assert torch.equal(state.log_decay.double(), whole.state.log_decay.double())


def test_decoding_through_resets(impl):
    case = with_decays([-INF, -1e6], 0.3, T=20, H=2)
    whole, state, outputs = case.call(impl), None, []
    with torch.no_grad():
        for t in range(20):
            x = {n: None if u is None else u[:, t : t + 1] for n, u in case.leaves.items()}
            output, state = attend(
                x["q"],
                x["k"],
                x["v"],
                visible="causal",
                log_decay=x["log_decay"],
                initial_state=state,
                return_state=True,
                update_state=state is not None,
                impl=impl,
            )
            outputs.append(output)
    assert_near(torch.cat(outputs, 1), whole.output)
    assert_near(state.kv, whole.state.kv)


def test_merge_over_a_reset(impl):
    case = with_decays([-INF], 0.2, T=12, H=2)
    parts = []
    for span in (slice(0, 5), slice(5, 9), slice(9, 12)):
        x = {n: None if t is None else t[:, span] for n, t in case.leaves.items()}
        parts.append(
            attend(
                x["q"], x["k"], x["v"], visible="causal", log_decay=x["log_decay"], return_state=True, impl=impl
            ).state
        )
    whole = case.call(impl).state
    for merged in (parts[0].merge(parts[1]).merge(parts[2]), parts[0].merge(parts[1].merge(parts[2]))):
        assert_near(merged.kv, whole.kv)
        assert_near(merged.z, whole.z)
        finite = whole.log_decay.isfinite()
        assert torch.equal(merged.log_decay.isfinite(), finite) and not finite.all()
        assert_near(merged.log_decay[finite], whole.log_decay[finite])


def test_gradients_of_merge_over_a_reset():
    a, b = (LinearState(torch.rand(1, 1, 1, 2, 2), torch.rand(1, 1, 1, 2), torch.full((1, 1), -INF)) for _ in range(2))
    leaves = [t.requires_grad_() for t in (*a, *b)]
    merged = a.merge(b)
    for gradient in torch.autograd.grad(merged.kv.sum() + merged.z.sum(), leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


# ---- the cosine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_cosine_factors_are_never_negative(dtype):
    p = torch.linspace(0, 1, 1001, dtype=torch.float64).to(dtype)[None, :, None]
    factors = cosine_factors(p)
    assert factors.dtype == dtype and factors.ge(0).all() and factors.le(1).all()
    assert factors[0, -1, 0].tolist() == [0.0, 1.0] and factors[0, 0, 0].tolist() == [1.0, 0.0]
    exact = torch.stack([(torch.pi / 2 * p.double()).cos(), (torch.pi / 2 * p.double()).sin()], -1)
    assert_near(factors, exact, 4 * torch.finfo(dtype).eps)


def saturated(score_q, score_k, dtype, impl, requires_grad=False, eps=1e-6):
    """LeaP modules whose scores are what they are told, whatever the input."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 40, 1, 8, generator=generator).to(dtype) + 1 for _ in range(3))
    zero = torch.zeros(1, 8, dtype=torch.promote_types(dtype, torch.float32))
    leaps = [
        LeapWeights(None, None, zero.clone().requires_grad_(requires_grad), torch.full_like(zero[:, 0], score))
        for score in (score_q, score_k)
    ]
    return (q, k, v, *leaps), leap_attention(q, k, v, *leaps, visible="causal", eps=eps, return_state=True, impl=impl)


@pytest.mark.parametrize("scores", ((17.0, -17.0), (20.0, -25.0), (30.0, -12.0), (-20.0, 20.0)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_opposite_proportions(scores, dtype, impl):
    """P_q near 1 and P_k near 0: the weights are tiny, positive and as precise as others, so the mean is the mean."""
    if not takes(impl, dtype):
        return
    (q, k, v, *_), result = saturated(*scores, dtype, impl, eps=1e-30)
    flat = linear_attention(*(t.double() for t in (q, k, v)), visible="causal", impl="reference").output
    assert_near(result.output, flat, {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_exactly_opposite_proportions_give_zero(dtype, impl):
    """Beyond what exp holds sigma is as good as 0, and never less: no output, no noise, finite gradients."""
    (q, k, v, q_leap, k_leap), result = saturated(500.0, -500.0, dtype, impl, requires_grad=True)
    assert result.output.abs().max() < 1e-25
    gradients = torch.autograd.grad(result.output.float().sum() + result.state.kv.sum(), (q_leap.w2, k_leap.w2))
    assert all(g.isfinite().all() for g in gradients)
    one, zero = torch.ones(1, 40, 1), torch.zeros(1, 40, 1)
    output = linear_attention(q, k, v, cosine_factors(one), cosine_factors(zero), visible="causal", impl=impl).output
    assert output.eq(0).all()


@pytest.mark.parametrize("eps", (1e-45, 1e-300, 5e-324))
def test_an_eps_below_what_the_dtype_holds_divides_by_no_zero(eps, impl):
    x = torch.rand(1, 5, 1, 2)
    assert attend(torch.zeros_like(x), x, x, eps=eps, impl=impl).output.eq(0).all()
