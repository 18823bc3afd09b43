"""gradcheck through every differentiable argument, the clamp of the normaliser, and no gradient to the future."""

import pytest
import torch

from leapformer.ops import LeapWeights, LinearState, Staircase, leap_attention, linear_state
from tests.ops.oracle import assert_near, attend, make_case


def differentiable(*tensors):
    return tuple(None if t is None else t.detach().clone().requires_grad_() for t in tensors)


@pytest.mark.parametrize("decay", (False, True))
def test_gradcheck(decay, float64_impl):
    case = make_case("causal", T=4, B=1, H=2, G=1, K=2, V=2, R=2, decay=decay, state=True)
    names = [name for name, t in case.leaves.items() if t is not None]

    def run(*tensors):
        x = dict(zip(names, tensors, strict=True))
        output, state = attend(
            *(x[n] for n in ("q", "k", "v", "q_factors", "k_factors")),
            visible="causal",
            impl=float64_impl,
            return_state=True,
            log_decay=x.get("log_decay"),
            initial_state=LinearState(x["kv"], x["z"], x.get("state_decay")),
        )
        return (output, *(t for t in state if t is not None))

    assert torch.autograd.gradcheck(run, differentiable(*(case.leaves[n] for n in names)))


def leap_inputs(*, per_head: bool, hidden: bool, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def signed(*shape):
        # Away from 0, where relu has no derivative.
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x + 0.05 * x.sign()

    B, T, H, G, K, V, r = 2, 4, 4, 2, 3, 2, 2

    def weights(heads):
        n = heads if per_head else 1
        if hidden:
            return LeapWeights(signed(n, r, K), signed(n, r), signed(n, r), signed(n))
        return LeapWeights(None, None, signed(n, K), signed(n))

    return signed(B, T, H, K), signed(B, T, G, K), signed(B, T, G, V), weights(H), weights(G)


def proportion(x, weights):
    """sigmoid(w2 . relu(w1 x + b1) + b2), head by head. x [B, T, H, K] -> [B, T, H]."""
    columns = []
    for h in range(x.shape[2]):
        w1, b1, w2, b2 = (None if t is None else t[h if t.shape[0] > 1 else 0] for t in weights)
        hidden = x[:, :, h]
        if w1 is not None:
            hidden = (hidden @ w1.T + b1).relu()
        columns.append(torch.sigmoid((hidden * w2).sum(-1) + b2))
    return torch.stack(columns, 2)


@pytest.mark.parametrize("hidden", (False, True))
@pytest.mark.parametrize("per_head", (False, True))
def test_leap_is_linear_attention_of_relu_and_cosine(per_head, hidden, impl):
    q, k, v, q_leap, k_leap = leap_inputs(per_head=per_head, hidden=hidden)
    given = differentiable(q, k, v, *q_leap, *k_leap)
    q, k, v, q_leap, k_leap = *given[:3], LeapWeights(*given[3:7]), LeapWeights(*given[7:])
    staircase = Staircase.wait_k(1, 1)
    dtype = torch.float32 if impl == "native" else torch.float64
    narrow = [t if t is None else t.to(dtype) for t in given]
    leaps = LeapWeights(*narrow[3:7]), LeapWeights(*narrow[7:])
    actual = leap_attention(*narrow[:3], *leaps, visible=staircase, impl=impl, return_state=True)

    P_q, P_k = (torch.pi / 2 * proportion(x.relu(), w) for x, w in ((q, q_leap), (k, k_leap)))
    factors = torch.stack([P_q.cos(), P_q.sin()], -1), torch.stack([P_k.cos(), P_k.sin()], -1)
    case = make_case("wait-k", T=4, H=4, G=2)
    case.leaves.update(q=q.relu(), k=k.relu(), v=v, q_factors=factors[0], k_factors=factors[1])
    case.counts = [[1, 2, 3, 4]] * 2
    output, kv, z, _ = case.formula()
    assert_near(actual.output, output)
    assert_near(actual.state.kv, kv)
    assert_near(actual.state.z, z)

    leaves = [t for t in given if t is not None]
    probe = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for got, expected in zip(
        torch.autograd.grad((actual.output * probe).sum() + actual.state.kv.sum(), leaves),
        torch.autograd.grad((output * probe).sum() + kv.sum(), leaves),
        strict=True,
    ):
        assert_near(got, expected)


@pytest.mark.parametrize("hidden", (False, True))
def test_leap_gradcheck(hidden, float64_impl):
    q, k, v, q_leap, k_leap = leap_inputs(per_head=True, hidden=hidden, seed=1)

    def run(q, k, v, *weights):
        leaps = (weights[:4], weights[4:]) if hidden else ((None, None, *weights[:2]), (None, None, *weights[2:]))
        result = leap_attention(
            q,
            k,
            v,
            LeapWeights(*leaps[0]),
            LeapWeights(*leaps[1]),
            visible="causal",
            return_state=True,
            impl=float64_impl,
        )
        return result.output, result.state.kv, result.state.z

    weights = [t for t in (*q_leap, *k_leap) if t is not None]
    inputs = differentiable(q[:1, :3], k[:1, :3], v[:1, :3], *weights)
    assert torch.autograd.gradcheck(run, inputs)


def test_linear_state_gradcheck():
    case = make_case(T=5, B=1, H=2, K=2, V=2, R=2, state=True).leaves
    mask = torch.tensor([[True, True, False, True, True]])

    def run(k, v, k_factors, kv, z):
        states = linear_state(k, v, k_factors, key_mask=mask, every=2, initial_state=LinearState(kv, z, None))
        return states.kv, states.z

    assert torch.autograd.gradcheck(run, differentiable(*(case[n] for n in ("k", "v", "k_factors", "kv", "z"))))


@pytest.mark.parametrize("decay", (False, True))
def test_no_gradient_to_the_future(decay, impl):
    """Exactly zero, not small: for keys, values, factors and decay after the query."""
    case = make_case("causal", T=70, H=1, R=2, decay=decay)
    query = 40
    for name, t in case.leaves.items():
        case.leaves[name] = None if t is None else t.requires_grad_()
    loss = case.call(impl).output[:, query].square().sum()
    names = [n for n in ("k", "v", "k_factors", "log_decay") if case.leaves[n] is not None]
    for name, gradient in zip(names, torch.autograd.grad(loss, [case.leaves[n] for n in names]), strict=True):
        assert gradient[:, query + 1 :].eq(0).all(), name
        assert gradient[:, 1 : query + 1].ne(0).any(), name


@pytest.mark.parametrize("visible, last", [(Staircase.blocks(8), 48), (Staircase.wait_k(3, 2), 66), ("all", 70)])
def test_no_gradient_to_unseen_keys(visible, last, impl):
    """Query 40 cuts the gradient off at its slot, up to query 30's for wait-k: g(30) = (3 + 30) 2."""
    q, k, v = (torch.rand(1, 70, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    query = 30 if last == 66 else 40
    output = attend(q, k, v, visible=visible, impl=impl).output
    for gradient in torch.autograd.grad(output[:, query].square().sum(), (k, v)):
        assert gradient[:, last:].eq(0).all()
        assert gradient[:, last - 1].ne(0).all()


def test_clamped_normaliser_gets_no_gradient(impl):
    """Below eps the output is numerator / eps, and its gradients are those of that quotient."""
    q, k, v = (torch.rand(1, 6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    eps = 1e3
    clamped = attend(q, k, v, visible="causal", eps=eps, impl=impl).output
    numerator = attend(q, k, v, visible="causal", normalize=False, impl=impl).output
    assert_near(clamped * eps, numerator)
    actual = torch.autograd.grad((clamped * eps).square().sum(), (q, k, v))
    for got, expected in zip(actual, torch.autograd.grad(numerator.square().sum(), (q, k, v)), strict=True):
        assert_near(got, expected)


def test_only_what_needs_a_gradient_gets_one(impl):
    """Any subset of the arguments may require a gradient; the others cost nothing and stay None."""
    for wanted in ("q", "k", "v", "q_factors", "k_factors", "log_decay", "kv", "z"):
        case = make_case("causal", R=2, decay=True, state=True)
        case.leaves[wanted].requires_grad_()
        result = case.call(impl)
        (result.output.sum() + result.state.kv.sum() + result.state.z.sum()).backward()
        assert case.leaves[wanted].grad.isfinite().all()
        assert all(t is None or t.grad is None for name, t in case.leaves.items() if name != wanted)


def test_state_alone_and_output_alone_can_be_differentiated(impl):
    case = make_case("causal", R=2, state=True)
    q, k, v = (case.leaves[n].requires_grad_() for n in ("q", "k", "v"))
    result = case.call(impl)
    k_gradient, v_gradient = torch.autograd.grad(result.state.kv.sum(), (k, v), retain_graph=True)
    assert k_gradient.isfinite().all() and v_gradient.isfinite().all()
    assert all(g.ne(0).any() for g in torch.autograd.grad(result.output.square().sum(), (q, k, v)))


def test_second_derivatives_are_refused_where_there_are_none():
    """Silence would be a wrong gradient."""
    q = torch.rand(1, 5, 1, 2, dtype=torch.float64, requires_grad=True)
    for impl in ("reference", "torch"):
        output = attend(q, q, q, visible="causal", impl=impl).output
        (gradient,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
        if impl == "reference":
            assert torch.autograd.grad(gradient.square().sum(), q)[0].ne(0).any()
        else:
            with pytest.raises(RuntimeError, match="no autograd formula"):
                torch.autograd.grad(gradient.square().sum(), q)


@pytest.mark.parametrize("used", ("output", "kv", "z"))
@pytest.mark.parametrize("visible", ("all", "causal"))
def test_gradient_through_one_result_alone(visible, used, impl):
    case = make_case(visible, T=70, R=2)
    named = {name: t for name, t in case.leaves.items() if t is not None}

    def gradients(which):
        leaves = dict(zip(named, differentiable(*named.values()), strict=True))
        output, state = attend(*leaves.values(), visible=visible, impl=which, return_state=True)
        result = {"output": output, "kv": state.kv, "z": state.z}[used]
        return torch.autograd.grad(result.square().sum(), list(leaves.values()), allow_unused=True)

    for name, found, expected in zip(named, gradients(impl), gradients("reference"), strict=True):
        assert_near(
            torch.zeros_like(named[name]) if found is None else found,
            torch.zeros_like(named[name]) if expected is None else expected,
            name=name,
        )
