"""Compiles the Triton kernels for GPUs that are not here, and prints what each needs, one JSON line for a kernel.

As a program, in a process of its own, because it tells Triton which GPU there is:

    python -m tests.ops.triton_compile [NAME ...]
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from leapformer.ops.arguments import Arguments, Incoming, by_name
from leapformer.ops.triton import kernels, operator, plan

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability").
SHARED = {80: 163 * 1024, 90: 227 * 1024}

# Every choice of tiles, and with each what asks for the most registers: factors, LeaP modules, decay, the staircase's
# loops.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"dtype": BF16, "R": 1},
    "cosine": {"dtype": BF16, "relu": True},
    "cosine, float32": {"dtype": F32, "relu": True},
    "float16": {"dtype": F16},
    "decay": {"dtype": BF16, "decay": True, "relu": True},
    "two-sided": {"dtype": BF16, "later": True, "angles": True, "relu": True},
    "two-sided, float32": {"dtype": F32, "later": True, "relu": True},
    "leap": {"dtype": BF16, "leap": 16},
    "leap with decay": {"dtype": BF16, "leap": 1, "decay": True},
    "leap, staircase": {"dtype": BF16, "leap": 32, "visible": "counts", "mask": True},
    "leap, float32": {"dtype": F32, "leap": 32, "visible": "all", "mask": True, "K": 32, "V": 32},
    "grouped heads": {"dtype": BF16, "G": 1},
    "packed": {"dtype": BF16, "packed": True},
    "wikitext103": {"dtype": BF16, "K": 128, "V": 128, "leap": 32},
    "32 wide": {"dtype": BF16, "K": 32, "V": 32},
    "128 wide": {"dtype": BF16, "K": 128, "V": 128},
    "256 wide": {"dtype": BF16, "K": 256, "V": 256, "R": 1},
    "rank 4": {"dtype": BF16, "R": 4, "visible": "all"},
}


class Machine:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Stands in for `leapformer.ops.triton.plan.launch`: compiles what would be launched."""

    def __init__(self) -> None:
        self.case, self.needs, self.told = "", {}, set()

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = kernel.warmup(*args, grid=grid, **constants)
        if compiled.hash not in self.needs:  # a second time there is no log
            (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue()))
            self.needs[compiled.hash] = {"spilled": spilled, "registers": int(registers)}
        if (self.case, compiled.hash) in self.told:
            return
        self.told.add((self.case, compiled.hash))
        shape = next((a for a in args if isinstance(a, kernels.Shape)), None)
        sizes = constants if shape is None else constants | {name: size.value for name, size in shape._asdict().items()}
        capability = driver.active.get_current_device()
        line = {
            "case": self.case,
            "kernel": kernel.__name__,
            "capability": capability,
            "reverse": constants.get("REVERSE", False),
            "shared": compiled.metadata.shared,
            "limit": SHARED[capability],
            **self.needs[compiled.hash],
            "tiles": {n: sizes[n] for n in ("C", "BK", "BV", "num_warps", "num_stages") if n in sizes},
        }
        print(json.dumps(line), flush=True)


def compile_case(
    dtype: torch.dtype,
    K: int = 64,
    V: int = 64,
    R: int = 2,
    G: int = 4,
    visible: str = "causal",
    leap: int = 0,
    decay: bool = False,
    later: bool = False,
    angles: bool = False,
    mask: bool = False,
    packed: bool = False,
    relu: bool = False,
) -> None:
    """Forward, backward and one step of a call of this shape; values play no part. ``leap``: hidden size, 1 for
    none.
    """
    T, H = 4096, 4

    def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def module() -> tuple[torch.Tensor | None, ...]:
        if leap == 1:
            return None, None, zeros(1, K), zeros(1)
        return zeros(1, leap, K), zeros(1, leap), zeros(1, leap), zeros(1)

    q, k, v = (zeros(1, T, heads, width, dtype=dtype) for heads, width in ((H, K), (G, K), (G, V)))
    pair = (zeros(1, T, H, R // 2), zeros(1, T, G, R // 2)) if angles else (zeros(1, T, H, R), zeros(1, T, G, R))
    names = ("q_angles", "k_angles") if angles else ("q_factors", "k_factors")
    weightings = {} if R == 1 or leap else dict(zip(names, pair, strict=True))
    log_decay = zeros(1, T, H) if decay or later else None
    later_decay = zeros(1, T, H) if later else None
    leaps = (*module(), *module()) if leap else (None,) * 8
    key_mask = torch.ones(1, T, dtype=torch.bool) if mask else None
    counts = torch.zeros(1, T, dtype=torch.int64) if visible == "counts" else None
    bounds = torch.tensor([0, T // 2, T], dtype=torch.int32) if packed else None
    weights = by_name("q", leaps[:4]) | by_name("k", leaps[4:])
    masks: dict[str, Any] = {"key_mask": key_mask, "counts": counts, "cu_seqlens": bounds, "cu_seqlens_k": bounds}
    options = {"causal": visible == "causal", "relu": relu or leap > 0}
    decays = {"log_decay": log_decay, "later_decay": later_decay}
    x = Arguments(q, k, v, **weightings, **decays, **weights, **masks, **options)
    results = operator._forward(x)
    operator._backward(x, results, Incoming(*(torch.zeros_like(t) for t in results[:3])))
    _, kv, z, *_ = results
    one = {name: t[:, :1] for name, t in {"q": q, "k": k, "v": v, **weightings}.items()}
    state = {"kv": kv[:1], "z": z[:1]}
    operator._step(
        Arguments(**one, **state, log_decay=log_decay, key_mask=key_mask, causal=True, **weights, relu=x.relu)
    )


def main(names: list[str]) -> None:
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # what is taken from the cache has no log
    compiler = Compiler()
    plan.launch = operator.launch = compiler.launch
    for name in names or CASES:
        compiler.case = name
        for capability in SHARED:
            driver.set_active(Machine(capability))
            compile_case(**CASES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
