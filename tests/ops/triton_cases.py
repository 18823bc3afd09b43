"""What the Triton kernels are compared on. As a program: runs every case in Triton's interpreter, prints errors as
JSON.

A process of its own, because Triton decides at import whether its functions are interpreted:

    TRITON_INTERPRET=1 python -m tests.ops.triton_cases
"""

from __future__ import annotations

import json
import random
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from leapformer.ops import LeapWeights, LinearState, Staircase, leap_attention, linear_attention
from leapformer.ops.api import _IMPLEMENTATIONS
from leapformer.ops.arguments import ANGLES, Arguments
from leapformer.ops.lowering import fit
from leapformer.ops.triton import OPERATOR
from tests.ops.oracle import Case, difference, largest, make_case, results_and_gradients

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF = float("inf")
Errors = dict[str, tuple[float, float]]

# Chunks are of 16 tokens here and segments of 32: lengths above 32 go through all of it.
SMALL = {"B": 1, "H": 1}
BLOCKS = (3, 5, 5, 2)
FORMS: dict[str, tuple[str | tuple[int, int, int, int], torch.dtype, dict]] = {
    "plain": ("causal", F32, {"T": 41, **SMALL}),
    "bfloat16": ("causal", BF16, {"T": 41, "R": 2, **SMALL}),
    "float16": ("causal", F16, {"T": 21, "R": 2, "K": 16, **SMALL}),
    "grouped heads": ("causal", F32, {"T": 20, "B": 1, "H": 4, "G": 2, "R": 2}),
    "rank 3, shared factors": ("causal", BF16, {"T": 20, "B": 1, "H": 2, "G": 1, "R": 3, "factor_heads": False}),
    "mask and state": ("causal", F32, {"T": 36, "B": 2, "H": 1, "R": 2, "mask": True, "state": True}),
    "numerator": ("causal", F32, {"T": 20, "normalize": False, "state": True, **SMALL}),
    "relu": ("causal", F32, {"T": 36, "R": 2, "relu": True, "mask": True, "decay": True, **SMALL}),
    "relu, without factors": ("all", BF16, {"T": 20, "S": 35, "relu": True, "B": 1, "H": 2, "G": 1}),
    "clamped": ("causal", F32, {"T": 20, "eps": 2.0, **SMALL}),
    "wide": ("causal", F32, {"T": 17, "K": 33, "V": 40, "R": 2, **SMALL}),
    "wide, rank 3": ("causal", F32, {"T": 17, "K": 17, "V": 20, "R": 3, **SMALL}),
    "packed": ("causal", F32, {"lengths": [3, 0, 35, 1], "H": 1, "R": 2, "state": True}),
    "decay": ("causal", F32, {"T": 41, "decay": True, "R": 2, "mask": True, "state": True, **SMALL}),
    "decay, grouped": ("causal", BF16, {"T": 18, "decay": True, "B": 1, "H": 2, "G": 1, "R": 2}),
    "decay, packed": ("causal", F32, {"lengths": [18, 0, 3], "decay": True, "H": 1, "state": True}),
    "decay, numerator": ("causal", F32, {"T": 18, "decay": True, "normalize": False, **SMALL}),
    "decay, resets": (
        "causal",
        F32,
        {"T": 70, "decay": True, "R": 2, "state": True, "strong": (-INF, -1e30, -1e6, -90.0), **SMALL},
    ),
    "decay, resets, packed": (
        "causal",
        BF16,
        {"lengths": [18, 0, 35], "decay": True, "H": 1, "state": True, "strong": (-INF, -1e30)},
    ),
    "packed, keys otherwise": ("causal", F32, {"lengths": [18, 0, 20], "key_lengths": [3, 2, 33], "H": 1, "R": 2}),
    "all": ("all", BF16, {"T": 21, "S": 37, "B": 1, "H": 2, "G": 1, "R": 2, "mask": True, "state": True}),
    "all, packed": ("all", F32, {"lengths": [3, 0, 18], "key_lengths": [34, 2, 0], "H": 1, "R": 2}),
    "no keys": ("all", F32, {"T": 3, "S": 0, "state": True, **SMALL}),
    "no queries": ("all", F32, {"T": 0, "S": 3, **SMALL}),
    "blocks": ("blocks", F32, {"T": 37, "S": 39, "R": 2, **SMALL}),
    "wait-k": ("wait-k", BF16, {"T": 21, "S": 53, "R": 2, "state": True, "mask": True, **SMALL}),
    "late, grouped": ("late", F32, {"T": 37, "S": 30, "B": 1, "H": 2, "G": 1}),
    "per sample": ("per sample", F32, {"T": 20, "S": 37, "B": 2, "H": 1, "R": 2}),
    "tensor": ("tensor", F32, {"T": 37, "S": 41, "B": 2, "H": 1}),
    "blocks, packed": ("blocks", F32, {"lengths": [3, 0, 35], "key_lengths": [20, 2, 18], "H": 1, "state": True}),
    "angles": ("causal", F32, {"T": 36, "B": 2, "H": 1, "angles": 2, "mask": True, "state": True}),
    "angles, shared": ("wait-k", BF16, {"T": 20, "B": 1, "H": 2, "G": 1, "angles": 1, "factor_heads": False}),
    "angles of all sizes": (
        "all",
        F32,
        {"T": 20, "angles": 4, "normalize": False, "sizes": (1e-9, -1.0, -1e5, 1e9), **SMALL},
    ),
    "two-sided": ("all", F32, {"T": 70, "decay": True, "R": 2, "mask": True, "state": True, **SMALL}),
    "two-sided, blocks": (BLOCKS, BF16, {"T": 41, "decay": True, "B": 1, "H": 2, "G": 1, "angles": 1, "mask": True}),
    "two-sided, numerator": ("all", F32, {"T": 36, "decay": True, "normalize": False, "relu": True, **SMALL}),
    "two-sided, wide": ("all", F32, {"T": 36, "decay": True, "K": 33, "V": 40, "angles": 1, **SMALL}),
    "two-sided, resets, packed": (
        BLOCKS,
        F32,
        {"lengths": [18, 0, 35, 1], "decay": True, "R": 2, "H": 1, "state": True, "strong": (-INF, -1e30)},
    ),
}


def random_form(seed: int) -> tuple[str, torch.dtype, dict]:
    """Shapes, visibility, masks and dtype by chance. A factor of rank 1 cancels in the output: its gradient is
    noise.
    """
    chance = random.Random(seed)
    visible = chance.choice(("all", "causal", "causal", "blocks", "wait-k", "negative phase", "per sample", "tensor"))
    G = chance.choice((1, 1, 2))
    form = {
        "B": chance.choice((1, 2)),
        "H": G * chance.choice((1, 1, 2)),
        "G": G,
        "T": chance.randint(1, 40),
        "K": chance.randint(1, 20),
        "V": chance.randint(1, 20),
        "R": chance.choice((0, 2, 3)),
        "mask": chance.random() < 0.5,
        "state": chance.random() < 0.5,
        "factor_heads": chance.random() < 0.7,
        "seed": seed,
    }
    if visible == "causal":
        form["decay"] = chance.random() < 0.5
    else:
        form["S"] = chance.randint(1, 50)
    if visible in ("all", "blocks") and chance.random() < 0.5:
        form |= {"S": None, "decay": True}
    if form["R"] == 2 and chance.random() < 0.5:
        form |= {"R": 0, "angles": 1}
    return visible, chance.choice((F32, F32, BF16)), form


SEEDS = range(6)


def relative(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result against its scale; infinite where a value is not finite."""
    errors = {}
    for name, right in expected.items():
        got = actual[name].double()
        assert got.shape == right.shape, f"{name}: {tuple(got.shape)}, expected {tuple(right.shape)}"
        errors[name] = difference(got, right) / max(1.0, largest(right)) if right.numel() else 0.0
    return errors


def compare(run: Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor]]], expected) -> Errors:
    """(error of triton, error of torch) of each output and gradient, against float64."""
    pairs = []
    for impl in ("triton", "torch"):
        results, gradients = run(impl)
        grads = {f"gradient of {n}": g for n, g in gradients.items()}
        pairs.append(relative(results | grads, expected[0] | {f"gradient of {n}": g for n, g in expected[1].items()}))
    return {name: (pairs[0][name], pairs[1][name]) for name in pairs[0]}


def linear(visible: str | tuple[int, int, int, int], dtype: torch.dtype, form: dict) -> Errors:
    """``linear_attention`` against the explicit formula of the same, rounded, numbers."""
    strong, sizes = form.get("strong", ()), form.get("sizes")  # decays that stand among the others, and of angles
    own = {name: value for name, value in form.items() if name not in ("strong", "sizes")}
    case = make_case(visible, **own).to(dtype)
    for i, value in enumerate(strong):
        case.leaves["log_decay"][:, 2 + 3 * i :: 17] = value
    if sizes is not None:
        case.leaves |= {name: case.leaves[name] * torch.tensor(sizes) for name in ("q_angles", "k_angles")}
    expected = results_and_gradients(case.to(torch.float64), Case.formula)
    return compare(lambda impl: results_and_gradients(case, lambda c: c.call(impl)), expected)


NAMES = {"decay": "causal", "two-sided": "all"}  # of what is seen with a decay
LEAPS = {
    "leap": {"T": 36, "H": 2, "G": 1, "per_head": False, "r": 3, "dtype": F32, "visible": "causal"},
    "leap of each head": {"T": 18, "H": 2, "G": 2, "per_head": True, "r": 3, "dtype": BF16, "visible": "causal"},
    "leap without hidden layer": {"T": 18, "H": 2, "G": 1, "per_head": True, "r": 0, "dtype": F32, "visible": "all"},
    "leap with staircase": {"T": 18, "H": 1, "G": 1, "per_head": False, "r": 3, "dtype": F32, "visible": "wait-k"},
    "leap with wide heads": {
        "T": 18,
        "H": 2,
        "G": 1,
        "per_head": True,
        "r": 17,
        "K": 18,
        "dtype": F32,
        "visible": "all",
    },
    "leap, saturated": {
        "T": 18,
        "H": 2,
        "G": 1,
        "per_head": True,
        "r": 3,
        "dtype": F32,
        "visible": "causal",
        "bias": 20.0,
    },
    "leap with decay": {"T": 18, "H": 2, "G": 1, "per_head": True, "r": 2, "dtype": F32, "visible": "decay"},
    "leap, two-sided": {"T": 36, "H": 1, "G": 1, "per_head": False, "r": 3, "dtype": F32, "visible": "two-sided"},
}


def leap(
    T: int, H: int, G: int, per_head: bool, r: int, dtype: torch.dtype, visible: str, K: int = 5, bias: float = 0.0
) -> Errors:
    """``leap_attention`` with its modules in the kernels, a mask, and the gradients of all weights."""
    generator = torch.Generator().manual_seed(0)

    def random_(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (x + 0.05 * x.sign()).to(dtype)  # away from 0, where relu has no derivative

    def weights(heads):
        n = heads if per_head else 1
        hidden = (random_(n, r, K), random_(n, r)) if r else (None, None)
        return [w if w is None else w.float() for w in (*hidden, random_(n, r or K), random_(n))]

    modules = weights(H), weights(G)
    modules[0][3] += bias  # P_q near 1 and P_k near 0
    modules[1][3] -= bias
    tensors = [random_(1, T, H, K), random_(1, T, G, K), random_(1, T, G, 6), *modules[0], *modules[1]]
    decay = -torch.rand(1, T, H, generator=generator) if visible in NAMES else None
    key_mask = torch.rand(1, T, generator=generator) > 0.3
    where = Staircase.wait_k(2, 1) if visible == "wait-k" else NAMES.get(visible, visible)
    probe = torch.randn(1, T, H, 6, generator=generator, dtype=torch.float64)

    def run(impl, dtype=None):
        x = [t if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in tensors]
        result = leap_attention(
            *x[:3],
            LeapWeights(*x[3:7]),
            LeapWeights(*x[7:]),
            visible=where,
            key_mask=key_mask,
            log_decay=decay,
            return_state=True,
            eps=1e-12 if bias else 0.1,
            impl=impl,
        )
        state = result.state
        loss = (result.output.double() * probe).sum() + state.kv.double().sum() + state.z.double().square().sum()
        leaves = {str(n): t for n, t in enumerate(x) if t is not None}
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"output": result.output.detach(), "kv": state.kv.detach()}, dict(zip(leaves, grads, strict=True))

    return compare(run, run("reference", torch.float64))


STEPS = {
    "step": {"dtype": F32, "H": 4, "G": 2, "R": 2, "decay": False, "leap": False},
    "step with decay": {"dtype": BF16, "H": 2, "G": 2, "R": 1, "decay": True, "leap": False},
    "step with leap": {"dtype": F32, "H": 2, "G": 1, "R": 2, "decay": False, "leap": True},
    "step with angles": {"dtype": F32, "H": 2, "G": 1, "R": 4, "decay": False, "leap": False, "angles": True},
}


def one_step(dtype: torch.dtype, H: int, G: int, R: int, decay: bool, leap: bool, angles: bool = False) -> Errors:
    """Three tokens one by one, the state updated in place."""
    weighting = {"angles": R // 2} if angles else {"R": 0 if R == 1 or leap else R}
    case = make_case("causal", T=3, B=2, H=H, G=G, K=5, V=20, decay=decay, **weighting).to(dtype)
    x = case.leaves
    weights = [torch.randn(1, *s, generator=torch.Generator().manual_seed(1)) for s in ((3, 5), (3,), (3,), ())]
    modules = LeapWeights(*weights)
    state = LinearState.zeros(2, G, 2 if leap else R, 5, 20, decay_heads=H if decay else None)
    outputs, names = [], ("q", "k", "v", "q_factors", "k_factors")
    attend = leap_attention if leap else linear_attention
    for t in range(3):
        at = {name: None if value is None else value[:, t : t + 1] for name, value in x.items()}
        y = (at["q"], at["k"], at["v"], modules, modules) if leap else [at[n] for n in names]
        options = {"visible": "causal", "log_decay": at["log_decay"], "impl": "triton"}
        if angles:
            options |= {name: at[name] for name in ANGLES}
        before, places = state.clone(), [s if s is None else s.data_ptr() for s in state]
        with torch.no_grad():
            updated = attend(*y, initial_state=state, update_state=True, **options)
            again = attend(*y, initial_state=before, return_state=True, **options)  # with a state of its own
        assert updated.state is state and places == [s if s is None else s.data_ptr() for s in state]
        outputs.append(updated.output)
        for a, b in zip((again.output, *again.state), (outputs[-1], *state), strict=True):
            assert a is b or torch.equal(a, b)
    got = {"output": torch.cat(outputs, 1), "kv": state.kv, "z": state.z}

    def whole(impl, dtype):
        y = {name: None if t is None else t.to(dtype) for name, t in x.items()}
        if leap:
            both = LeapWeights(*(w if dtype != torch.float64 else w.to(dtype) for w in weights))
            result = leap_attention(y["q"], y["k"], y["v"], both, both, visible="causal", return_state=True, impl=impl)
        else:
            result = linear_attention(
                y["q"],
                y["k"],
                y["v"],
                y["q_factors"],
                y["k_factors"],
                visible="causal",
                q_angles=y["q_angles"],
                k_angles=y["k_angles"],
                log_decay=y["log_decay"],
                return_state=True,
                impl=impl,
            )
        return {"output": result.output, "kv": result.state.kv, "z": result.state.z}

    expected = whole("reference", torch.float64)
    triton, torch_ = relative(got, expected), relative(whole("torch", dtype), expected)
    return {name: (triton[name], torch_[name]) for name in expected}


def separate_decays() -> Errors:
    """A decay to later queries and another to earlier ones, as no door gives them: gradients of both."""
    case = make_case("causal", T=36, B=1, H=1, decay=True, angles=1, mask=True, state=True)
    decay = case.leaves["log_decay"]
    x = {n: t for n, t in case.leaves.items() if t is not None and n != "state_decay"} | {"later_decay": decay.flip(1)}

    def run(impl, dtype=F32):
        given = {n: t.to(dtype).requires_grad_() for n, t in x.items()}
        implementation = _IMPLEMENTATIONS[impl]
        arguments = Arguments(**given, key_mask=case.key_mask, causal=True)
        output, kv, z = implementation.attend(fit(arguments, False, implementation.takes_angles), False)
        loss = sum((t.double() * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (output, kv, z))
        gradients = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
        return {"output": output.detach(), "kv": kv.detach(), "z": z.detach()}, gradients

    return compare(run, run("reference", torch.float64))


def negated() -> Errors:
    """Lazily negated views, whose bytes have the other sign, without gradients: nothing resolves them on the way."""
    case = make_case("causal", T=20, B=1, H=1, R=2).to(F32)
    expected = {"output": case.to(torch.float64).formula()[0]}

    def run(impl):
        leaves = {
            n: None if t is None else torch.complex(torch.zeros_like(t), -t).conj().imag for n, t in case.leaves.items()
        }
        with torch.no_grad():
            return {"output": Case(leaves, case.visible, case.counts, case.spans).call(impl).output}, {}

    return compare(run, (expected, {}))


def operator() -> Errors:
    """torch's own checks of the operator; raises where one fails."""
    case = make_case("causal", T=3, B=1, H=1, R=2, state=True).to(F32)
    given = {name: t.requires_grad_() for name, t in case.leaves.items() if t is not None}
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        OPERATOR.linear.forward_op, OPERATOR.linear.given(Arguments(**given, causal=True)), test_utils=checks
    )
    return {}


CASES: dict[str, Callable[[], Errors]] = {
    **{name: (lambda form=form: linear(*form)) for name, form in FORMS.items()},
    **{f"random {seed}": (lambda seed=seed: linear(*random_form(seed))) for seed in SEEDS},
    **{name: (lambda form=form: leap(**form)) for name, form in LEAPS.items()},
    **{name: (lambda form=form: one_step(**form)) for name, form in STEPS.items()},
    "separate decays": separate_decays,
    "negated views": negated,
    "operator": operator,
}


def dtype_of(name: str) -> torch.dtype:
    """The dtype whose tolerance a case has."""
    if name in FORMS:
        return FORMS[name][1]
    if name.startswith("random"):
        return random_form(int(name.split()[1]))[1]
    return (LEAPS | STEPS).get(name, {"dtype": F32})["dtype"]


def main(names: list[str]) -> None:
    import tests.ops.triton_interpreter  # noqa: F401

    torch.set_num_threads(1)
    # Every torch.empty is NaN, so that what a kernel leaves out shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    for name in names or CASES:
        try:
            result: object = CASES[name]()
        except Exception:
            result = traceback.format_exc()[-3000:]
        print(json.dumps({name: result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
