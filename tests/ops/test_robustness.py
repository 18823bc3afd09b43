"""Padding, empty rows, garbage in masked slots, strides, dtypes, autocast, memory: where kernels usually break."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.profiler import profile

from leapformer.ops import LinearState, Staircase, blocking, linear_state
from tests.ops.oracle import (
    VISIBILITIES,
    Case,
    assert_near,
    attend,
    check,
    check_low,
    make_case,
    results_and_gradients,
    takes,
)

LOW = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("decay", (False, True))
def test_padding_equals_the_sample_alone(decay, impl):
    """A shorter sample, padded on the right, gives the outputs and the state that it gives alone."""
    case = make_case("causal", T=70, B=3, R=2, decay=decay)
    lengths = (70, 41, 1)
    case.key_mask = torch.arange(70)[None] < torch.tensor(lengths)[:, None]
    if decay:
        case.leaves["log_decay"] = case.leaves["log_decay"] * case.key_mask[..., None]
    padded = case.call(impl)
    for b, n in enumerate(lengths):
        x = {name: None if t is None else t[b : b + 1, :n] for name, t in case.leaves.items()}
        alone = attend(
            x["q"], x["k"], x["v"], x["q_factors"], x["k_factors"], visible="causal", log_decay=x["log_decay"],
            return_state=True, impl=impl,
        )  # fmt: skip
        assert_near(padded.output[b : b + 1, :n], alone.output)
        assert_near(padded.state.kv[b : b + 1], alone.state.kv)
        assert_near(padded.state.z[b : b + 1], alone.state.z)


def test_left_padding_equals_the_sample_alone(impl):
    case = make_case("causal", T=20, B=2, R=2)
    case.key_mask = torch.arange(20)[None] >= torch.tensor([[0], [13]])
    padded = case.call(impl).output
    x = {name: None if t is None else t[1:, 13:] for name, t in case.leaves.items()}
    alone = attend(x["q"], x["k"], x["v"], x["q_factors"], x["k_factors"], visible="causal", impl=impl)
    assert_near(padded[1:, 13:], alone.output)
    assert padded[1, :13].eq(0).all()


@pytest.mark.parametrize("visible", VISIBILITIES)
def test_a_sample_does_not_depend_on_its_batch(visible, impl):
    case = make_case(visible, T=66, B=3, R=2, mask=True)
    together = case.call(impl).output
    staircase = isinstance(case.visible, Staircase)
    for b in range(3):
        x = {name: None if t is None else t[b : b + 1] for name, t in case.leaves.items()}
        if staircase:
            argument = Staircase(*(f[b : b + 1] if isinstance(f, torch.Tensor) else f for f in case.visible))
        else:
            argument = case.visible if isinstance(case.visible, str) else case.visible[b : b + 1]
        alone = attend(
            x["q"], x["k"], x["v"], x["q_factors"], x["k_factors"], visible=argument,
            key_mask=case.key_mask[b : b + 1], impl=impl,
        )  # fmt: skip
        assert_near(alone.output, together[b : b + 1], 1e-12)


def test_packed_sequences_behave_as_rows_of_their_own(impl):
    case = make_case("blocks", lengths=[5, 0, 9], R=2)
    whole = case.call(impl)
    for n, (_, queries, _) in enumerate(case.spans):
        x = {name: None if t is None else t[:, queries] for name, t in case.leaves.items()}
        alone = attend(
            x["q"], x["k"], x["v"], x["q_factors"], x["k_factors"], visible=case.visible, return_state=True, impl=impl
        )
        assert_near(whole.output[:, queries], alone.output)
        assert_near(whole.state.kv[n : n + 1], alone.state.kv)


@pytest.mark.parametrize("visible", ("all", "causal", "wait-k", "nothing"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_zero_queries_give_exactly_zero(visible, dtype, impl):
    if not takes(impl, dtype):
        return
    # The exact gradient of an all-zero query is that of numerator / eps: beyond float16 for the default eps.
    case = make_case(visible, T=70, H=1, R=2, eps=1e-3 if dtype == torch.float16 else 1e-6).to(dtype)
    case.leaves["q"][:, 10:20] = 0
    results, gradients = results_and_gradients(case, lambda c: c.call(impl))
    assert results["output"][:, 10:20].eq(0).all()
    assert all(t.isfinite().all() for t in (*results.values(), *gradients.values()))


@pytest.mark.parametrize("visible", ("all", "causal", "blocks", "tensor", "decay"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_fully_masked_samples_give_exactly_zero(visible, dtype, impl):
    if not takes(impl, dtype):
        return
    decay = visible == "decay"
    case = make_case("causal" if decay else visible, T=70, H=1, R=2, decay=decay).to(dtype)
    case.key_mask = torch.tensor([[False], [True]]).expand(2, 70)
    results, gradients = results_and_gradients(case, lambda c: c.call(impl))
    assert results["output"][0].eq(0).all() and results["kv"][0].eq(0).all() and results["z"][0].eq(0).all()
    assert all(t.isfinite().all() for t in (*results.values(), *gradients.values()))
    assert all(gradients[name][0].eq(0).all() for name in ("q", "k", "v"))


def test_unseen_query_gives_exactly_zero_even_with_a_tiny_eps(impl):
    case = make_case("late", T=12, eps=1e-30)
    output = case.call(impl).output
    for b, counts in enumerate(case.counts):
        unseen = [g == 0 for g in counts]
        assert any(unseen) and output[b][unseen].eq(0).all()


@pytest.mark.parametrize("garbage", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("form", ("all", "causal", "decay", "blocks", "packed"))
def test_garbage_in_masked_slots_is_never_read(form, garbage, impl):
    """NaN or infinity under the mask: results and gradients are those of any other values there."""
    visible = {"decay": "causal", "packed": "all"}.get(form, form)
    options = {"lengths": [40, 0, 30]} if form == "packed" else {"T": 70}
    clean = make_case(visible, H=2, G=1, R=2, mask=True, state=True, decay=form == "decay", **options)
    expected, expected_gradients = results_and_gradients(clean, Case.formula)
    for name in ("k", "v", "k_factors"):
        clean.leaves[name][~clean.key_mask] = garbage
    actual, gradients = results_and_gradients(clean, lambda c: c.call(impl))
    for name in expected:
        assert_near(actual[name], expected[name], name=name)
    for name in expected_gradients:
        assert_near(gradients[name], expected_gradients[name], name=f"gradient of {name}")


def test_linear_state_ignores_garbage_in_masked_slots():
    k, v = torch.rand(1, 9, 2, 3), torch.rand(1, 9, 2, 4)
    mask = torch.arange(9)[None] % 3 != 0
    clean = linear_state(k, v, key_mask=mask, every=4)
    dirty = [torch.where(mask[..., None, None], t, float("nan")) for t in (k, v)]
    assert torch.equal(linear_state(*dirty, key_mask=mask, every=4).kv, clean.kv)


def strided(t, how):
    """The same values, laid out otherwise."""
    if how == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "slice of a wider tensor":
        return torch.cat([t, t + 1], -1)[..., : t.shape[-1]]
    if how == "every other row":
        return torch.stack([t, t + 1], 2).flatten(1, 2)[:, ::2]
    offset = torch.empty(t.numel() + 1, dtype=t.dtype)
    offset[1:] = t.flatten()
    return offset[1:].view(t.shape)


@pytest.mark.parametrize("how", ("transposed", "slice of a wider tensor", "every other row", "misaligned"))
@pytest.mark.parametrize("decay", (False, True))
def test_strides_do_not_matter(how, decay, impl):
    case = make_case("causal", T=66, H=2, G=1, R=2, decay=decay)
    if impl == "native":
        case = case.to(torch.float32)
    expected = case.call(impl)
    for name, t in case.leaves.items():
        if t is not None:
            case.leaves[name] = strided(t, how)
            assert torch.equal(case.leaves[name], t)
    actual = case.call(impl)
    assert_near(actual.output, expected.output, 1e-13)
    assert_near(actual.state.kv, expected.state.kv, 1e-13)


def test_expanded_inputs(impl):
    """Stride 0 over the batch, the heads, or time: forward and backward, and an expanded gradient."""
    case = make_case("causal", T=66, H=2, R=2)
    for name, axis in (("q", 0), ("k", 2), ("v", 1), ("q_factors", 2), ("k_factors", 0)):
        t = case.leaves[name]
        case.leaves[name] = t.narrow(axis, 0, 1).expand_as(t)
    check(case, impl)
    q = case.leaves["q"].contiguous().requires_grad_()
    case.leaves["q"] = q
    (gradient,) = torch.autograd.grad(case.call(impl).output.sum(), q)
    (expected,) = torch.autograd.grad(case.formula()[0].sum(), q)
    assert_near(gradient, expected)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("decay", (False, True))
def test_dtypes(dtype, decay, impl):
    """Outputs and gradients in the dtype of the inputs, states in at least float32."""
    if not takes(impl, dtype):
        return
    wide = torch.promote_types(dtype, torch.float32)
    case = make_case("causal", T=66, R=2, decay=decay, state=True).to(dtype)
    for name in ("kv", "z", "state_decay"):
        case.leaves[name] = None if case.leaves[name] is None else case.leaves[name].to(wide)
    results, gradients = results_and_gradients(case, lambda c: c.call(impl))
    assert results.pop("output").dtype == dtype
    assert all(t.dtype == wide for t in results.values())
    assert all(g.dtype == case.leaves[name].dtype for name, g in gradients.items())
    assert linear_state(case.leaves["k"], case.leaves["v"]).kv.dtype == wide
    if dtype in (torch.bfloat16, torch.float16):
        for name in ("q_factors", "k_factors", "log_decay"):
            case.leaves[name] = None if case.leaves[name] is None else case.leaves[name].float()
        results, gradients = results_and_gradients(case, lambda c: c.call(impl))
        assert results["output"].dtype == dtype and gradients["q_factors"].dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("visible", ("all", "causal", "decay", "wait-k"))
def test_low_precision_error_is_that_of_the_reference(visible, dtype):
    """Error against float64 at most twice the reference's in the same dtype, plus 4 eps of the dtype."""
    decay = visible == "decay"
    case = make_case("causal" if decay else visible, T=130, B=1, K=8, V=8, R=2, decay=decay).to(dtype)
    exact, exact_gradients = results_and_gradients(case.to(torch.float64), Case.formula)
    reference, reference_gradients = results_and_gradients(case, lambda c: c.call("reference"))
    actual, gradients = results_and_gradients(case, lambda c: c.call("torch"))
    eps = torch.finfo(dtype).eps
    for name, expected in {**exact, **exact_gradients}.items():
        # A gradient is named as its input; no result shares a name with an input here.
        theirs = (reference | reference_gradients)[name].double()
        ours = (actual | gradients)[name].double()
        allowed = 2 * (theirs - expected).abs().max() + 4 * eps * expected.abs().max()
        assert (ours - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype, tolerance", LOW.items())
def test_low_precision_is_near_the_formula(dtype, tolerance, impl):
    if not takes(impl, dtype):
        return
    case = make_case("causal", T=130, B=1, K=8, V=8, R=2, decay=True).to(dtype)
    exact, exact_gradients = results_and_gradients(case.to(torch.float64), Case.formula)
    actual, gradients = results_and_gradients(case, lambda c: c.call(impl))
    for name, expected in {**exact, **exact_gradients}.items():
        assert_near((actual | gradients)[name], expected, tolerance, name)


@pytest.mark.parametrize("decay", (False, True))
def test_autocast_changes_nothing(decay, impl):
    case = make_case("causal", T=66, R=2, decay=decay, state=True).to(torch.float32)
    expected, expected_gradients = results_and_gradients(case, lambda c: c.call(impl))

    def under_autocast(c):
        with torch.autocast("cpu", torch.bfloat16):
            return c.call(impl)

    actual, gradients = results_and_gradients(case, under_autocast)
    for name, t in {**expected, **expected_gradients}.items():
        assert torch.equal((actual | gradients)[name], t), name
    assert actual["output"].dtype == torch.float32


def test_linear_state_under_autocast():
    k, v = torch.rand(2, 9, 2, 3), torch.rand(2, 9, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_state(k, v, every=2)
    assert torch.equal(inside.kv, linear_state(k, v, every=2).kv)


def test_inference_mode_and_no_grad_give_the_same(impl):
    case = make_case("causal", T=66, R=2, decay=True)
    expected = case.call(impl).output
    with torch.no_grad():
        assert_near(case.call(impl).output, expected, 1e-13)
    with torch.inference_mode():
        assert_near(case.call(impl).output, expected, 1e-13)


def test_inputs_are_not_changed(impl):
    case = make_case("causal", T=66, R=2, mask=True, state=True, decay=True)
    before = {name: None if t is None else t.clone() for name, t in case.leaves.items()}
    results_and_gradients(case, lambda c: c.call(impl))
    case.call(impl)
    assert all(t is None or torch.equal(t, before[name]) for name, t in case.leaves.items())


def allocated(T, visible, decay):
    """Bytes allocated, in all and by the largest single operator, by one forward and backward of length T."""
    case = make_case(visible, T=T, B=1, H=1, K=8, V=8, R=2, decay=decay).to(torch.float32)
    leaves = [t.requires_grad_() for t in case.leaves.values() if t is not None]
    with profile(profile_memory=True) as record:
        output = case.call("torch").output
        torch.autograd.grad(output.sum(), leaves)
    sizes = [max(0, event.self_cpu_memory_usage) for event in record.function_events]
    return sum(sizes), max(sizes)


@pytest.mark.parametrize("visible", ("all", "causal", "decay", "wait-k", "tensor"))
def test_memory_is_linear_in_length(visible):
    decay = visible == "decay"
    name = "causal" if decay else visible
    total, _ = allocated(2_048, name, decay)
    doubled, largest = allocated(4_096, name, decay)
    assert doubled <= 2.2 * total
    assert largest < 4 * 4_096 * 4_096 / 8, "something of the size of [T, S] was allocated"


def random_case(draw) -> Case:
    visible = draw(st.sampled_from(VISIBILITIES))
    decay = visible == "causal" and draw(st.booleans())
    groups = draw(st.integers(1, 3))
    size = st.integers(0, 12) if draw(st.booleans()) else st.integers(60, 70)
    form = {
        "H": groups * draw(st.integers(1, 2)), "G": groups, "K": draw(st.integers(1, 4)), "V": draw(st.integers(1, 4)),
        "R": draw(st.integers(0, 3)), "factor_heads": draw(st.booleans()), "mask": draw(st.booleans()),
        "state": draw(st.booleans()), "decay": decay, "seed": draw(st.integers(0, 99)),
        "normalize": draw(st.booleans()), "eps": draw(st.sampled_from((1e-6, 0.1, 1.0))), "relu": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        n = draw(st.integers(1, 4))
        form["lengths"] = draw(st.lists(size, min_size=n, max_size=n))
        if visible != "causal" and draw(st.booleans()):
            form["key_lengths"] = draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
    else:
        form.update(T=draw(size), B=draw(st.integers(1, 3)))
        if visible != "causal":
            form["S"] = draw(size)
    return make_case(visible, **form)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_forms(data):
    draw = data.draw
    case = random_case(draw)
    impl = draw(st.sampled_from(("reference", "torch")))
    dtype = draw(st.sampled_from((torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    if dtype == torch.float64:
        check(case, impl)
        return
    low = case.to(dtype)
    exact = low.to(torch.float64).formula()[0]
    output = low.call(impl).output
    assert output.dtype == dtype
    assert_near(output, exact, 10 * LOW[dtype] if case.keywords["normalize"] else 3 * LOW[dtype])


BLOCK_FORMS = {
    "causal": ("causal", {"R": 2, "factor_heads": False, "mask": True}),
    "grouped": ("causal", {"R": 2, "H": 4, "G": 2, "state": True}),
    "decay": ("causal", {"R": 2, "decay": True, "state": True}),
    "decay, not normalised": ("causal", {"decay": True, "normalize": False}),
    "all": ("all", {"R": 2, "S": 70, "H": 4, "G": 2, "factor_heads": False, "state": True}),
    "wait-k": ("wait-k", {"R": 2, "S": 70, "mask": True}),
}


@pytest.mark.parametrize("form", BLOCK_FORMS)
def test_result_does_not_depend_on_the_blocks(form, monkeypatch):
    """Blocks of one chunk of one head of one sample, where these inputs would else fit into one or two blocks."""
    monkeypatch.setattr(blocking, "BLOCK_ELEMENTS", {"cpu": 1})
    visible, options = BLOCK_FORMS[form]
    check(make_case(visible, T=130, **options), "torch")


@pytest.mark.parametrize("decay", (False, True))
def test_gradient_of_the_output_alone(decay):
    """A final state that nobody uses has no gradient, which must be as good as zeros."""
    case = make_case("causal", T=70, R=2, decay=decay, normalize=False)
    leaves = [t.requires_grad_() for t in case.leaves.values() if t is not None]
    result = case.call("torch")
    alone = torch.autograd.grad(result.output.sum(), leaves, retain_graph=True)
    with_zeros = torch.autograd.grad(result.output.sum() + 0 * result.state.kv.sum() + 0 * result.state.z.sum(), leaves)
    for a, b in zip(alone, with_zeros, strict=True):
        assert_near(a, b, 1e-12)


def test_state_of_lower_precision_than_float32_is_not_returned(impl):
    q = torch.rand(1, 4, 2, 3, dtype=torch.bfloat16)
    state = LinearState.zeros(1, 2, 1, 3, 3)
    result = attend(q, q, q, visible="causal", initial_state=state, return_state=True, impl=impl)
    assert result.state.kv.dtype == result.state.z.dtype == torch.float32


def test_float16_sums_do_not_overflow(float64_impl):
    """3,000 keys of weight 64 sum to more than float16 holds; the quotient is fine."""
    q = torch.full((1, 3000, 1, 4), 4.0, dtype=torch.float16)
    for visible in ("all", "causal"):
        output = attend(q, q, torch.ones_like(q), visible=visible, impl=float64_impl).output
        assert_near(output, torch.ones_like(q), 1e-3)


@pytest.mark.requires_tool("native library")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_forms_native(data):
    """Within 2 x the error of the torch implementation in the same dtype + 4 eps of the dtype, gradients too."""
    case = random_case(data.draw)
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    check_low(case.away_from_zero().to(dtype), "native")
