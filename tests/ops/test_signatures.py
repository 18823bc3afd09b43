"""The frozen signatures, as docs/ops.md gives them."""

import inspect
import re
from pathlib import Path

import pytest

from leapformer import ops

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def as_written(function) -> str:
    """name(a, b, *, c=1), without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return function.__name__ + text.replace("'", '"').replace("1e-06", "1e-6")


@pytest.mark.parametrize("function", (ops.linear_attention, ops.linear_state))
def test_signature_is_the_documented_one(function):
    assert as_written(function) in re.sub(r"\s+", " ", PAGE)


def test_leap_attention_takes_the_same_keywords_but_what_it_sets_itself():
    only_linear = ("relu", "q_angles", "k_angles")

    def keywords(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY]

    assert keywords(ops.leap_attention) == [k for k in keywords(ops.linear_attention) if k[0] not in only_linear]
    assert as_written(ops.leap_attention).startswith("leap_attention(q, k, v, q_leap, k_leap, *, ")


def test_fields():
    assert ops.AttentionOutput._fields == ("output", "state")
    assert ops.LinearState._fields == ("kv", "z", "log_decay")
    assert ops.LeapWeights._fields == ("w1", "b1", "w2", "b2")
    assert ops.Staircase._fields == ("offset", "step", "every", "phase")


@pytest.mark.parametrize("name", ops.__all__)
def test_every_public_name_is_documented(name):
    assert name in PAGE
