"""Train, generation and encoder steps of the package in a folder, on one thread, and where the time of two goes.

To compare two revisions:

    git archive REVISION src | tar x --one-top-level=OLD
    python benchmarks/whole_model.py OLD/src
    python benchmarks/whole_model.py src
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# The package that is asked for, not the one that is installed.
sys.meta_path = [f for f in sys.meta_path if "ditable" not in type(f).__module__ + type(f).__name__]
sys.path.insert(0, str(Path(sys.argv[1]).resolve()))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from leapformer.models import LeapformerConfig, LeapformerForCausalLM  # noqa: E402
from leapformer.nn import EncoderBlock, build_attention  # noqa: E402

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "attention": "leap",
    "max_position_embeddings": 256,
}
TOKENS = 50  # of a measurement of generation
TOP = 8


def train_step(model: LeapformerForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def generation(model: LeapformerForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    with torch.no_grad():
        cache = model(ids[:1, :64], use_cache=True).past_key_values

    def run() -> None:
        with torch.no_grad():
            for _ in range(TOKENS):
                model(ids[:1, :1], past_key_values=cache, use_cache=True)

    return run


def encoder_step(tokens: int) -> Callable[[], None]:
    blocks = torch.nn.ModuleList(
        EncoderBlock(build_attention("leap", hidden_size=64, num_heads=2), hidden_size=64, intermediate_size=128)
        for _ in range(2)
    )
    x, cotangent = torch.randn(4, tokens, 64, requires_grad=True), torch.randn(4, tokens, 64)

    def run() -> None:
        hidden = x
        for block in blocks:
            hidden = block(hidden)[0]
        hidden.backward(cotangent)

    return run


def milliseconds(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(9):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def show_profile(run: Callable[[], None]) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = ", ".join(f"{event.key} {event.self_cpu_time_total / total:.0%}" for event in events[:TOP])
    print(f"    {sum(event.count for event in events):,} calls: {shares}")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, 2048, (8, 257))
    for variant in ("paper", "gated"):
        model = LeapformerForCausalLM(LeapformerConfig(**SMALL, variant=variant))
        step = train_step(model.train(), ids)
        print(f"train step, {variant}: {milliseconds(step):.1f} ms")
        show_profile(step)
        print(f"a generated token, {variant}: {milliseconds(generation(model.eval(), ids)) / TOKENS:.3f} ms")
    for tokens in (1024, 4096):
        step = encoder_step(tokens)
        print(f"encoder step, 4 x {tokens:,} tokens: {milliseconds(step):.1f} ms")
        show_profile(step)


if __name__ == "__main__":
    main()
