"""The custom operators under torch's own checks, torch.compile and torch.export."""

import pytest
import torch

from leapformer.ops import (
    LeapWeights,
    LinearState,
    Staircase,
    leap_attention,
    linear_attention,
    linear_state,
    native,
    torch_impl,
)
from leapformer.ops.arguments import ANGLES, Arguments
from tests.ops.oracle import assert_near, make_case

OPERATORS = {"torch": (torch_impl.OPERATOR, torch.float64), "native": (native.OPERATOR, torch.float32)}
NATIVE = pytest.param("native", marks=pytest.mark.requires_tool("native library"))


def forward_arguments(operator, visible="causal", *, dtype, later=False, **form):
    """What the operator is called with, in its order; ``later``: with the decay of later keys too."""
    case = make_case(visible, state=True, **form).to(dtype)
    x = {name: None if t is None else t.requires_grad_() for name, t in case.leaves.items() if name != "state_decay"}
    packing = case.cu.get("cu_seqlens")
    return operator.given(
        Arguments(
            **x,
            later_decay=torch.rand_like(x["log_decay"]).neg().requires_grad_() if later else None,
            key_mask=case.key_mask,
            counts=case.visible if isinstance(case.visible, torch.Tensor) else None,
            cu_seqlens=packing,
            cu_seqlens_k=case.cu.get("cu_seqlens_k", packing),
            causal=visible == "causal",
            relu=case.keywords.get("relu", False),
        )
    )


OPERATOR_FORMS = {
    "causal": {"T": 5, "mask": True, "relu": True, "R": 2},
    "decay": {"T": 5, "decay": True, "R": 2},
    "decay of later keys": {"T": 5, "decay": True, "later": True, "R": 2},
    "packed": {"lengths": [2, 0, 3], "R": 2},
    "all": {"visible": "all", "S": 6, "H": 4, "G": 2, "R": 2},
    "tensor": {"visible": "tensor", "S": 6, "R": 2},
    "absorb": {"visible": "all", "T": 0, "S": 3, "R": 2},
    "read": {"visible": "all", "T": 3, "S": 0, "R": 2},
    "angles": {"T": 5, "angles": 2, "factor_heads": False},
    "angles, decay of later keys": {"T": 5, "decay": True, "later": True, "angles": 1},
}


def operator_and_arguments(name, form):
    """The operator's form that takes them; skipped where none does."""
    operator, dtype = OPERATORS[name]
    fields = ANGLES if "angles" in form else {"later_decay"} if "later" in form else set()
    chosen = operator.angles if "angles" in form else operator.linear
    if not fields <= set(chosen.tensors):
        pytest.skip(f"{name} does not take {', '.join(sorted(fields))}")
    return chosen, forward_arguments(chosen, dtype=dtype, **OPERATOR_FORMS[form])


@pytest.mark.parametrize("form", OPERATOR_FORMS)
@pytest.mark.parametrize("name", ("torch", NATIVE))
def test_opcheck(name, form):
    operator, arguments = operator_and_arguments(name, form)
    dynamic = "absorb" not in form and "read" not in form
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dynamic:
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.forward_op, arguments, test_utils=tests)


@pytest.mark.parametrize("form", ("causal", "decay", "decay of later keys", "packed", "all", "angles"))
@pytest.mark.parametrize("name", ("torch", NATIVE))
def test_opcheck_backward(name, form):
    operator, arguments = operator_and_arguments(name, form)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    results = operator.forward_op(*arguments)
    gradients, tensors = [torch.rand_like(t) for t in results[:3]], len(operator.tensors)
    torch.library.opcheck(
        operator.backward_op,
        (*arguments[:tensors], *results, *gradients, *arguments[tensors:]),
        test_utils=("test_schema", "test_faketensor"),
    )


def linear(case):
    x = case.leaves

    def run(*tensors):
        y = dict(zip((n for n, t in x.items() if t is not None), tensors, strict=True))
        state = LinearState(y["kv"], y["z"], y.get("state_decay")) if "kv" in y else None
        result = linear_attention(
            y["q"], y["k"], y["v"], y.get("q_factors"), y.get("k_factors"), visible=case.visible,
            key_mask=case.key_mask, q_angles=y.get("q_angles"), k_angles=y.get("k_angles"),
            log_decay=y.get("log_decay"), initial_state=state, return_state=True, **case.cu,
        )  # fmt: skip
        return (result.output, *(t for t in result.state if t is not None))

    return run, [t for t in x.values() if t is not None]


def assert_compiled_equals_eager(run, tensors, **options):
    def results(function):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        loss = sum(o.square().sum() for o in outputs)
        return [o.detach() for o in outputs], torch.autograd.grad(loss, leaves)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, **options)
    for got, expected in zip(results(compiled), results(run), strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_near(a, b, 1e-12 if a.dtype == torch.float64 else 1e-5)
    with torch.no_grad():
        for a, b in zip(compiled(*tensors), run(*tensors), strict=True):
            assert_near(a, b, 1e-12 if a.dtype == torch.float64 else 1e-5)


COMPILED_FORMS = {
    "causal": ("causal", {"R": 2, "state": True, "mask": True}),
    "decay": ("causal", {"R": 2, "decay": True, "state": True, "H": 4, "G": 2}),
    "angles": ("causal", {"angles": 2, "state": True, "mask": True}),
    "two-sided": ("all", {"R": 2, "decay": True, "state": True, "H": 4, "G": 2}),
    "two-sided blocks": ("blocks", {"decay": True}),
    "two-sided, packed": ("blocks", {"decay": True, "lengths": [3, 0, 4]}),
    "all": ("all", {"S": 9}),
    "staircase": ("wait-k", {"S": 9, "R": 2}),
    "staircase per sample": ("per sample", {"S": 9}),
    "tensor": ("tensor", {"S": 9}),
    "packed": ("blocks", {"lengths": [3, 0, 4]}),
}


@pytest.mark.parametrize("form", COMPILED_FORMS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_compile_traces_whole(dtype, form):
    """In float64 and float32, which "auto" gives to different implementations."""
    visible, options = COMPILED_FORMS[form]
    assert_compiled_equals_eager(*linear(make_case(visible, **options).to(dtype)), backend="aot_eager")


def leap_call():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def run(q, k, v, w1, b1, w2, b2, k2, c2):
        leaps = LeapWeights(w1, b1, w2, b2), LeapWeights(None, None, k2, c2)
        result = leap_attention(q, k, v, *leaps, visible="causal", return_state=True)
        return result.output, result.state.kv, result.state.z

    shapes = ((2, 9, 2, 4),) * 3 + ((1, 3, 4), (1, 3), (1, 3), (1,), (2, 4), (2,))
    return run, [random(*shape) for shape in shapes]


def test_compile_traces_leap_attention_whole():
    assert_compiled_equals_eager(*leap_call(), backend="aot_eager")


@pytest.mark.requires_tool("c++ compiler")
def test_compile_with_the_default_backend():
    assert_compiled_equals_eager(*leap_call())


def test_compile_with_dynamic_length():
    """One graph for every length from then on."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    run = torch.compile(lambda q: linear_attention(q, q, q, visible="causal").output, fullgraph=True, backend=backend,
                        dynamic=True)  # fmt: skip
    for length in (5, 70, 129):
        q = torch.rand(2, length, 2, 3)
        assert_near(run(q), linear_attention(q, q, q, visible="causal").output, 1e-6)
    assert len(graphs) == 1


def test_compile_traces_linear_state_whole():
    def run(k, v):
        end, blocks = linear_state(k, v), linear_state(k, v, every=4)
        return end.kv, end.z, blocks.kv, blocks.z

    assert_compiled_equals_eager(run, [torch.rand(2, 9, 2, 3), torch.rand(2, 9, 2, 4)], backend="aot_eager")


class Attend(torch.nn.Module):
    """What somebody exports: causal attention with factors that resumes from a state and returns the next."""

    def __init__(self, visible):
        super().__init__()
        self.visible = visible

    def forward(self, q, k, v, kv, z):
        result = linear_attention(
            q, k, v, q[..., :2], k[..., :2], visible=self.visible, initial_state=LinearState(kv, z), return_state=True
        )
        return result.output, result.state.kv, result.state.z


@pytest.mark.parametrize("visible", ("causal", "all", Staircase.blocks(4)))
def test_export_with_dynamic_length(visible):
    def inputs(length):
        return (*torch.rand(3, 2, length, 2, 3), torch.rand(2, 2, 2, 3, 3), torch.rand(2, 2, 2, 3))

    length = {1: torch.export.Dim("length", min=2, max=4096)}
    program = torch.export.export(Attend(visible), inputs(10), dynamic_shapes=(length, length, length, None, None))
    for steps in (2, 10, 65):
        arguments = inputs(steps)
        for a, b in zip(program.module()(*arguments), Attend(visible)(*arguments), strict=True):
            assert_near(a, b, 1e-6)
