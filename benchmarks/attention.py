"""Causal attention on the CPU: impl="torch" against PyTorch's scaled_dot_product_attention, forward + backward.

    python benchmarks/attention.py [--lengths 512 1024 ...] [--json benchmarks/results/NAME.json]

B = 1, H = 8, K = V = 64, float32, random dense cotangents. The contenders take turns in one run, after a warm-up; a figure
is the median of process CPU time on one thread (p20 .. p80), which holds on a machine that has other work too. "ours"
starts where SDPA starts, from plain q, k and v: its ReLU, sines and cosines are inside the measurement. Memory is what the
allocator held at its peak beyond the inputs, from PyTorch's own profiler, in a run apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from leapformer.ops import LeapWeights, cosine_factors, leap_attention, linear_attention

B, H, K = 1, 8, 64
# How many times SDPA's speed is owed, and aimed at, for each length.
TARGETS = {512: (1.0, 1.2), 1024: (1.6, 1.9), 2048: (2.3, 2.6), 4096: (5, 6), 8192: (9, 10), 16384: (17, 20)}
MEMORY_TARGET = 1.7


def contenders(N: int) -> dict[str, Callable[[], object]]:
    """Forward + backward of each contender at length N, as functions without arguments."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    q, k, v = (leaf(B, N, H, K) for _ in range(3))
    p_q, p_k = (torch.rand(B, N, H, generator=generator).requires_grad_() for _ in range(2))
    weights = [leaf(1, 16, K), leaf(1, 16), leaf(1, 16), leaf(1)]
    cotangent = torch.randn(B, N, H, K, generator=generator)
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    cotangent_heads_first = cotangent.transpose(1, 2).contiguous()

    def sdpa() -> object:
        output = F.scaled_dot_product_attention(*heads_first, is_causal=True)
        return torch.autograd.grad(output, heads_first, cotangent_heads_first)

    def linear() -> object:
        factors = cosine_factors(p_q), cosine_factors(p_k)
        output = linear_attention(q.relu(), k.relu(), v, *factors, visible="causal", impl="torch").output
        return torch.autograd.grad(output, (q, k, v, p_q, p_k), cotangent)

    def leap() -> object:
        leap_weights = LeapWeights(*weights)
        output = leap_attention(q, k, v, leap_weights, leap_weights, visible="causal", impl="torch").output
        return torch.autograd.grad(output, (q, k, v, *weights), cotangent)

    return {"sdpa": sdpa, "ours": linear, "ours with LeaP module": leap}


def measure(N: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of every round of every contender, in turns."""
    runs = contenders(N)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) * 1e3)
    return times


def peak_memory_mib(run: Callable[[], object]) -> float:
    """The most memory held at once by tensors that the run allocated, in MiB."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as recorded:
        run()
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"median": statistics.median(values), "p20": at(0.2), "p80": at(0.8)}


def machine() -> dict[str, object]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    ) if Path("/proc/cpuinfo").exists() else platform.processor()  # fmt: skip
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "cpu": model,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "git": revision.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def row(N: int, times: dict[str, list[float]], memory: dict[str, float]) -> dict[str, object]:
    cpu = {name: spread(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["sdpa"], times["ours"], strict=True)]
    accept, stretch = TARGETS.get(N, (None, None))
    return {
        "N": N,
        "cpu_ms": cpu,
        "sdpa_over_ours": spread(ratios),
        "accept": accept,
        "stretch": stretch,
        "memory_mib": memory,
        "memory_ours_over_sdpa": memory["ours"] / memory["sdpa"],
    }


def table(rows: list[dict]) -> str:
    def cell(s: dict[str, float]) -> str:
        return f"{s['median']:.1f} ({s['p20']:.1f} .. {s['p80']:.1f})"

    head = "| N | SDPA / ours | accept | stretch | SDPA ms | ours ms | with LeaP module ms | memory MiB, SDPA / ours | ratio |"
    lines = [head, "|" + "---|" * 9]
    for r in rows:
        s, cpu, m = r["sdpa_over_ours"], r["cpu_ms"], r["memory_mib"]
        lines.append(
            f"| {r['N']} | **{s['median']:.2f}** ({s['p20']:.2f} .. {s['p80']:.2f}) | {r['accept']} | {r['stretch']} "
            f"| {cell(cpu['sdpa'])} | {cell(cpu['ours'])} | {cell(cpu['ours with LeaP module'])} "
            f"| {m['sdpa']:.0f} / {m['ours']:.0f} | {r['memory_ours_over_sdpa']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for N in arguments.lengths:
        rounds = arguments.rounds if N <= 4096 else max(3, arguments.rounds // 2)
        memory = {name: peak_memory_mib(run) for name, run in contenders(N).items()}
        rows.append(row(N, measure(N, rounds), memory))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    result = {"benchmark": "causal attention, forward + backward", "machine": machine(), "rows": rows}
    print("\n" + "  ".join(f"{key} {value}" for key, value in result["machine"].items()) + "\n\n" + table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
