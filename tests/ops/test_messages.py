"""Wrong arguments get a ValueError that says what was expected and what came; and what "auto" chose is logged once."""

import subprocess
import sys

import pytest
import torch

from leapformer.ops import (
    LeapWeights,
    LinearState,
    Staircase,
    available_impls,
    leap_attention,
    linear_attention,
    linear_state,
)
from leapformer.ops.native import library

q, k, v = torch.rand(2, 5, 4, 3), torch.rand(2, 6, 2, 3), torch.rand(2, 6, 2, 7)
square = {"k": k[:, :5], "v": v[:, :5]}
one = {"q": q[:1], "k": k[:1, :5], "v": v[:1, :5]}
bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
factors = {"q_factors": torch.rand(2, 5, 4, 2), "k_factors": torch.rand(2, 6, 2, 2)}

WRONG = {
    "q without heads": ({"q": q[:, :, 0]}, "q"),
    "k of another width": ({"k": k[..., :2]}, "k"),
    "k of another batch": ({"k": k[:1]}, "k"),
    "v of another length": ({"v": v[:, :5]}, "v"),
    "v of other heads": ({"v": v[:, :, :1]}, "v"),
    "integer q": ({"q": q.long()}, "q"),
    "mixed dtypes": ({"k": k.double()}, "k"),
    "v of another dtype": ({"v": v.half()}, "v"),
    "heads not a multiple": ({"q": torch.rand(2, 5, 3, 3)}, "heads"),
    "no key heads": ({"k": k[:, :, :0], "v": v[:, :, :0]}, "heads"),
    "only q_factors": ({"q_factors": factors["q_factors"]}, "k_factors"),
    "only k_factors": ({"k_factors": factors["k_factors"]}, "q_factors"),
    "factors of another rank": ({**factors, "k_factors": torch.rand(2, 6, 2, 3)}, "k_factors"),
    "q_factors of another length": ({**factors, "q_factors": torch.rand(2, 6, 4, 2)}, "q_factors"),
    "q_factors of other heads": ({**factors, "q_factors": torch.rand(2, 5, 2, 2)}, "q_factors"),
    "k_factors without heads": ({**factors, "k_factors": torch.rand(2, 6, 2)}, "k_factors"),
    "integer factors": ({**factors, "k_factors": torch.ones(2, 6, 2, 2, dtype=torch.long)}, "k_factors"),
    "unknown word": ({"visible": "past"}, "visible"),
    "visible of another type": ({"visible": 3}, "visible"),
    "causal with other keys": ({"visible": "causal"}, "causal"),
    "visible of another length": ({"visible": torch.ones(2, 6, dtype=torch.long)}, "visible"),
    "visible with one axis": ({"visible": torch.ones(5, dtype=torch.long)}, "visible"),
    "visible of floats": ({"visible": torch.ones(2, 5)}, "visible"),
    "visible of bools": ({"visible": torch.ones(2, 5, dtype=torch.bool)}, "visible"),
    "staircase of another batch": ({"visible": Staircase(torch.ones(3, dtype=torch.long), 1, 1, 0)}, "visible"),
    "staircase of floats": ({"visible": Staircase(torch.ones(2), 1, 1, 0)}, "visible"),
    "staircase that stands still": ({"visible": Staircase(1, 1, 0, 0)}, "every"),
    "key_mask of integers": ({"key_mask": torch.ones(2, 6, dtype=torch.long)}, "key_mask"),
    "key_mask of another length": ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_mask"),
    "cu_seqlens with a batch": ({**square, "cu_seqlens": bounds}, "cu_seqlens"),
    "cu_seqlens of floats": ({**one, "cu_seqlens": bounds.float()}, "cu_seqlens"),
    "cu_seqlens with two axes": ({**one, "cu_seqlens": bounds[None]}, "cu_seqlens"),
    "cu_seqlens of nothing": ({**one, "cu_seqlens": bounds[:0]}, "cu_seqlens"),
    "cu_seqlens_k alone": ({**one, "cu_seqlens_k": bounds}, "cu_seqlens_k"),
    "cu_seqlens_k of other sequences": ({**one, "cu_seqlens": bounds, "cu_seqlens_k": bounds[:2]}, "cu_seqlens_k"),
    "other keys without cu_seqlens_k": ({"q": q[:1], "k": k[:1], "v": v[:1], "cu_seqlens": bounds}, "cu_seqlens_k"),
    "log_decay under another staircase": (
        {**square, "visible": Staircase.wait_k(3, 1), "log_decay": -torch.rand(2, 5, 4)},
        "log_decay",
    ),
    "log_decay with numbers of keys": (
        {**square, "visible": torch.full((2, 5), 5), "log_decay": -torch.rand(2, 5, 4)},
        "log_decay",
    ),
    "log_decay with other keys": ({"log_decay": -torch.rand(2, 5, 4)}, "log_decay"),
    "one sort of angles": ({"q_angles": torch.rand(2, 5, 4, 1)}, "k_angles"),
    "angles beside factors": (
        {
            f"{side}_{what}": torch.rand(2, n, 1, 2)
            for side, n in (("q", 5), ("k", 6))
            for what in ("angles", "factors")
        },
        "q_factors with q_angles",
    ),
    "angles of other numbers": ({"q_angles": torch.rand(2, 5, 4, 2), "k_angles": torch.rand(2, 6, 2, 1)}, "k_angles"),
    "log_decay of other heads": ({**square, "visible": "causal", "log_decay": -torch.rand(2, 5, 2)}, "log_decay"),
    "log_decay of integers": (
        {**square, "visible": "causal", "log_decay": -torch.ones(2, 5, 4, dtype=torch.long)},
        "log_decay",
    ),
    "state of another rank": ({"initial_state": LinearState.zeros(2, 2, 2, 3, 7)}, "initial_state"),
    "state of another batch": ({"initial_state": LinearState.zeros(1, 2, 1, 3, 7)}, "initial_state"),
    "state of another value width": ({"initial_state": LinearState.zeros(2, 2, 1, 3, 6)}, "initial_state"),
    "state of query heads without decay": ({"initial_state": LinearState.zeros(2, 4, 1, 3, 7)}, "initial_state"),
    "state of key heads with decay": (
        {
            **square,
            "visible": "causal",
            "log_decay": -torch.rand(2, 5, 4),
            "initial_state": LinearState.zeros(2, 2, 1, 3, 7),
        },
        "initial_state",
    ),
    "normaliser of the state": (
        {"initial_state": LinearState(torch.zeros(2, 2, 1, 3, 7), torch.zeros(2, 2, 1, 4), None)},
        "initial_state",
    ),
    "eps of zero": ({"eps": 0.0}, "eps"),
    "negative eps": ({"eps": -1e-6}, "eps"),
    "eps of NaN": ({"eps": float("nan")}, "eps"),
    "eps of a word": ({"eps": "small"}, "eps"),
    "eps of nothing": ({"eps": None}, "eps"),
    "unknown implementation": ({"impl": "cuda"}, "impl"),
    "normalize of a word": ({"normalize": "no"}, "normalize"),
    "relu of a number": ({"relu": 2}, "relu"),
    "q of a list": ({"q": [1.0]}, "q"),
    "v of nothing": ({"v": None}, "v"),
    "float8": ({name: t.to(torch.float8_e4m3fn) for name, t in (("q", q), ("k", k), ("v", v))}, "q"),
    "complex factors": ({**factors, "k_factors": factors["k_factors"].to(torch.complex64)}, "k_factors"),
    "staircase of a fraction": ({"visible": Staircase(1.5, 1)}, "visible.offset"),
    "staircase of words": ({"visible": Staircase(1, "1")}, "visible.step"),
    "staircase of steps of zero": ({"visible": Staircase(1, 1, torch.tensor([1, 0]))}, "visible.every"),
    "state of a tuple": ({"initial_state": (torch.zeros(2, 2, 1, 3, 7), torch.zeros(2, 2, 1, 3), None)}, "LinearState"),
    "state without z": ({"initial_state": LinearState(torch.zeros(2, 2, 1, 3, 7), None)}, "initial_state"),
    "state of integers": (
        {"initial_state": LinearState(torch.zeros(2, 2, 1, 3, 7).long(), torch.zeros(2, 2, 1, 3))},
        "initial_state",
    ),
    "decay of a state of other heads": (
        {"initial_state": LinearState(torch.zeros(2, 2, 1, 3, 7), torch.zeros(2, 2, 1, 3), torch.zeros(2, 2))},
        "initial_state.log_decay",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    change, subject = WRONG[name]
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(ValueError) as caught:
        linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    message = str(caught.value)
    assert subject in message and "expected" in message and "got" in message and "\n" not in message, message


def test_an_implementation_that_cannot_run_raises():
    with pytest.raises(ValueError, match="'native'.*torch.float64"):
        linear_attention(q.double(), k.double(), v.double(), impl="native")
    with pytest.raises(ValueError, match="triton"):
        linear_attention(q, k, v, impl="triton")


def test_every_reason_is_told(monkeypatch):
    """Without the library and in float64 there are two."""
    monkeypatch.setattr(library, "LIBRARY", None)
    monkeypatch.setattr(library, "MISSING", "the library is not there")
    assert available_impls()["native"] == ["the library is not there"]
    with pytest.raises(ValueError, match="the library is not there; .*torch.float64"):
        linear_attention(q.double(), k.double(), v.double(), impl="native")


@pytest.mark.parametrize(
    "wrong",
    [
        LeapWeights(None, None, torch.rand(1, 4), torch.rand(1)),
        LeapWeights(None, None, torch.rand(3, 3), torch.rand(3)),
        LeapWeights(torch.rand(1, 2, 5), torch.rand(1, 2), torch.rand(1, 2), torch.rand(1)),
        LeapWeights(torch.rand(1, 2, 3), torch.rand(1, 2), torch.rand(1, 3), torch.rand(1)),
        LeapWeights(torch.rand(1, 2, 3), torch.rand(1, 3), torch.rand(1, 2), torch.rand(1)),
        LeapWeights(torch.rand(1, 2, 3), torch.rand(1, 2), torch.rand(1, 2), torch.rand(3)),
    ],
)
@pytest.mark.parametrize("side", ("q_leap", "k_leap"))
def test_leap_weights_that_do_not_fit(side, wrong):
    fits = LeapWeights(None, None, torch.rand(1, 3), torch.rand(1))
    leaps = (wrong, fits) if side == "q_leap" else (fits, wrong)
    with pytest.raises(ValueError, match=f"{side}.*expected.*got"):
        leap_attention(q, k, v, *leaps)


@pytest.mark.parametrize("wrong", (None, 3, (None, None), LeapWeights(None, None, None, torch.rand(1))))
def test_leap_weights_that_are_none(wrong):
    fits = LeapWeights(None, None, torch.rand(1, 3), torch.rand(1))
    with pytest.raises(ValueError, match="k_leap: expected.*got"):
        leap_attention(q, k, v, fits, wrong)


@pytest.mark.parametrize("field", range(4))
def test_leap_weights_of_integers(field):
    fits = [torch.rand(1, 2, 3), torch.rand(1, 2), torch.rand(1, 2), torch.rand(1)]
    fits[field] = fits[field].long()
    with pytest.raises(ValueError, match="weights of q_leap: expected a floating dtype, got torch.int64"):
        leap_attention(q, k, v, LeapWeights(*fits), LeapWeights(*fits))


@pytest.mark.parametrize("every", (0, -1, 1.5, "2"))
def test_linear_state_of_no_blocks(every):
    with pytest.raises(ValueError, match="every.*expected.*got"):
        linear_state(k, v, every=every)


def test_linear_state_checks_its_arguments():
    with pytest.raises(ValueError, match="v: expected.*got"):
        linear_state(k, v[:, :5])
    with pytest.raises(ValueError, match="key_mask: expected.*got"):
        linear_state(k, v, key_mask=torch.ones(2, 5, dtype=torch.bool), every=2)
    with pytest.raises(ValueError, match="initial_state.*expected.*got"):
        linear_state(k, v, initial_state=LinearState.zeros(1, 2, 1, 3, 7))


def test_tensors_are_positional_and_the_rest_is_not():
    with pytest.raises(TypeError):
        linear_attention(q, k, v, None, None, "all")
    with pytest.raises(TypeError):
        linear_state(k, v, None, None)


AUTO = """
import logging, torch; logging.basicConfig(level=logging.INFO, format='%(name)s|%(message)s')
from leapformer.ops import linear_attention
from leapformer.ops.native import library
WITHOUT
x = torch.rand(1, 3, 1, 2)
for _ in range(3): linear_attention(x, x, x)
"""


def what_auto_says(without: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", AUTO.replace("WITHOUT", without)], capture_output=True, text=True, check=True
    )
    assert run.stdout == ""
    return [line for line in run.stderr.splitlines() if line.startswith("leapformer.ops")]


def test_auto_says_once_that_it_fell_back():
    (line,) = what_auto_says("library.LIBRARY, library.MISSING = None, 'not there'")
    assert "'torch'" in line and "native: not there" in line


@pytest.mark.requires_tool("native library")
def test_auto_says_once_what_it_chose():
    (line,) = what_auto_says("")
    assert "'native'" in line and "torch" not in line
