"""``impl="triton"`` without a GPU: right in Triton's interpreter, and every configuration compiles within the
limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from leapformer.ops import LeapWeights, LinearState, api, available_impls, leap_attention, linear_attention
from leapformer.ops.arguments import Arguments
from leapformer.ops.triton import limits
from tests.ops import triton_cases

needs_triton = pytest.mark.requires_tool("triton")


def lines_of(module: str, **environment: str) -> list[str]:
    """What a program prints in a process of its own, in which Triton can be told how to run."""
    run = subprocess.run(
        [sys.executable, "-m", module], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, tuple[float, float]] | str]:
    lines = lines_of("tests.ops.triton_cases", TRITON_INTERPRET="1")
    return {name: result for line in lines for name, result in json.loads(line).items()}


@needs_triton
@pytest.mark.parametrize("name", triton_cases.CASES)
def test_interpreter_agrees_with_float64(name, errors):
    """No further off than twice the torch implementation in the same dtype, plus 8 eps of the dtype: the sums have up
    to 64 terms, and a product of matrices that adds them one by one errs by the root of that."""
    result = errors[name]
    assert isinstance(result, dict), result
    eps = torch.finfo(triton_cases.dtype_of(name)).eps
    wrong = {what: pair for what, pair in result.items() if not pair[0] <= 2 * pair[1] + 8 * eps}
    assert wrong == {}


def test_every_reason_is_told():
    """A named implementation that cannot run raises and lists all that is in the way."""
    q = torch.rand(1, 3, 1, 300, dtype=torch.float64)
    factors = torch.rand(1, 3, 1, 5)
    state = LinearState.zeros(1, 1, 5, 300, 300, dtype=torch.float64)
    with pytest.raises(ValueError, match="'triton'") as caught:
        linear_attention(q, q, q, factors, factors, initial_state=state, impl="triton")
    limits = [f"rank x {width}, rounded up to a power of two, up to 256, got 2560" for width in "KV"]
    reasons = ("on a GPU, got cpu", "got torch.float64", *limits, "a state of torch.float32")
    for reason in reasons:
        assert reason in str(caught.value)


def test_large_modules_are_refused():
    q, weights = torch.rand(1, 3, 1, 8), LeapWeights(torch.rand(1, 129, 8), None, torch.rand(1, 129), torch.rand(1))
    with pytest.raises(ValueError, match="r up to 128, got 129"):
        leap_attention(q, q, q, weights, weights, impl="triton")


@needs_triton
def test_the_only_reason_here_is_the_device():
    q = torch.rand(1, 3, 1, 8)
    assert limits.reasons(Arguments(q, q, q)) == ["expected tensors on a GPU, got cpu"]


def test_the_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(limits, "INSTALLED", False)
    assert available_impls()["triton"] == ["the package triton is not installed", "PyTorch finds no GPU"]


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("major", "dtype", "chosen"),
    [(9, torch.float32, "triton"), (9, torch.float64, "torch"), (7, torch.float32, "torch")],
)
def test_what_auto_takes_on_a_gpu(major, dtype, chosen, monkeypatch, caplog):
    """The kernels, or torch with the reason; said once."""
    q = torch.rand(1, 3, 1, 8, dtype=dtype).as_subclass(OnGPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(limits, "INSTALLED", True)
    monkeypatch.setattr(api, "_announced", set())
    with caplog.at_level("INFO", logger="leapformer.ops.api"):
        for _ in range(3):
            assert api._implementation("auto", Arguments(q, q, q)) is api._IMPLEMENTATIONS[chosen]
    (line,) = caplog.messages
    assert repr(chosen) in line and ("triton:" in line) == (chosen == "torch")
