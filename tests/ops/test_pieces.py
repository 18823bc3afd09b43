"""Long sequences of few heads, which the native kernels cut into pieces so that all threads have work."""

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
}


@pytest.fixture(params=(2, 3, 5))
def cut(request, monkeypatch):
    monkeypatch.setattr(problem, "pieces", lambda x: 1 if x.is_step else request.param)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("form", FORMS)
def test_outputs_states_and_gradients(form, dtype, cut):
    case = make_case(**FORMS[form]).away_from_zero().to(dtype)
    check_low(case, "native", formula=lambda c: c.call("torch"))


@pytest.mark.parametrize("visible", ("all", "causal", Staircase.wait_k(3, 2)))
def test_modules(visible, cut):
    def results(impl, dtype):
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        q, k, v = leaf(1, LONG, 4, 8), leaf(1, LONG, 2, 8), leaf(1, LONG, 2, 8)
        modules = [LeapWeights(leaf(n, 6, 8), leaf(n, 6), leaf(n, 6), leaf(n)) for n in (4, 2)]
        result = leap_attention(q, k, v, *modules, visible=visible, return_state=True, impl=impl)
        probe = torch.randn(result.output.shape, generator=generator, dtype=torch.float64)
        loss = (result.output.double() * probe).sum() + result.state.kv.double().square().sum() / LONG
        leaves = [q, k, v, *modules[0], *modules[1]]
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


def test_threads_give_the_same_bits_every_time():
    case = make_case("causal", T=LONG, B=1, H=1, R=2, relu=True).to(torch.float32)
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
