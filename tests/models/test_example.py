"""The example of a LeaP layer in a plain PyTorch model learns its task."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"


def test_a_leap_layer_in_a_plain_model_learns_to_look_back():
    with torch.random.fork_rng():
        losses = runpy.run_path(str(EXAMPLE))["train"](50)
    assert losses[0] > 2.0
    assert losses[-1] < 0.2
