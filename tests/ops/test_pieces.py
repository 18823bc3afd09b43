"""Long sequences of few heads, which the native kernels cut into pieces so that all threads have work."""

import math

import pytest
import torch

from leapformer.ops import LeapWeights, Staircase, leap_attention
from leapformer.ops.arguments import Arguments
from leapformer.ops.native import problem
from tests.ops.oracle import check_low, make_case

pytestmark = pytest.mark.requires_tool("native library")

LONG = 1300  # three groups of 512 keys, the last not full
FORMS = {
    "causal": dict(visible="causal", T=LONG, R=2, relu=True),
    "causal, state": dict(visible="causal", T=LONG, B=2, state=True, mask=True),
    "decay": dict(visible="causal", T=LONG, decay=True, state=True, R=1),
    "all": dict(visible="all", T=700, S=LONG, mask=True, G=1, H=2, R=2),
    "all, few keys": dict(visible="all", T=LONG, S=70, state=True),
    "all, no keys": dict(visible="all", T=LONG, S=0, state=True),
    "wait-k": dict(visible="wait-k", T=700, S=LONG, R=2, mask=True),
    "queries behind all keys": dict(visible="wait-k", T=LONG, S=600, state=True, normalize=False),
    "per sample": dict(visible="per sample", T=LONG, S=1100, B=2),
    "packed": dict(visible="causal", lengths=(900, 0, 30, 1100), R=2, state=True),
    "packed, other keys": dict(visible="tensor", lengths=(700, 40, 600), key_lengths=(1100, 0, 900), R=1),
    "angles": dict(visible="causal", T=LONG, angles=1, mask=True, H=4, G=2),
    "angles, decay": dict(visible="causal", T=LONG, angles=2, decay=True, state=True, H=1),
    "later": dict(visible="all", T=LONG, decay=True, H=1, K=5, V=19),
    "later, state": dict(visible="all", T=LONG, decay=True, state=True, mask=True, R=2, H=2, G=1),
    "later, whole groups": dict(visible="all", T=1024, decay=True, state=True, normalize=False, H=1, R=3),
    "later, angles": dict(visible="all", T=LONG, decay=True, state=True, angles=1, H=1, relu=True, eps=0.1),
    "later, blocks": dict(visible=(440, 600, 600, 160), T=LONG, decay=True, R=2, H=1),
    "later, packed": dict(visible="all", lengths=(900, 0, 30, 1100), decay=True, state=True, H=1),
}
FAR = 1000  # tokens over which the decay of later keys is spread, so that pieces are felt in others


def long_case(form):
    case = make_case(**FORMS[form])
    if "later" in form:
        case.leaves["log_decay"] = case.leaves["log_decay"] / FAR
    return case


@pytest.fixture(params=(2, 3, 5))
def cut(request, monkeypatch):
    monkeypatch.setattr(problem, "pieces", lambda x: 1 if x.is_step else request.param)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("form", FORMS)
def test_outputs_states_and_gradients(form, dtype, cut):
    case = long_case(form).away_from_zero().to(dtype)
    check_low(case, "native", formula=lambda c: c.call("torch"))


@pytest.mark.parametrize("later", (-math.inf, -1e30))
def test_resets_beside_the_ends_of_pieces(later, cut):
    """Nothing passes, and what does not pass has no gradient; pieces end at multiples of 512."""
    case = make_case("all", T=LONG, decay=True, state=True, H=1, B=1)
    case.leaves["log_decay"] = case.leaves["log_decay"] / FAR
    case.leaves["log_decay"][:, [0, 511, 512, 513, 1024, LONG - 1]] = later
    check_low(case.away_from_zero().to(torch.float32), "native", formula=lambda c: c.call("torch"))


@pytest.mark.parametrize("decay", (False, True))
@pytest.mark.parametrize("visible", ("all", "causal", Staircase.wait_k(3, 2)))
def test_modules(visible, decay, cut):
    if decay and isinstance(visible, Staircase):
        visible = Staircase.blocks(600)
    H = 2 if decay else 4

    def results(impl, dtype):
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        q, k, v = leaf(1, LONG, H, 8), leaf(1, LONG, 2, 8), leaf(1, LONG, 2, 8)
        modules = [LeapWeights(leaf(n, 6, 8), leaf(n, 6), leaf(n, 6), leaf(n)) for n in (H, 2)]
        steps = (-leaf(1, LONG, H).detach().abs() / FAR).requires_grad_() if decay else None
        result = leap_attention(
            q, k, v, *modules, visible=visible, log_decay=steps, return_state=True, impl=impl
        )  # fmt: skip
        probe = torch.randn(result.output.shape, generator=generator, dtype=torch.float64)
        loss = (result.output.double() * probe).sum() + result.state.kv.double().square().sum() / LONG
        leaves = [q, k, v, *modules[0], *modules[1], *([steps] if decay else [])]
        return [result.output, result.state.kv, result.state.z, *torch.autograd.grad(loss, leaves)]

    exact = results("torch", torch.float64)
    errors = [
        max(
            ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
            for a, b in zip(found, exact, strict=True)
        )
        for found in (results("torch", torch.float32), results("native", torch.float32))
    ]
    assert errors[1] <= 2 * errors[0] + 4 * torch.finfo(torch.float32).eps, errors


@pytest.mark.parametrize("form", ({"visible": "causal", "R": 2, "relu": True}, {"visible": "all", "decay": True}))
def test_threads_give_the_same_bits_every_time(form):
    case = make_case(T=LONG, B=1, H=1, **form).to(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert problem.pieces(arguments(T=LONG)) == 2
        outputs = [case.call("native").output for _ in range(5)]
        check_low(case.away_from_zero(), "native", formula=lambda c: c.call("torch"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def arguments(T=8192, B=1, H=1) -> Arguments:
    q = torch.empty(B, T, H, 4, device="meta")
    fields = dict.fromkeys(Arguments._fields) | {"q": q, "k": q, "v": q, "causal": True, "normalize": True}
    return Arguments(**fields)


@pytest.mark.parametrize(
    ("threads", "shape", "expected"),
    [
        (1, {}, 1),
        (2, {}, 8),
        (2, {"T": 1500}, 2),
        (2, {"T": 500}, 1),
        (2, {"T": 1}, 1),
        (2, {"H": 8}, 1),
        (2, {"H": 3}, 1),  # four turns for three heads: less than the sums would cost
        (16, {"H": 8}, 8),
        (4, {"B": 4}, 1),
        (4, {"B": 0}, 1),
    ],
)
def test_where_it_is_worth_it(threads, shape, expected, monkeypatch):
    monkeypatch.setattr(problem, "threads", lambda: threads)
    assert problem.pieces(arguments(**shape)) == expected
