"""State as an argument and a result: splitting and resuming, block boundaries, and LinearState itself."""

import pytest
import torch
from torch.utils import _pytree as pytree

from leapformer.ops import LinearState, Staircase, linear_state
from tests.ops import oracle
from tests.ops.oracle import assert_near, attend, make_case


def part(case, start, stop, state, visible, impl, **keywords):
    """Attention over slots [start, stop) of both sides, after `state`."""
    x = {n: None if t is None else t[:, start:stop] for n, t in case.leaves.items() if n not in ("kv", "z")}
    mask = None if case.key_mask is None else case.key_mask[:, start:stop]
    return attend(
        x["q"], x["k"], x["v"], x["q_factors"], x["k_factors"], visible=visible, key_mask=mask,
        log_decay=x["log_decay"], initial_state=state, return_state=True, impl=impl, **keywords,
    )  # fmt: skip


def assert_same_state(actual, expected, tolerance=1e-10):
    assert_near(actual.kv, expected.kv, tolerance, "kv")
    assert_near(actual.z, expected.z, tolerance, "z")
    assert (actual.log_decay is None) == (expected.log_decay is None)
    if expected.log_decay is not None:
        assert_near(actual.log_decay, expected.log_decay, tolerance, "log_decay")


@pytest.mark.parametrize("decay", (False, True))
@pytest.mark.parametrize("pieces", ((0, 1, 99), (63, 64, 65), (50,), (100,)))
def test_split_and_resume_causal(pieces, decay, impl):
    case = make_case("causal", T=100, H=2, G=1, R=2, mask=True, decay=decay)
    whole = case.call(impl)
    outputs, state, start = [], None, 0
    for stop in (*pieces, 100):
        output, state = part(case, start, stop, state, "causal", impl)
        outputs.append(output)
        start = stop
    assert_near(torch.cat(outputs, 1), whole.output)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("decay", (False, True))
def test_decoding_step_by_step(decay, impl):
    case = make_case("causal", T=70, H=4, G=2, R=2, decay=decay)
    whole, state, outputs = case.call(impl), None, []
    with torch.no_grad():
        for t in range(70):
            output, state = part(case, t, t + 1, state, "causal", impl)
            outputs.append(output)
    assert_near(torch.cat(outputs, 1), whole.output)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("decay", (False, True))
def test_update_state_writes_into_the_given_tensors(decay, impl):
    case = make_case("causal", T=70, H=4, G=2, R=2, decay=decay, mask=True)
    whole, outputs = case.call(impl), []
    with torch.no_grad():
        first, state = part(case, 0, 3, None, "causal", impl)
        tensors, addresses = [t for t in state if t is not None], [t.data_ptr() for t in state if t is not None]
        for start, stop in ((3, 4), (4, 5), (5, 69), (69, 70)):
            output, after = part(case, start, stop, state, "causal", impl, update_state=True)
            assert all(a is b for a, b in zip(after, state, strict=True))
            outputs.append(output)
    assert [t.data_ptr() for t in tensors] == addresses
    assert_near(torch.cat([first, *outputs], 1), whole.output)
    assert_same_state(state, whole.state)


def test_update_state_through_holes(impl):
    """A state whose tensors are not dense is updated too."""
    case = make_case("causal", T=2, H=2, G=2, R=2)
    whole = case.call(impl)
    with torch.no_grad():
        _, dense = part(case, 0, 1, None, "causal", impl)
        state = LinearState(*(torch.stack([t, t], -1)[..., 0] for t in dense[:2]))
        part(case, 1, 2, state, "causal", impl, update_state=True)
    assert_same_state(state, whole.state)


def test_update_state_refuses_gradients_and_nothing_to_update(impl):
    case = make_case("causal", T=3, state=True)
    state = LinearState(case.leaves["kv"], case.leaves["z"])
    with pytest.raises(ValueError, match="update_state: expected gradients switched off"):
        part(case, 0, 3, state, "causal", impl, update_state=True)
    with torch.no_grad(), pytest.raises(ValueError, match="update_state: expected an initial_state"):
        part(case, 0, 3, None, "causal", impl, update_state=True)


def test_split_is_exact_iff_no_earlier_query_sees_past_it(impl):
    """g(i - 1) <= i: block-causal at the ends of blocks of 4, and nowhere else."""
    case = make_case("blocks", T=12, H=2, R=2)
    case.visible = Staircase.blocks(4)
    whole = case.call(impl)
    g = case.visible.counts(12, 12)
    for i in range(1, 12):
        first, state = part(case, 0, i, None, g[:, :i].expand(2, -1), impl)
        second, state = part(case, i, 12, state, (g[:, i:] - i).expand(2, -1), impl)
        assert_same_state(state, whole.state)
        error = (torch.cat([first, second], 1) - whole.output).abs().max().item()
        assert (error < max(1e-12, oracle.nearest)) == (i % 4 == 0), f"split at {i}: error {error:.1e}"


def test_shifted_staircase_resumes_at_a_block_end(impl):
    """Work split at a block end: the same staircase again, since it counts from the first new slot."""
    case = make_case(T=12, R=2)
    case.visible = Staircase.blocks(4)
    whole = case.call(impl)
    first, state = part(case, 0, 8, None, Staircase.blocks(4), impl)
    second, _ = part(case, 8, 12, state, Staircase.blocks(4), impl)
    assert_near(torch.cat([first, second], 1), whole.output)


def test_gradients_flow_through_a_split(impl):
    """Backpropagation through the state of two pieces equals that of the whole."""
    case = make_case("causal", T=80, H=2, R=2, decay=True)
    names = ("q", "k", "v", "q_factors", "k_factors", "log_decay")
    for name in names:
        case.leaves[name].requires_grad_()
    whole = case.call(impl).output
    first, state = part(case, 0, 30, None, "causal", impl)
    second, _ = part(case, 30, 80, state, "causal", impl)
    probe = torch.randn_like(whole)
    leaves = [case.leaves[name] for name in names]
    actual = torch.autograd.grad((torch.cat([first, second], 1) * probe).sum(), leaves)
    for name, got, expected in zip(names, actual, torch.autograd.grad((whole * probe).sum(), leaves), strict=True):
        assert_near(got, expected, name=name)


def test_final_state_takes_every_key_whatever_is_visible(impl):
    states = [make_case(name, S=9, R=2, state=True, mask=True).call(impl).state for name in ("all", "nothing", "late")]
    for state in states[1:]:
        assert_same_state(state, states[0], 1e-14)


def test_no_state_unless_asked(impl):
    q = torch.rand(1, 3, 2, 4)
    assert attend(q, q, q, impl=impl).state is None


@pytest.mark.parametrize("steps", (0, 1, 5, 70))
@pytest.mark.parametrize("form", ({}, {"mask": True}, {"decay": True}))
def test_state_never_aliases_an_input(form, steps, impl):
    case = make_case("causal", T=steps, state=True, **form)
    before = [t if t is None else t.clone() for t in case.leaves.values()]
    state = case.call(impl).state
    for field in state:
        if field is not None:
            field.fill_(7.0)
    for t, old in zip(case.leaves.values(), before, strict=True):
        assert t is None or torch.equal(t, old)


@pytest.mark.parametrize("every", (None, 1, 3, 7, 64))
@pytest.mark.parametrize("length", (0, 1, 6, 7, 65))
@pytest.mark.parametrize("rank", (0, 2))
def test_linear_state(length, every, rank):
    case = make_case(T=length, H=2, R=rank, mask=True, state=True)
    x = case.leaves
    given = LinearState(x["kv"], x["z"], None)
    states = linear_state(x["k"], x["v"], x["k_factors"], key_mask=case.key_mask, every=every, initial_state=given)
    assert states.log_decay is None
    if every is None:
        assert_same_state(states, part(case, 0, length, given, "all", "reference").state)
        return
    ends = list(range(every, length + every, every))
    assert states.kv.shape == (2, -(-length // every), 2, max(rank, 1), 3, 4)
    for n, end in enumerate(ends):
        expected = part(case, 0, min(end, length), given, "all", "reference").state
        assert_near(states.kv[:, n], expected.kv)
        assert_near(states.z[:, n], expected.z)


def test_linear_state_never_aliases_an_input():
    given = LinearState.zeros(1, 2, 1, 3, 4)
    k, v = torch.rand(1, 0, 2, 3), torch.rand(1, 0, 2, 4)
    state = linear_state(k, v, initial_state=given)
    state.kv.fill_(1.0)
    state.z.fill_(1.0)
    assert given.kv.eq(0).all() and given.z.eq(0).all()


@pytest.mark.parametrize("decay", (False, True))
def test_merge_joins_two_stretches(decay, impl):
    case = make_case("causal", T=9, H=2, G=1, R=2, decay=decay)
    pieces = [part(case, *span, None, "causal", impl).state for span in ((0, 4), (4, 6), (6, 9))]
    whole = case.call(impl).state
    assert_same_state(pieces[0].merge(pieces[1]).merge(pieces[2]), whole)
    assert_same_state(pieces[0].merge(pieces[1].merge(pieces[2])), whole)


@pytest.mark.parametrize("decay", (False, True))
def test_select_and_reorder(decay, impl):
    state = make_case("causal", B=3, decay=decay).call(impl).state
    index = torch.tensor([2, 0, 0, 1])
    beams = state.reorder(index)
    for field, new in zip(state, beams, strict=True):
        assert (field is None) == (new is None)
        if field is not None:
            assert torch.equal(new, field[index])
            assert new.data_ptr() != field.data_ptr()
    assert torch.equal(state.select(slice(1, 3)).kv, state.kv[1:])
    assert torch.equal(state.select(torch.tensor([2, 0])).z, state.z[[2, 0]])
    for row in (0, 2, -1):
        assert torch.equal(state.select(row).kv, state.kv[row].unsqueeze(0))


def test_copy_keeps_addresses():
    own = LinearState.zeros(2, 3, 2, 4, 5, decay_heads=3)
    new = LinearState(torch.rand_like(own.kv), torch.rand_like(own.z), -torch.rand(2, 3))
    addresses = [field.data_ptr() for field in own]
    own.copy_(new)
    assert [field.data_ptr() for field in own] == addresses
    assert all(torch.equal(a, b) for a, b in zip(own, new, strict=True))
    own.kv.zero_()
    assert new.kv.ne(0).any()


def test_copy_refuses_another_state():
    with pytest.raises(ValueError, match="expected .* got"):
        LinearState.zeros(1, 2, 1, 3, 4).copy_(LinearState.zeros(2, 2, 1, 3, 4))
    with pytest.raises(ValueError, match="log_decay"):
        LinearState.zeros(1, 2, 1, 3, 4).copy_(LinearState.zeros(1, 2, 1, 3, 4, decay_heads=2))


def test_zeros_is_the_empty_past(impl):
    case = make_case("causal", H=4, G=2, R=2)
    empty = LinearState.zeros(2, 2, 2, 3, 4, dtype=torch.float64)
    assert empty.kv.shape == (2, 2, 2, 3, 4) and empty.z.shape == (2, 2, 2, 3) and empty.log_decay is None
    assert torch.equal(part(case, 0, 7, empty, "causal", impl).output, case.call(impl).output)
    assert LinearState.zeros(2, 4, 1, 3, 4).kv.dtype == torch.float32
    assert LinearState.zeros(2, 4, 1, 3, 4, decay_heads=4).log_decay.shape == (2, 4)


def test_bytes_are_those_of_the_tensors_and_independent_of_length(impl):
    sizes = {make_case("causal", T=n, B=1).to(torch.float32).call(impl).state.nbytes for n in (1, 10, 200)}
    assert sizes == {4 * 2 * (3 * 4 + 3)}


@pytest.mark.parametrize("decay_heads", (None, 3))
def test_state_is_a_pytree(decay_heads):
    state = LinearState.zeros(2, 3, 2, 4, 5, decay_heads=decay_heads)
    leaves, spec = pytree.tree_flatten(state)
    back = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, LinearState)
    assert all(a is b for a, b in zip(back, state, strict=True))
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t.double(), state)
    assert isinstance(doubled, LinearState) and doubled.kv.dtype == torch.float64


def test_drift_over_many_steps(impl):
    """float32 sums over 100,000 keys: what is read from the state stays within 1e-4 of the exact sum."""
    generator = torch.Generator().manual_seed(0)
    k = torch.rand(1, 100_000, 1, 4, generator=generator)
    v = torch.randn(1, 100_000, 1, 4, generator=generator) + 1
    q, nothing = torch.rand(1, 1, 1, 4, generator=generator), k[:, :0]
    state = None
    for start in range(0, 100_000, 250):
        span = slice(start, start + 250)
        empty = q[:, :0]
        _, state = attend(
            empty, k[:, span], v[:, span], visible="all", initial_state=state, return_state=True, impl=impl
        )
    output = attend(q, nothing, nothing, initial_state=state, impl=impl).output
    weights = (k.double() * q.double()).sum(-1, keepdim=True)
    assert_near(output[0, 0, 0], (weights * v.double()).sum((0, 1, 2)) / weights.sum(), 1e-4)


def test_a_decay_of_the_past_is_carried_on_without_aliasing():
    k, v = torch.rand(2, 6, 3, 4), torch.randn(2, 6, 3, 4)
    past = LinearState(torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 3, 1, 4), torch.full((2, 3), -1.5))
    whole = linear_state(k, v, initial_state=past)
    blocks = linear_state(k, v, every=4, initial_state=past)
    assert whole.log_decay is not None and blocks.log_decay is not None and past.log_decay is not None
    assert torch.equal(whole.log_decay, past.log_decay) and whole.log_decay.data_ptr() != past.log_decay.data_ptr()
    assert torch.equal(blocks.log_decay, past.log_decay[:, None].expand(2, 2, 3))
