"""Few heads on two cores: milliseconds of the native kernels with sequences whole and cut into pieces, and the ratio.

python benchmarks/pieces.py [LENGTH ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Literal

import torch

from leapformer.ops import linear_attention
from leapformer.ops.native import problem

PIECES = {"whole": lambda x: 1, "cut": problem.pieces}


def step(tensors: list[torch.Tensor], cotangent: torch.Tensor | None, visible: Literal["causal", "all"]) -> None:
    """Forward, and backward where there is a cotangent."""
    with torch.set_grad_enabled(cotangent is not None):
        output = linear_attention(*tensors, relu=True, visible=visible, impl="native").output
        if cotangent is not None:
            torch.autograd.grad(output, tensors, cotangent)


def milliseconds(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main(lengths: list[int]) -> None:
    torch.set_num_threads(2)
    for visible in ("causal", "all"):
        for length in lengths:
            tensors = [torch.randn(1, length, 1, 64, requires_grad=True) for _ in range(3)]
            for name, cotangent in (("forward", None), ("forward + backward", torch.randn(1, length, 1, 64))):
                found = {}
                for how, rule in PIECES.items():
                    problem.pieces = rule
                    found[how] = milliseconds(lambda t=tensors, c=cotangent, v=visible: step(t, c, v))
                told = ", ".join(f"{how} {ms:.2f} ms" for how, ms in found.items())
                print(f"{visible}, {length:,} tokens, {name}: {told}, {found['whole'] / found['cut']:.2f} x")


if __name__ == "__main__":
    main([int(length) for length in sys.argv[1:]] or [16384])
