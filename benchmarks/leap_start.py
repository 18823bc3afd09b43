"""How the LeaP modules of a language-model recipe start: the spread of their proportions and the gradients they get.

    LEAPFORMER_DATA=... python benchmarks/leap_start.py [RECIPE] [KEY=VALUE ...] [--run RUN ...]

Prints one Markdown row per start ("default", "spread") and seed, over one batch of validation text, and one per trained
run that is named. Columns, each a mean over layers: the standard deviation over tokens of the query and of the key
proportions; the mean of P_q - P_k; the share of the attention weights' logarithm that the re-weighting varies by, as
the standard deviation over keys of ln cos(pi/2 (P_q - P_k)); and the root mean square of the gradient of the LeaP
weights, divided by that of the query and key projections.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from leapformer.nn.linear import LinearAttention
from leapformer.tasks.registry import load_recipe
from leapformer.training.loading import load_model

STARTS = ("default", "spread")


def proportions_of(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(P_q [B, T, H], P_k [B, T, G]) of each LeaP layer; the gradients of the loss are left in the model."""
    layers = [m for m in model.modules() if isinstance(m, LinearAttention) and m.q_proportion is not None]
    seen: dict[int, Tensor] = {}
    handles = []
    for layer in layers:
        for module in (layer.q_proportion, layer.k_proportion):
            assert isinstance(module, nn.Module)
            handles.append(module.register_forward_hook(lambda m, _, out: seen.update({id(m): out.detach()})))
    model.zero_grad()
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return [(seen[id(layer.q_proportion)], seen[id(layer.k_proportion)]) for layer in layers]


def rms(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors) / sum(t.numel() for t in tensors))


def row(name: str, model: nn.Module, batch: dict[str, Tensor]) -> str:
    pairs = proportions_of(model, batch)
    q_std = sum(float(q.std()) for q, _ in pairs) / len(pairs)
    k_std = sum(float(k.std()) for _, k in pairs) / len(pairs)
    gap = sum(float(q.mean() - k.mean()) for q, k in pairs) / len(pairs)
    spread = 0.0
    for q, k in pairs:
        # Each query against the keys of its text; the clamp keeps the logarithm finite.
        cosine = torch.cos(math.pi / 2 * (q[:, :, None] - k[:, None, :])).clamp(min=1e-3)
        spread += float(cosine.log().std(dim=2).mean()) / len(pairs)
    leap = [p.grad for n, p in model.named_parameters() if "proportion" in n and p.grad is not None]
    projections = [p.grad for n, p in model.named_parameters() if n.endswith(("q_proj.weight", "k_proj.weight"))]
    ratio = rms(leap) / rms([p for p in projections if p is not None])
    return f"| {name} | {q_std:.4f} | {k_std:.4f} | {gap:+.3f} | {spread:.5f} | {ratio:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="lm/wikitext2-small")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--run", action="append", default=[], type=Path, help="a trained run to look at as well")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print("| start | std of P_q | std of P_k | mean of P_q - P_k | std of ln cos | gradient ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    cache = Path(tempfile.gettempdir()) / "leapformer-leap-start"
    for start in STARTS:
        for seed in range(arguments.seeds):
            recipe, task = load_recipe(
                arguments.recipe, [*arguments.overrides, "attention=leap", f"leap_start={start}"]
            )
            data: Any = task.prepare(recipe, cache=cache)
            set_seed(seed)
            print(row(f"{start}, seed {seed}", data.build_model(), first_batch(data)), flush=True)
    for run in arguments.run:
        recipe, task = load_recipe(run / "recipe.yaml")
        data = task.prepare(recipe, cache=cache)
        print(row(f"trained: {run.name}", load_model(run / "model"), first_batch(data)), flush=True)


def first_batch(data: Any) -> dict[str, Tensor]:
    dataset = data.packed("validation")
    return data.collator([dataset[index] for index in range(8)])


if __name__ == "__main__":
    main()
