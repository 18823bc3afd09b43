"""What the doors hand to implementations, and what these say of fields that they don't take."""

from __future__ import annotations

from typing import get_type_hints

import pytest
import torch

from leapformer.ops import LeapWeights, api, leap_attention, linear_attention
from leapformer.ops.arguments import (
    ANGLES,
    DIFFERENTIABLE,
    FACTORS,
    FIELDS,
    MODULES,
    NUMBERS,
    TENSORS,
    Arguments,
    Gradients,
)
from leapformer.ops.implementation import BASIS, Implementation
from leapformer.ops.lowering import without_angles
from leapformer.ops.operator import Form, Operator

q = torch.rand(2, 5, 1, 3)
key_mask = torch.ones(2, 5, dtype=torch.bool)


def test_tensors_come_first_and_of_them_the_differentiable_ones():
    hints = get_type_hints(Arguments)
    assert [name for name in FIELDS if hints[name] in (bool, int, float)] == list(NUMBERS) == list(FIELDS[TENSORS:])
    assert FIELDS[:DIFFERENTIABLE] == Gradients._fields


def attend(x: Arguments, update_state: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return api.torch_impl.OPERATOR.attend(x, update_state)


def test_what_is_not_taken_is_refused_with_a_reason_of_its_own(monkeypatch):
    narrow = Implementation(attend, takes=BASIS - {"key_mask", "normalize"})
    assert narrow.reasons(None) == narrow.reasons(Arguments(q, q, q)) == []
    reasons = ["it does not take key_mask", "it does not take normalize"]
    assert narrow.reasons(Arguments(q, q, q, key_mask=key_mask, normalize=False)) == reasons
    monkeypatch.setitem(api._IMPLEMENTATIONS, "native", narrow)
    assert linear_attention(q, q, q, impl="native").output.shape == q.shape
    with pytest.raises(ValueError, match="got 'native', which can't: it does not take key_mask$"):
        linear_attention(q, q, q, key_mask=key_mask, impl="native")
    assert api._implementation("auto", Arguments(q, q, q)) is narrow
    assert api._implementation("auto", Arguments(q, q, q, key_mask=key_mask)) is api._IMPLEMENTATIONS["torch"]


def test_who_takes_no_modules_gets_factors(monkeypatch):
    seen = []

    def remember(x: Arguments, update_state: bool):
        seen.append(x)
        return attend(x, update_state)

    weights = LeapWeights(None, None, torch.rand(1, 3), torch.rand(1))
    monkeypatch.setitem(api._IMPLEMENTATIONS, "torch", Implementation(remember))
    expected = leap_attention(q, q, q, weights, weights, impl="reference").output
    assert torch.allclose(leap_attention(q, q, q, weights, weights, impl="torch").output, expected, atol=1e-6)
    (x,) = seen
    assert all(getattr(x, name) is None for name in MODULES)
    assert x.rank == 2 and x.q_factors is not None and not x.relu


@pytest.mark.parametrize("takes", (BASIS, BASIS | ANGLES))
def test_who_takes_no_angles_gets_factors(takes, monkeypatch):
    seen = []

    def remember(x: Arguments, update_state: bool):
        seen.append(x)
        return attend(x if x.q_angles is None else without_angles(x), update_state)

    angles = {"q_angles": torch.rand(2, 5, 1, 2), "k_angles": torch.rand(2, 5, 1, 2)}
    monkeypatch.setitem(api._IMPLEMENTATIONS, "torch", Implementation(remember, takes=takes))
    expected = linear_attention(q, q, q, **angles, impl="reference").output
    assert torch.allclose(linear_attention(q, q, q, **angles, impl="torch").output, expected, atol=1e-6)
    (x,) = seen
    given, absent = (ANGLES, FACTORS) if takes >= ANGLES else (FACTORS, ANGLES)
    assert all(getattr(x, name) is not None for name in given) and all(getattr(x, name) is None for name in absent)
    assert x.rank == 4


def test_a_decay_of_later_keys_is_a_field_of_its_own(monkeypatch):
    """Who does not take it refuses, and says so; "auto" goes on to the next."""
    decay = -torch.rand(2, 5, 1)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "native", Implementation(attend))
    with pytest.raises(ValueError, match="got 'native', which can't: it does not take later_decay$"):
        linear_attention(q, q, q, log_decay=decay, impl="native")
    assert linear_attention(q, q, q, log_decay=decay, visible="causal", impl="native").output.shape == q.shape
    expected = linear_attention(q, q, q, log_decay=decay, impl="reference").output
    assert torch.allclose(linear_attention(q, q, q, log_decay=decay).output, expected, atol=1e-6)


@pytest.mark.parametrize("kind, own", (("leap", MODULES), ("angles", ANGLES)))
def test_modules_and_angles_have_operators_of_their_own(kind, own):
    functions = {"forward": lambda x: [], "empty": lambda x: [], "backward": lambda x, *_: x, "direct": lambda x, _: []}
    operator = Operator(f"for_a_test_of_{kind}", **functions, results=3, takes=BASIS | own)
    assert set(getattr(operator, kind).tensors) >= own and not FACTORS & set(getattr(operator, kind).tensors)
    assert set(operator.linear.tensors) >= FACTORS and not own & set(operator.linear.tensors)
    other = "angles" if kind == "leap" else "leap"
    assert getattr(operator, other) is operator.linear


def test_an_operator_has_only_the_fields_that_it_takes():
    takes = BASIS - {"key_mask", "relu"}
    form = Form("narrow_for_a_test", takes - MODULES, (lambda x: [], lambda x: [], lambda x, results, given: x), 1)
    assert "key_mask" not in form.tensors and "relu" not in form._numbers
    x = Arguments(q, q, q, log_decay=torch.rand(2, 5, 1), causal=True)
    assert form.arguments(form.given(x)) == x
