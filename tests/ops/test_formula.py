"""Every form of attention against the explicit formula in float64: outputs, final state and all gradients."""

import pytest
import torch

from leapformer.ops import Staircase
from tests.ops.oracle import VISIBILITIES, check, make_case, stairs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMS = {
    "plain": {},
    "keys of another length": {"S": 10},
    "grouped heads": {"H": 4, "G": 2, "R": 2},
    "one key head, shared factors": {"H": 3, "G": 1, "R": 3, "factor_heads": False},
    "mask": {"mask": True, "R": 2},
    "state": {"state": True, "R": 2, "H": 4, "G": 2},
    "numerator": {"normalize": False, "R": 2, "state": True},
    "large eps": {"eps": 2.0},
    "packed": {"lengths": [3, 0, 5, 1], "R": 2},
    "packed keys": {"lengths": [3, 0, 4, 2], "key_lengths": [5, 2, 0, 3], "state": True, "R": 2},
    "packed and masked": {"lengths": [4, 1, 5], "mask": True, "state": True, "R": 2},
    "packed and grouped": {"lengths": [4, 1, 5], "state": True, "H": 4, "G": 2},
    "everything": {"S": 10, "mask": True, "state": True, "R": 3, "H": 4, "G": 2, "V": 5, "eps": 0.1},
}
NOT_SQUARE = ("keys of another length", "packed keys", "everything")


@pytest.mark.parametrize("visible", VISIBILITIES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_state_and_gradients(form, visible, impl):
    if visible == "causal" and form in NOT_SQUARE:
        options = {k: v for k, v in FORMS[form].items() if k not in ("S", "key_lengths")}
    else:
        options = FORMS[form]
    check(make_case(visible, **options), impl)


DECAYS = {
    "plain": {},
    "grouped heads": {"H": 4, "G": 2, "R": 2},
    "state": {"state": True, "H": 4, "G": 2, "R": 2},
    "mask": {"mask": True, "R": 2},
    "one key head": {"H": 3, "G": 1, "R": 2, "factor_heads": False},
    "packed": {"lengths": [3, 0, 5, 1], "state": True, "H": 2, "G": 1},
    "packed and masked": {"lengths": [4, 1, 5], "mask": True, "R": 2},
    "numerator": {"normalize": False, "R": 2},
    "everything": {"mask": True, "state": True, "R": 3, "H": 4, "G": 2, "eps": 0.1},
}


@pytest.mark.parametrize("form", DECAYS)
def test_decay(form, impl):
    check(make_case("causal", decay=True, **DECAYS[form]), impl)


@pytest.mark.parametrize("length", (1, 63, 64, 65, 100, 129))
@pytest.mark.parametrize("visible", ("all", "causal", "decay", "blocks", "wait-k", "per sample", "tensor"))
def test_lengths(visible, length, impl):
    form = {"T": length, "B": 2 if visible in ("per sample", "tensor") else 1, "H": 1, "R": 2, "state": True}
    if visible == "decay":
        check(make_case("causal", decay=True, **form), impl)
    else:
        check(make_case(visible, **form, S=length if visible == "causal" else length + 9), impl)


@pytest.mark.parametrize("visible", ("causal", "decay", "blocks", "wait-k"))
def test_packed_over_many_chunks(visible, impl):
    form = {"lengths": [70, 0, 1, 64, 130], "H": 1, "K": 2, "V": 2, "state": True}
    check(make_case("causal" if visible == "decay" else visible, decay=visible == "decay", **form), impl)


@pytest.mark.parametrize("decay", (False, True))
@pytest.mark.parametrize("step", (0, 1))
@pytest.mark.parametrize("state", (False, True))
def test_no_queries_no_keys(state, step, decay, impl):
    """T = 0 only absorbs, S = 0 only reads; both at once pass the state on."""
    if decay:
        check(make_case("causal", T=step, decay=True, state=state, R=2), impl)
        return
    for T, S in ((0, 5), (5, 0), (0, 0)):
        check(make_case("wait-k" if step else "all", T=T, S=S, state=state, R=2, H=4, G=2), impl)


@pytest.mark.parametrize("visible", VISIBILITIES)
def test_all_sequences_empty(visible, impl):
    check(make_case(visible, lengths=[0, 0], state=True), impl)


@pytest.mark.parametrize("value", (0.0, -1e-9, -1e4))
def test_extreme_decays(value, impl):
    case = make_case("causal", T=130, H=2, K=2, V=2, decay=True, state=True)
    case.leaves["log_decay"] = torch.full_like(case.leaves["log_decay"], value)
    check(case, impl)
    case.leaves["log_decay"][:, ::3] = -5.0
    case.leaves["log_decay"][:, 1::3] = 0.0
    check(case, impl)


@pytest.mark.parametrize(
    "staircase, fields",
    [
        (Staircase.causal(), (1, 1, 1, 0)),
        (Staircase.blocks(4), (4, 4, 4, 0)),
        (Staircase.wait_k(3, 2), (6, 2, 1, 0)),
        (Staircase.wait_k(3, 1), (3, 1, 1, 0)),
        (Staircase(-3, 2, 3, -4), (-3, 2, 3, -4)),
    ],
)
def test_staircase_counts(staircase, fields):
    assert tuple(getattr(staircase, name) for name in ("offset", "step", "every", "phase")) == fields
    for queries, keys in ((0, 3), (5, 0), (9, 9), (4, 30)):
        counts = staircase.counts(queries, keys)
        assert counts.dtype == torch.int64
        assert counts.tolist() == [stairs(*fields, queries, keys)]


def test_staircase_counts_of_each_sample():
    staircase = Staircase(torch.tensor([1, 4]), 2, torch.tensor([1, 3]), 0)
    assert staircase.counts(5, 8).tolist() == [stairs(1, 2, 1, 0, 5, 8), stairs(4, 2, 3, 0, 5, 8)]


@pytest.mark.parametrize("tensors", (False, True))
@pytest.mark.parametrize("value", (2**31, 2**62, 10**30))
@pytest.mark.parametrize("place", range(4))
def test_staircases_beyond_any_length(place, value, tensors):
    """One huge field saturates what it means, and overflows nothing."""
    for sign in (1, -1) if place != 2 else (1,):
        fields = [2, 1, 1, 0]
        fields[place] = sign * value
        expected = stairs(*fields, 9, 6)
        kept = [torch.tensor([max(-(2**63), min(2**63 - 1, f))]) for f in fields] if tensors else fields
        assert Staircase(*kept).counts(9, 6).tolist() == [expected]
