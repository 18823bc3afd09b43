"""``impl="torch"`` as a PyTorch custom operator: linear time and memory, own gradient, every argument, any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from leapformer.ops import layouts
from leapformer.ops.arguments import Arguments, Gradients, Incoming
from leapformer.ops.chunks import Result
from leapformer.ops.implementation import BASIS, Implementation
from leapformer.ops.operator import Operator


def _empty(x: Arguments) -> tuple[Tensor, ...]:
    (B, T, H, K), (G, V), dtype = x.q.shape, x.v.shape[2:], x.compute_dtype
    return (
        x.q.new_empty(B, T, H, V),
        x.q.new_empty(x.sequences, G, x.rank, K, V, dtype=dtype),
        x.q.new_empty(x.sequences, G, x.rank, K, dtype=dtype),
        x.q.new_empty(B, T if x.normalize else 0, H, dtype=dtype),
    )


def _backward(x: Arguments, results: Sequence[Tensor], incoming: Incoming) -> Gradients:
    return layouts.backward(x, Result(*results), incoming)


_TAKES = BASIS | {"later_decay"}
OPERATOR = Operator(
    "linear_attention",
    forward=layouts.forward,
    empty=_empty,
    backward=_backward,
    direct=lambda x, update_state: layouts.forward(x),
    results=4,
    takes=_TAKES,
)
IMPLEMENTATION = Implementation(OPERATOR.attend, takes=_TAKES)
