"""Where the GPU kernels run, and what they take."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from leapformer.ops.arguments import Arguments

INSTALLED = find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"  # by Triton's interpreter, on the CPU
SEGMENT_STEP = 32 if INTERPRETED else 64  # segments are multiples of this, which is one of all chunks
FUSED_WIDTH = 16 if INTERPRETED else 64  # of heads whose LeaP module is run inside the sweeps
MAX_HIDDEN = 128
# Rank times width, rounded up to a power of two: with more, the kernels' registers spill.
MAX_FEATURES = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}


def reasons(x: Arguments | None = None) -> list[str]:
    """Why the kernels can't run here, or for a call; empty where they can."""
    found = [] if INSTALLED else ["the package triton is not installed"]
    if x is None:
        if not INTERPRETED and not torch.cuda.is_available():
            found.append("PyTorch finds no GPU")
        return found
    device, rank = x.q.device, x.rank
    if device.type == "cuda":
        if torch.cuda.get_device_properties(device).major < 8:
            found.append("expected a GPU of compute capability 8.0 or more")
    elif not (INTERPRETED and device.type == "cpu"):
        found.append(f"expected tensors on a GPU, got {device}")
    if x.q.dtype not in MAX_FEATURES:
        found.append(f"expected dtype torch.bfloat16, torch.float16 or torch.float32, got {x.q.dtype}")
    for name, width in (("K", x.q.shape[-1]), ("V", x.v.shape[-1])):
        features, most = rank * power_of_two(width), MAX_FEATURES.get(x.q.dtype, 256)
        if features > most:
            found.append(f"expected rank x {name}, rounded up to a power of two, up to {most}, got {features}")
        if width == 0:
            found.append(f"expected {name} above 0, got 0")
    if rank == 0:
        found.append("expected a rank above 0, got 0")
    if x.hidden > MAX_HIDDEN:
        found.append(f"expected LeaP modules with r up to {MAX_HIDDEN}, got {x.hidden}")
    if x.kv is not None and x.kv.dtype == torch.float64:
        found.append("expected a state of torch.float32, got torch.float64")
    return found


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())
