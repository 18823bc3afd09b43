"""Every choice of tiles of the Triton kernels compiles for GPUs that are not here, and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CASES = ("leap, staircase", "wikitext103", "cosine, float32")  # what asks for most; all of them when kernels change


@pytest.mark.requires_tool("triton")
@pytest.mark.parametrize("case", CASES)
def test_kernels_fit(case):
    """No register is spilled, and no block asks for more shared memory than it can have."""
    command = [sys.executable, "-m", "tests.ops.triton_compile", case]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    assert {"segment_states", "scan_states", "read", "feature_gradients", "step"} <= {k["kernel"] for k in kernels}
    assert [k for k in kernels if k["spilled"] or k["shared"] > k["limit"]] == []
