"""Decay where later keys are seen too: visible="all", or blocks and all before them."""

import math

import pytest
import torch

from leapformer.ops import LeapWeights, Staircase, leap_attention
from tests.ops.oracle import Case, assert_near, attend, check, check_low, make_case, needs, results_and_gradients, takes

INF = float("inf")
FIELD = "later_decay"
BLOCKS = {
    "all": "all",
    "blocks of 1": (1, 1, 1, 0),
    "blocks of 5": (5, 5, 5, 0),
    "blocks of 5 from 2 on": (3, 5, 5, 2),
    "blocks of 5 from -3 on": (8, 5, 5, -3),
    "blocks of 5 from 9 on": (-4, 5, 5, 9),
    "blocks of 64": (64, 64, 64, 0),
    "blocks of 70": (70, 70, 70, 0),
    "blocks of 70 from 30 on": (40, 70, 70, 30),
}
FEW = ("all", "blocks of 5 from 2 on", "blocks of 70 from 30 on")
FORMS = {
    "plain": {"T": 70, "B": 1, "H": 1},
    "grouped heads": {"H": 4, "G": 2, "R": 2},
    "one key head, shared factors": {"H": 3, "G": 1, "R": 3, "factor_heads": False},
    "angles": {"T": 70, "H": 2, "G": 1, "angles": 2, "K": 2, "mask": True},
    "mask": {"T": 70, "H": 1, "mask": True, "R": 2},
    "state": {"T": 70, "H": 2, "G": 1, "R": 2, "K": 2, "V": 2, "state": True},
    "numerator": {"T": 70, "H": 1, "normalize": False, "state": True},
    "large eps": {"eps": 2.0, "state": True},
    "relu": {"T": 70, "H": 1, "relu": True, "eps": 0.1, "mask": True},
    "packed": {"lengths": [3, 0, 70, 1], "H": 1, "R": 2, "K": 2, "V": 2},
    "packed and masked": {"lengths": [4, 1, 65, 64], "H": 2, "G": 1, "K": 2, "V": 2, "mask": True, "state": True},
    "everything": {"T": 130, "mask": True, "state": True, "R": 2, "H": 4, "G": 2, "K": 2, "V": 5, "eps": 0.1},
}


@pytest.fixture
def impl(impl):
    needs(impl, FIELD)
    return impl


@pytest.fixture
def float64_impl(float64_impl):
    needs(float64_impl, FIELD)
    return float64_impl


def two_sided(visible, **form) -> Case:
    return make_case(BLOCKS[visible], decay=True, **form)


def double_loop(q, k, v, log_decay, g, kv, z, normalize):
    """One head: q, k [T, K], v [T, V], log_decay [T], numbers g of keys seen, kv [K, V] and z [K] of the past."""
    outputs, none = [], torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        past = log_decay[: i + 1].sum().exp()
        numerator, normaliser = past * (q[i] @ kv), past * (q[i] @ z)
        for j in range(g[i]):
            between = sum((log_decay[t] for t in (range(j + 1, i + 1) if j <= i else range(i, j))), none)
            weight = (q[i] @ k[j]) * between.exp()
            numerator, normaliser = numerator + weight * v[j], normaliser + weight
        outputs.append(numerator / normaliser.clamp(min=1e-6) if normalize else numerator)
    for j in range(len(k)):
        kv, z = log_decay[j].exp() * kv + k[j, :, None] * v[j], log_decay[j].exp() * z + k[j]
    return torch.stack(outputs), kv, z


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("visible", ("all", "blocks of 5", "blocks of 5 from 2 on", "blocks of 5 from -3 on"))
def test_reference_is_the_definition(visible, normalize):
    case = two_sided(visible, T=9, B=1, H=1, state=True, normalize=normalize)

    def definition(c):
        x = {name: None if t is None else t[0] for name, t in c.leaves.items()}
        q, k, v, log_decay = (x[name][:, 0] for name in ("q", "k", "v", "log_decay"))
        output, kv, z = double_loop(q, k, v, log_decay, c.counts[0], x["kv"][0, 0], x["z"][0, 0], normalize)
        total = (x["state_decay"] + log_decay.sum())[None]
        return output[None, :, None], kv[None, None, None], z[None, None, None], total

    expected, expected_gradients = results_and_gradients(case, definition)
    for run in (lambda c: c.call("reference"), Case.formula):  # the formula too, with which the others are compared
        found, gradients = results_and_gradients(case, run)
        for name, t in expected.items():
            assert_near(found[name], t, name=name)
        for name, t in expected_gradients.items():
            assert_near(gradients[name], t, name=f"gradient of {name}")


@pytest.mark.parametrize("visible", BLOCKS)
@pytest.mark.parametrize("form", ("plain", "everything", "packed and masked"))
def test_blocks(form, visible, impl):
    check(two_sided(visible, **FORMS[form]), impl)


@pytest.mark.parametrize("visible", FEW)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_state_and_gradients(form, visible, impl, poisoned_memory):
    check(two_sided(visible, **FORMS[form]), impl)


@pytest.mark.parametrize("length", (0, 1, 2, 63, 64, 65, 100, 200))
@pytest.mark.parametrize("visible", FEW)
def test_lengths(visible, length, impl, poisoned_memory):
    check(two_sided(visible, T=length, B=1, H=1, K=2, V=2, R=2, state=True), impl)


def test_more_than_one_block_of_chunks(impl):
    """Beyond what any implementation takes at once: states go from one stretch of the sequence to the next."""
    case = two_sided("all", T=1200, B=1, H=2, K=1, V=1, state=True, mask=True)
    case.leaves["log_decay"] = case.leaves["log_decay"] / 100
    if impl == "native":
        return check_low(case.away_from_zero().to(torch.float32), impl, formula=lambda c: c.call("reference"))
    expected, expected_gradients = results_and_gradients(case, lambda c: c.call("reference"))
    found, gradients = results_and_gradients(case, lambda c: c.call(impl))
    for name, t in expected.items():
        assert_near(found[name], t, name=name)
    for name, t in expected_gradients.items():
        assert_near(gradients[name], t, name=f"gradient of {name}")


@pytest.mark.parametrize("visible", ("all", "blocks of 5", "blocks of 64", "blocks of 70 from 30 on"))
def test_packed_over_many_chunks(visible, impl):
    """Blocks count from the start of each sequence."""
    check(two_sided(visible, lengths=[70, 0, 1, 64, 130], H=1, K=2, V=2, state=True), impl)


@pytest.mark.parametrize("visible", FEW)
def test_all_sequences_empty(visible, impl):
    check(two_sided(visible, lengths=[0, 0], state=True), impl)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("visible", FEW)
def test_garbage_in_masked_slots_is_never_read(visible, packed, impl):
    options = {"lengths": [40, 0, 90]} if packed else {"T": 100}
    case = two_sided(visible, H=2, G=1, K=2, V=2, R=2, mask=True, state=True, **options)
    for name in ("k", "v", "k_factors"):
        case.leaves[name][~case.key_mask] = math.nan
    check(case, impl)


PATTERNS = {  # of the decays that stand among the others, and how often
    "one reset": ([-INF], 0.02),
    "many resets": ([-INF], 0.5),
    "all resets": ([-INF], 1.0),
    "very strong": ([-1e30], 0.1),
    "all sizes": ([-INF, -1e30, -1e6, -150.0, -99.0, -50.0, 0.0], 0.7),
    "none": ([0.0], 1.0),
    "weak": ([-1e-9], 1.0),
    "strong": ([-1e4], 1.0),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("visible", FEW)
def test_strong_decays_are_exact(visible, pattern, impl):
    for form in ({"T": 130, "state": True, "mask": True}, {"lengths": [65, 0, 5]}):
        case = two_sided(visible, H=2, K=2, V=2, **form)
        decay, (values, share) = case.leaves["log_decay"], PATTERNS[pattern]
        generator = torch.Generator().manual_seed(5)
        where = torch.rand(decay.shape, generator=generator) < share
        picked = torch.tensor(values, dtype=decay.dtype)[torch.randint(len(values), decay.shape, generator=generator)]
        case.leaves["log_decay"] = torch.where(where, picked, decay)
        check(case, impl)


@pytest.mark.parametrize("value", (-INF, -1e30))
def test_nothing_passes_a_reset(value, impl):
    """Token 70 sees itself alone, and both sides see it as a key; neither sees the other, nor has gradients to it."""
    case = two_sided("all", T=100, B=1, H=1)
    case.leaves["log_decay"][:, 70] = value
    x = {name: None if t is None else t.requires_grad_() for name, t in case.leaves.items()}
    output = case.call(impl).output

    def alone(part):
        q, k, v, log_decay = (x[name][:, part] for name in ("q", "k", "v", "log_decay"))
        return attend(q, k, v, log_decay=log_decay, impl=impl).output

    assert_near(output[:, 70], x["v"][:, 70])
    assert_near(output[:, :70], alone(slice(0, 71))[:, :70])
    assert_near(output[:, 71:], alone(slice(70, 100))[:, 1:])
    leaves = [x[name] for name in ("k", "v", "log_decay")]
    for own, other in ((slice(0, 70), slice(71, 100)), (slice(71, 100), slice(0, 70))):
        gradients = torch.autograd.grad(output[:, own].square().sum(), leaves, retain_graph=True)
        for gradient in gradients:
            assert gradient.isfinite().all() and gradient[:, own].ne(0).any()
            assert_near(gradient[:, other], torch.zeros_like(gradient[:, other]))
        assert gradients[2][:, 70].eq(0).all()


@pytest.mark.parametrize("visible, last", (("all", 100), ("blocks of 5", 45), ("blocks of 70 from 30 on", 40)))
def test_no_gradient_to_unseen_keys(visible, last, impl):
    """Exactly zero, not small: for keys and values, and for the decay from the last seen key on."""
    case = two_sided(visible, T=100, B=1, H=1)
    x = {name: None if t is None else t.requires_grad_() for name, t in case.leaves.items()}
    query = {100: 40, 45: 40, 40: 35}[last]
    loss = case.call(impl).output[:, query].square().sum()
    of_k, of_v, of_decay = torch.autograd.grad(loss, [x[name] for name in ("k", "v", "log_decay")])
    for gradient in (of_k, of_v):
        assert gradient[:, last:].eq(0).all() and gradient[:, query:last].ne(0).any()
    assert_near(of_decay[:, last - 1 :], torch.zeros_like(of_decay[:, last - 1 :]), 1e-14)
    assert of_decay[:, query : last - 1].ne(0).any()


@pytest.mark.parametrize("ends", ((5,), (65, 70), (1, 35, 36, 100)))
def test_split_at_block_ends_and_resume(ends, impl):
    """Blocks of 5: the state is that of the past alone, so each part goes on from it."""
    case = two_sided("blocks of 5", T=130, B=2, H=2, G=1, K=2, V=2, R=2, mask=True)
    case.leaves["log_decay"][:, 64] = -INF
    whole, outputs, state, start = case.call(impl), [], None, 0
    for stop in (*sorted({5 * round(end / 5) or 5 for end in ends}), 130):
        x = {name: None if t is None else t[:, start:stop] for name, t in case.leaves.items()}
        output, state = attend(
            *(x[name] for name in ("q", "k", "v", "q_factors", "k_factors")),
            visible=Staircase.blocks(5),
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
    assert_near(state.z, whole.state.z)
    assert torch.equal(state.log_decay.isfinite(), whole.state.log_decay.isfinite())


def test_states_are_those_of_causal_attention(impl):
    for visible in FEW:
        case = two_sided(visible, T=130, H=2, K=2, V=2, R=2, state=True, mask=True)
        state = case.call(impl).state
        case.visible = "causal"
        for name, found, expected in zip(("kv", "z", "log_decay"), state, case.call(impl).state, strict=True):
            assert_near(found, expected, 1e-12, name)


def test_without_any_decay_it_is_attention_to_all(impl):
    case = two_sided("all", T=100, H=2, G=1, R=2, mask=True)
    x = case.leaves
    x["log_decay"] = torch.zeros_like(x["log_decay"])
    plain = attend(*(x[n] for n in ("q", "k", "v", "q_factors", "k_factors")), key_mask=case.key_mask, impl=impl)
    assert_near(case.call(impl).output, plain.output)


def test_updated_state(impl):
    case = two_sided("blocks of 5", T=100, H=2, K=2, V=2, state=True)
    whole = case.call(impl)
    before = [case.leaves[name] for name in ("kv", "z", "state_decay")]
    kept = [t.clone().float() if impl == "native" else t.clone() for t in before]
    with torch.no_grad():
        output, state = attend(
            *(case.leaves[name] for name in "qkv"),
            visible=case.visible,
            log_decay=case.leaves["log_decay"],
            initial_state=kept,
            return_state=True,
            update_state=True,
            impl=impl,
        )
    assert_near(output, whole.output)
    for own, found, expected in zip(kept, state, whole.state, strict=True):
        assert own is found
        assert_near(found, expected)


@pytest.mark.parametrize("used", ("output", "kv", "z"))
def test_gradient_through_one_result_alone(used, impl):
    case = two_sided("all", T=70, R=2)
    named = {name: t for name, t in case.leaves.items() if t is not None}

    def gradients(which):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in named.items()}
        output, state = attend(
            *(leaves[n] for n in ("q", "k", "v", "q_factors", "k_factors")),
            log_decay=leaves["log_decay"],
            impl=which,
            return_state=True,
        )
        result = {"output": output, "kv": state.kv, "z": state.z}[used]
        return torch.autograd.grad(result.square().sum(), list(leaves.values()), allow_unused=True)

    for (name, t), found, expected in zip(named.items(), gradients(impl), gradients("reference"), strict=True):
        found, expected = (torch.zeros_like(t) if g is None else g for g in (found, expected))
        assert_near(found, expected, name=name)


@pytest.mark.parametrize("visible", ("all", "blocks of 5 from 2 on"))
def test_gradcheck(visible, float64_impl):
    case = two_sided(visible, T=6, B=1, H=2, G=1, K=2, V=2, R=2, state=True)
    names = [name for name, t in case.leaves.items() if t is not None]

    def run(*tensors):
        leaves = dict.fromkeys(case.leaves) | dict(zip(names, tensors, strict=True))
        result = Case(leaves, case.visible, case.counts, case.spans).call(float64_impl)
        return result.output, *result.state

    assert torch.autograd.gradcheck(run, tuple(case.leaves[name].requires_grad_() for name in names))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", ("mask", "everything", "packed"))
@pytest.mark.parametrize("visible", FEW)
def test_below_float64(visible, form, dtype, impl):
    if takes(impl, dtype):
        check_low(two_sided(visible, **FORMS[form]).away_from_zero().to(dtype), impl)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("value", (-1e6, -1e30, -INF))
def test_what_stands_behind_a_strong_decay_keeps_its_precision(value, dtype, impl):
    if not takes(impl, dtype):
        return
    case = two_sided("all", T=100, H=1, B=1).away_from_zero().to(dtype)
    decay = case.leaves["log_decay"].float()  # else its small steps are rounded
    case.leaves["log_decay"] = decay.masked_fill(torch.rand(decay.shape, generator=seeded()) < 0.1, value)
    exact, exact_gradients = results_and_gradients(case.to(torch.float64), Case.formula)
    found, gradients = results_and_gradients(case, lambda c: c.call(impl))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, expected in exact.items():
        if name != "decay":
            assert_near(found[name], expected, tolerance, name)
    for name, expected in exact_gradients.items():
        assert_near(gradients[name], expected, tolerance, f"gradient of {name}")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("hidden", (False, True))
@pytest.mark.parametrize("visible", FEW)
def test_leap_modules(visible, hidden, impl):
    """Output, state and gradients of the modules' weights too, against the reference in float64."""
    B, T, H, G, K, V, r = 2, 70, 4, 2, 3, 2, 2
    generator = seeded()

    def signed(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def module(heads):
        return [signed(heads, r, K), signed(heads, r), signed(heads, r), signed(heads)] if hidden else [
            None, None, signed(heads, K), signed(heads)]  # fmt: skip

    given = [signed(B, T, H, K), signed(B, T, G, K), signed(B, T, G, V), *module(H), *module(1), -signed(B, T, H).abs()]
    mask = torch.rand(B, T, generator=generator) > 0.3
    probe = signed(B, T, H, V)

    def results(which):
        dtype = torch.float32 if which == "native" else torch.float64
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in given]
        q, k, v, *weights, log_decay = leaves
        output, state = leap_attention(
            q, k, v, LeapWeights(*weights[:4]), LeapWeights(*weights[4:]), visible=two_sided(visible).visible, eps=0.1,
            key_mask=mask, log_decay=log_decay, return_state=True, impl=which,
        )  # fmt: skip
        loss = (output * probe).sum() + state.kv.sum() + state.z.sum()
        return [output, *state, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]

    for number, (found, expected) in enumerate(zip(results(impl), results("reference"), strict=True)):
        assert_near(found, expected, name=f"result {number}")
