"""Packed sequences whose keys have boundaries of their own, and boundaries that are none."""

import pytest
import torch

from leapformer.ops import LeapWeights, leap_attention, linear_attention
from tests.ops.oracle import attend, check, make_case

LENGTHS = {
    "longer chunks than one": ([98, 102], [76, 124]),
    "an empty sequence of keys": ([5, 3, 70], [0, 70, 8]),
    "an empty sequence of queries": ([0, 9, 1], [4, 1, 5]),
    "the same": ([3, 0, 66], [3, 0, 66]),
}


@pytest.mark.parametrize("form", ({}, {"mask": True, "state": True, "R": 2}, {"H": 4, "G": 2, "normalize": False}))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_causal_with_keys_packed_otherwise(lengths, form, impl):
    """g(i) = i + 1, at most the keys of the own sequence, which stand elsewhere than its queries."""
    queries, keys = LENGTHS[lengths]
    check(make_case("causal", lengths=queries, key_lengths=keys, **{"H": 2, "K": 2, "V": 2} | form), impl)


def test_causal_leap_with_keys_packed_otherwise(impl):
    q, k, v = torch.randn(3, 1, 200, 2, 4).unbind()
    module = LeapWeights(None, None, torch.rand(1, 4), torch.rand(1))
    bounds, keys = torch.tensor([0, 98, 200]), torch.tensor([0, 76, 200])
    output = leap_attention(
        q, k, v, module, module, visible="causal", cu_seqlens=bounds, cu_seqlens_k=keys, impl=impl
    ).output
    for n in range(2):
        t, s = slice(bounds[n], bounds[n + 1]), slice(keys[n], keys[n + 1])
        seen = torch.arange(1, t.stop - t.start + 1)[None]
        alone = leap_attention(q[:, t], k[:, s], v[:, s], module, module, visible=seen, impl="reference").output
        torch.testing.assert_close(output[:, t], alone, rtol=1e-4, atol=1e-5)


def test_a_decay_needs_keys_packed_as_queries_are(impl):
    """There is one decay for each query, and none for a key that stands elsewhere."""
    case = make_case("causal", lengths=[3, 4], key_lengths=[4, 3], decay=True)
    with pytest.raises(
        ValueError, match="cu_seqlens_k with log_decay: expected the boundaries of cu_seqlens, got others"
    ):
        case.call(impl)
    check(make_case("causal", lengths=[3, 4], key_lengths=[3, 4], decay=True), impl)


@pytest.mark.parametrize("wrong", ([0, 4, 2, 7], [1, 7], [0, 6], [0, 8], [-1, 7], [0, 3, 9, 7]))
@pytest.mark.parametrize("side", ("cu_seqlens", "cu_seqlens_k"))
def test_boundaries_that_do_not_rise_to_the_length(side, wrong, impl):
    x = torch.rand(1, 7, 1, 2)
    cu = {"cu_seqlens": torch.tensor([0, *[3] * (len(wrong) - 2), 7]), "cu_seqlens_k": None} | {
        side: torch.tensor(wrong)
    }
    for visible in ("all", "causal"):
        with pytest.raises(ValueError, match=f"{side}: expected boundaries that rise from 0 to 7, got") as caught:
            linear_attention(x, x, x, visible=visible, impl=impl, **cu)
        assert "\n" not in str(caught.value)


def test_gradients_and_empty_sides(impl):
    """All keys in one sequence, all queries in another: nothing is seen, and nothing has a gradient."""
    x = [torch.rand(1, 6, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    cu = {"cu_seqlens": torch.tensor([0, 6, 6]), "cu_seqlens_k": torch.tensor([0, 0, 6])}
    output = attend(*x, visible="causal", impl=impl, **cu).output
    assert output.eq(0).all()
    assert all(g is None or g.eq(0).all() for g in torch.autograd.grad(output.sum(), x, allow_unused=True))
