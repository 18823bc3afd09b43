"""Every choice of tiles of the Triton kernels compiles for GPUs that are not here, and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

CASES = (
    "plain",
    "cosine",
    "cosine, float32",
    "float16",
    "decay",
    "two-sided",
    "two-sided, float32",
    "leap",
    "leap with decay",
    "leap, staircase",
    "leap, float32",
    "grouped heads",
    "packed",
    "wikitext103",
    "32 wide",
    "128 wide",
    "256 wide",
    "rank 4",
)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What each kernel of each case needs, from two processes of their own, side by side."""
    with ThreadPoolExecutor() as pool:
        return [kernel for half in pool.map(needs_of, (CASES[::2], CASES[1::2])) for kernel in half]


def needs_of(cases: Sequence[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.ops.triton_compile", *cases]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.requires_tool("triton")
@pytest.mark.parametrize("case", CASES)
def test_kernels_fit(case, compiled):
    """No register is spilled, and no block asks for more shared memory than it can have."""
    kernels = [kernel for kernel in compiled if kernel["case"] == case]
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    assert {"segment_states", "scan_states", "read", "feature_gradients", "step"} <= {k["kernel"] for k in kernels}
    assert [k for k in kernels if k["spilled"] or k["shared"] > k["limit"]] == []


@pytest.mark.requires_tool("triton")
def test_no_case_is_left_out():
    from tests.ops import triton_compile  # which needs triton

    assert set(CASES) == set(triton_compile.CASES)
