"""The proportions that a trained model gives to the tokens of a text, layer by layer and head by head.

A LeaPformer weighs query i and key j by relu(q_i) . relu(k_j) * cos(pi/2 (P_q(i) - P_k(j))), and learns the proportions
P_q and P_k in [0, 1] (equations 6 and 7 of the paper; arXiv 2405.13046). Running proportions are clocks: every token
takes a step in [0, 1] that is learned, and the proportion is the sum of the steps so far.

    T tokens, H query heads, G key heads, m clocks of a head
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leapformer.errors import LeapformerError
from leapformer.nn.clocks import Clocks
from leapformer.nn.proportions import LeapModule


@dataclass(frozen=True)
class LayerProportions:
    """Learned proportions of one attention layer.

    Attributes:
        layer: name of the layer in the model, such as "model.layers.0.attention".
        queries: P_q, float32 [T, H].
        keys: P_k, float32 [T, G].
        steps: of running proportions, float32 [T, G]; then queries and keys are both [T, G m], the turns that each
            clock has made, theta times the sum of the steps over 2 pi.
    """

    layer: str
    queries: Tensor
    keys: Tensor
    steps: Tensor | None = None


@torch.no_grad()
def learned_proportions(model: nn.Module, input_ids: Tensor | Sequence[int]) -> list[LayerProportions]:
    """Proportions of every LeaP layer on one text, in the order in which the layers run.

    Arguments:
        model: a `LeapformerForCausalLM`, or any module that takes `input_ids` [1, T] and holds LeaP attention.
        input_ids: the text's token ids, int64 [T] (or [1, T]).

    Raises:
        LeapformerError: the model has no LeaP module (another attention).
        ValueError: no tokens, or more than one text.
    """
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected the tokens of one text, [T] or [1, T], found {list(ids.shape)}")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with _recorded(model) as recorded:
            model(input_ids=ids.to(device), use_cache=False)
    finally:
        model.train(training)
    return list(_by_layer(model, recorded))


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each LeaP module of the model returned last, by its name, in the order of the calls."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LeapModule)}
    if not modules:
        raise LeapformerError(
            f"expected a model with learned proportions (attention=leap), found {type(model).__name__} without any"
        )
    recorded: dict[str, Tensor] = {}

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            recorded[name] = output.detach().float().cpu()[0]

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _by_layer(model: nn.Module, recorded: dict[str, Tensor]) -> Iterator[LayerProportions]:
    """The clocks of each attention layer, or its query and its key module side by side."""
    running = {name.removesuffix(".clocks.k_steps") for name in recorded if name.endswith(".clocks.k_steps")}
    for name, queries in recorded.items():
        layer, _, side = name.rpartition(".")
        if side == "k_steps":
            layer = layer.removesuffix(".clocks")
            turns = _turns(model.get_submodule(f"{layer}.clocks"), queries)
            yield LayerProportions(layer=layer, queries=turns, keys=turns, steps=queries)
        elif side == "q_proportion" and layer not in running:
            yield LayerProportions(layer=layer, queries=queries, keys=recorded[f"{layer}.k_proportion"])


def _turns(clocks: nn.Module, steps: Tensor) -> Tensor:
    """From steps [T, G] to the turns of all clocks [T, G m]."""
    assert isinstance(clocks, Clocks)
    rates = clocks.log_rates.detach().double().cpu().exp() / (2 * math.pi)
    return (steps.double().cumsum(0)[..., None] * rates).flatten(1).float()
