"""Tensors whose bytes are not their values, that lie elsewhere, or that share memory where it is written."""

import pytest
import torch

from leapformer.ops import LeapWeights, LinearState, Staircase, leap_attention, linear_attention, linear_state
from tests.ops.oracle import assert_near, make_case, results_and_gradients


def negated(t: torch.Tensor) -> torch.Tensor:
    """The same values, whose bytes have the other sign."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg() and torch.equal(view, t)
    return view


NAMES = ("q", "k", "v", "q_factors", "k_factors", "log_decay", "kv", "z", "state_decay")


@pytest.mark.parametrize("name", NAMES)
def test_lazily_negated_views(name, impl):
    """Results and gradients are those of their values."""
    case = make_case("causal", T=20, R=2, decay=True, state=True).to(torch.float32)
    with torch.no_grad():
        expected = case.call(impl)
    expected_results, expected_gradients = results_and_gradients(case, lambda c: c.call(impl))

    def call(c):
        c.leaves[name] = negated(c.leaves[name])
        return c.call(impl)

    results, gradients = results_and_gradients(case, call)
    for key, right in {**expected_results, **{f"of {n}": g for n, g in expected_gradients.items()}}.items():
        assert_near((results | {f"of {n}": g for n, g in gradients.items()})[key], right, name=key)
    with torch.no_grad():
        found = call(case)
    assert_near(found.output, expected.output)
    assert_near(found.state.kv, expected.state.kv)


def test_a_lazily_negated_state_is_updated(impl):
    case = make_case("causal", T=3, state=True, decay=True).to(torch.float32)
    x = case.leaves
    expected = case.call(impl)
    state = LinearState(*(negated(x[n]) for n in ("kv", "z", "state_decay")))
    with torch.no_grad():
        output, _ = linear_attention(
            x["q"],
            x["k"],
            x["v"],
            visible="causal",
            log_decay=x["log_decay"],
            initial_state=state,
            update_state=True,
            impl=impl,
        )
    assert_near(output, expected.output)
    for field, right in zip(state, expected.state, strict=True):
        assert field.is_neg()
        assert_near(field, right)


@pytest.mark.parametrize("hidden", (0, 3))
def test_lazily_negated_modules_and_gradients(hidden, impl):
    q, k, v = torch.randn(3, 1, 9, 2, 4).unbind()
    sizes = ((1, 3, 4), (1, 3), (1, 3), (1,)) if hidden else ((1, 4), (1,))
    weights = [torch.randn(size) for size in sizes]

    def run(change):
        given = [change(t.clone().requires_grad_()) for t in (q, k, v)]
        leap = LeapWeights(*[None] * (4 - len(weights)), *(change(w) for w in weights))
        output = leap_attention(*given, leap, leap, visible="causal", impl=impl).output
        return output, *torch.autograd.grad(output, given, change(torch.ones_like(output)))

    for found, expected in zip(run(negated), run(lambda t: t), strict=True):
        assert_near(found, expected, 1e-5)
    with torch.no_grad():
        leap, same = (LeapWeights(*[None] * (4 - len(weights)), *map(f, weights)) for f in (negated, torch.clone))
        assert_near(
            leap_attention(q, k, v, leap, leap, impl=impl).output, leap_attention(q, k, v, same, same, impl=impl).output
        )


# ---- other places ----------------------------------------------------------------------------------------------------


def everything(form: str) -> dict:
    """A call with a tensor in every place that the form has."""
    B, T = (1, 6) if form == "packed" else (2, 6)
    x = {
        "q": torch.rand(B, T, 2, 3),
        "k": torch.rand(B, T, 2, 3),
        "v": torch.rand(B, T, 2, 4),
        "q_factors": torch.rand(B, T, 2, 2),
        "k_factors": torch.rand(B, T, 2, 2),
        "key_mask": torch.ones(B, T, dtype=torch.bool),
        "kv": torch.rand(B, 2, 2, 3, 4),
        "z": torch.rand(B, 2, 2, 3),
        "state_decay": torch.zeros(B, 2),
    }
    if form == "decay":
        x |= {"log_decay": -torch.rand(B, T, 2), "visible": "causal"}
    elif form == "packed":
        x |= {"cu_seqlens": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 3, 6])}
        x |= {"kv": torch.rand(2, 2, 2, 3, 4), "z": torch.rand(2, 2, 2, 3), "state_decay": torch.zeros(2, 2)}
    else:
        x["visible"] = torch.arange(T).expand(B, T)
    return x


def call(x: dict, impl: str):
    x = dict(x)
    state = LinearState(x.pop("kv"), x.pop("z"), x.pop("state_decay"))
    return linear_attention(
        x.pop("q"), x.pop("k"), x.pop("v"), x.pop("q_factors"), x.pop("k_factors"), initial_state=state, impl=impl, **x
    )


PLACES = [
    (form, name)
    for form in ("counts", "decay", "packed")
    for name, t in everything(form).items()
    if isinstance(t, torch.Tensor)
]
ELSEWHERE = {
    "another device": (lambda t: t.to("meta"), "the device of q"),
    "sparse": (lambda t: t.to_sparse(), "a dense tensor"),
    "mkldnn": (lambda t: t.to_mkldnn() if t.dtype == torch.float32 else t.to_sparse(), "a dense tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "a dense tensor"),
    "a list": (lambda t: t.tolist(), "a tensor"),
}


@pytest.mark.parametrize("form, name", PLACES)
def test_every_tensor_is_dense_and_where_q_is(form, name, impl):
    x = everything(form)
    with torch.no_grad():
        assert call(x, impl).output.isfinite().all()
    shown = {"kv": "initial_state.kv", "z": "initial_state.z", "state_decay": "initial_state.log_decay"}.get(name, name)
    for how, (change, expected) in ELSEWHERE.items():
        message = f"{shown}: expected {expected}"
        if (name, how) == ("q", "another device"):  # then it is the others that are elsewhere
            message = "k: expected the device of q, meta, got cpu"
        if (name, how) == ("visible", "a list"):
            message = "visible: expected 'all', 'causal', a Staircase or integers .*, got list"
        with pytest.raises(ValueError, match=message) as caught, torch.no_grad():
            call(x | {name: change(x[name])}, impl)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ("q_leap", "k_leap"))
@pytest.mark.parametrize("place", range(4))
def test_weights_of_modules_are_dense_and_where_q_is(side, place, impl):
    q = torch.rand(1, 5, 2, 3)
    fits = [torch.rand(1, 4, 3), torch.rand(1, 4), torch.rand(1, 4), torch.rand(1)]
    for change, expected in (
        (lambda t: t.to("meta"), "the device of q, cpu, got meta"),
        (torch.Tensor.to_sparse, "a dense"),
        (torch.Tensor.tolist, "a tensor"),
    ):
        wrong = [change(t) if i == place else t for i, t in enumerate(fits)]
        leaps = (wrong, fits) if side == "q_leap" else (fits, wrong)
        with pytest.raises(ValueError, match=rf"{side}.{LeapWeights._fields[place]}: expected {expected}"):
            leap_attention(q, q, q, *(LeapWeights(*leap) for leap in leaps), impl=impl)


def test_staircases_and_keys_elsewhere(impl):
    q = torch.rand(2, 5, 2, 3)
    for name in Staircase._fields:
        fields = {"offset": 1} | {name: torch.ones(1, dtype=torch.long, device="meta")}
        with pytest.raises(ValueError, match=f"visible.{name}: expected a tensor on cpu or the CPU, got meta"):
            linear_attention(q, q, q, visible=Staircase(**fields), impl=impl)
    with pytest.raises(ValueError, match="v: expected the device of q, cpu, got meta"):
        linear_state(q, q.to("meta"))
    with pytest.raises(ValueError, match="k: expected 4 axes"):
        linear_state(q[0, 0, 0], q)


class Tagged(torch.Tensor):
    """A subclass that does nothing."""


@pytest.mark.parametrize("name", ("q", "k", "key_mask", "kv"))
def test_subclasses_of_tensor(name, impl):
    x = everything("counts")
    with torch.no_grad():
        expected = call(x, impl).output
        found = call(x | {name: x[name].as_subclass(Tagged)}, impl).output
    assert torch.equal(torch.Tensor(found), expected)


# ---- memory that is written ------------------------------------------------------------------------------------------


def step(state: LinearState, impl: str):
    x = torch.rand(2, 1, 2, 3)
    with torch.no_grad():
        return linear_attention(x, x, x, visible="causal", initial_state=state, update_state=True, impl=impl)


def test_update_of_a_state_that_shares_memory_is_refused(impl):
    zeros = LinearState.zeros(2, 2, 1, 3, 3, decay_heads=2)
    expanded = zeros._replace(kv=torch.zeros(1, 2, 1, 3, 3).expand(2, 2, 1, 3, 3))
    sliding = zeros._replace(kv=torch.zeros(60).as_strided((2, 2, 1, 3, 3), (18, 9, 9, 2, 1)))
    for state in (expanded, sliding, zeros._replace(log_decay=torch.zeros(1).expand(2, 2))):
        with pytest.raises(ValueError, match="update_state: expected a state whose elements have memory of their own"):
            step(state, impl)
    buffer = torch.zeros(60)
    kv = buffer[:36].view(2, 2, 1, 3, 3)
    for z in (buffer[:12].view(2, 2, 1, 3), buffer[35:47].view(2, 2, 1, 3), kv[..., 0]):
        with pytest.raises(ValueError, match="update_state: expected a state whose tensors do not share memory"):
            step(LinearState(kv, z), impl)
    with pytest.raises(ValueError, match="do not share memory"):
        step(LinearState(kv, buffer[36:48].view(2, 2, 1, 3), buffer[47:51].view(2, 2)), impl)


def test_update_of_a_state_in_one_buffer(impl):
    """Side by side, interleaved or turned round: as long as no element is shared, the state is updated where it
    lies.
    """
    torch.manual_seed(0)
    expected = step(LinearState.zeros(2, 2, 1, 3, 3), impl).state
    flat, mixed, turned = torch.zeros(48), torch.zeros(2, 2, 1, 3, 4), torch.zeros(3, 3, 1, 2, 2)
    for state in (
        LinearState(flat[:36].view(2, 2, 1, 3, 3), flat[36:].view(2, 2, 1, 3)),
        LinearState(mixed[..., :3], mixed[..., 3]),
        LinearState(turned.permute(4, 3, 2, 1, 0), torch.zeros(2, 2, 1, 3).double()),
        LinearState(torch.zeros(2, 2, 1, 3, 3).double(), torch.zeros(2, 2, 1, 3)),
    ):
        torch.manual_seed(0)
        after = step(state, impl).state
        assert after is state
        assert_near(state.kv, expected.kv)
        assert_near(state.z, expected.z)


@pytest.mark.parametrize("width", ("K", "V"))
@pytest.mark.parametrize("T", (1, 3, 70))
def test_a_state_without_values_or_features(width, T, impl):
    """What has no elements has no address, and the other half of the state is there all the same."""
    case = make_case("causal", T=T, R=2, state=True, **{width: 0})
    expected, expected_gradients = results_and_gradients(case, lambda c: c.formula())
    results, gradients = results_and_gradients(case, lambda c: c.call(impl))
    for name, right in expected.items():
        assert_near(results[name], right, name=name)
    for name, right in expected_gradients.items():
        assert_near(gradients[name], right, name=f"gradient of {name}")
    with torch.no_grad():
        found = case.call(impl)
    assert_near(found.state.z, expected["z"])


@pytest.mark.parametrize("impl", ("torch", pytest.param("native", marks=pytest.mark.requires_tool("native library"))))
def test_a_graph_that_kept_the_old_state_notices_the_update(impl):
    """Its gradient would be that of another state: autograd says so, also where a kernel wrote by address."""
    q = torch.rand(2, 1, 2, 3, requires_grad=True)
    state = LinearState.zeros(2, 2, 1, 3, 3)
    output = linear_attention(q, q, q, visible="causal", initial_state=state, impl=impl).output
    step(state, impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
