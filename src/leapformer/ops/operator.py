"""An implementation of attention as a PyTorch custom operator with its gradient: the same form for all of them.

The operator exists so that torch.compile and torch.export see one opaque call with known shapes, and autograd one node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from leapformer.ops.arguments import DIFFERENTIABLE, NO_MODULE, TENSORS, Arguments, LeapWeights
from leapformer.ops.autocast import without_autocast
from leapformer.ops.state import LinearState

_ALWAYS = ("q", "k", "v")
_INPUTS = ", ".join(("Tensor " if name in _ALWAYS else "Tensor? ") + name for name in Arguments._fields[:TENSORS])
_OPTIONS = "bool causal, bool normalize, float eps, bool relu"


class Operator:
    """Two custom operators, ``leapformer::NAME`` and that of its gradient, and the doors to them.

    Args:
        name: in the namespace "leapformer".
        forward: from ``Arguments`` to (output, final kv, final z, and what else the gradient needs), ``results`` in all.
        empty: from ``Arguments`` to tensors of the same shapes and dtypes, whose values nobody reads.
        backward: from ``Arguments``, the results, and the gradients of output, kv and z to a gradient or None for each of
            ``Arguments.differentiable``. Those of kv and z are None where nothing depends on the state.
        direct: from ``Arguments`` to (output, kv, z) where no gradient is asked for and no compiler looks on. The operator's
            dispatch costs more than the arithmetic of one token.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[[Arguments], Sequence[Tensor]],
        empty: Callable[[Arguments], Sequence[Tensor]],
        backward: Callable[..., Sequence[Tensor | None]],
        direct: Callable[[Arguments], Sequence[Tensor]],
        results: int,
    ) -> None:
        self._direct = direct
        self._backward = backward
        tensors = ", ".join(["Tensor"] * results)
        saved = ", ".join(f"Tensor result{i}" for i in range(results))
        gradients = "Tensor grad, Tensor? grad_kv, Tensor? grad_z"
        self.forward_op = torch.library.custom_op(
            f"leapformer::{name}", lambda *given: tuple(forward(Arguments(*given))), mutates_args=(),
            schema=f"({_INPUTS}, {_OPTIONS}) -> ({tensors})",
        )  # fmt: skip
        self.forward_op.register_fake(lambda *given: tuple(empty(Arguments(*given))))
        self.backward_op = torch.library.custom_op(
            f"leapformer::{name}_backward", self._gradients, mutates_args=(),
            schema=f"({_INPUTS}, {saved}, {gradients}, {_OPTIONS}) -> Tensor[]",
        )  # fmt: skip
        self.backward_op.register_fake(_like_inputs)
        self.forward_op.register_autograd(self._autograd, setup_context=_save)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_factors: Tensor | None, k_factors: Tensor | None, *, causal: bool,
        counts: Tensor | None, key_mask: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
        log_decay: Tensor | None, initial_state: LinearState | None, normalize: bool, eps: float, relu: bool,
        q_leap: LeapWeights | None = None, k_leap: LeapWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Output [B, T, H, V] and the final kv and z; arguments checked and lowered by ``leapformer.ops.api``."""
        kv, z = (None, None) if initial_state is None else (initial_state.kv, initial_state.z)
        x = Arguments(
            q, k, v, q_factors, k_factors, log_decay, kv, z, *(q_leap or NO_MODULE), *(k_leap or NO_MODULE), key_mask, counts, cu_seqlens, cu_seqlens_k, causal,
            normalize, eps, relu,
        )  # fmt: skip
        output, kv, z, *_ = self.forward_op(*x) if _needs_operator(x) else self._direct(x)
        return output, kv, z

    def attend_leap(
        self, q: Tensor, k: Tensor, v: Tensor, q_leap: LeapWeights, k_leap: LeapWeights, **keywords: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same from plain projections q and k and the weights of two LeaP modules; other keywords but relu."""
        return self.attend(q, k, v, None, None, relu=True, q_leap=q_leap, k_leap=k_leap, **keywords)

    def _gradients(self, *given: Any) -> list[Tensor]:
        """Of those of ``Arguments.differentiable`` that are there, in their order."""
        options = len(Arguments._fields) - TENSORS
        x = Arguments(*given[:TENSORS], *given[-options:])
        *results, grad, grad_kv, grad_z = given[TENSORS:-options]
        with without_autocast(x.q.device.type):
            gradients = self._backward(x, results, grad, grad_kv, grad_z)
        pairs = zip(gradients, x.differentiable, strict=True)
        return [g.to(t.dtype).contiguous() for g, t in pairs if g is not None and t is not None]

    def _autograd(self, ctx: Any, grad: Tensor | None, grad_kv: Tensor | None, grad_z: Tensor | None, *_: Any) -> tuple:
        tensors = ctx.saved_tensors  # once: under checkpointing a second reading is an error
        inputs, results = tensors[:TENSORS], tensors[TENSORS:]
        grad = torch.zeros_like(results[0]) if grad is None else grad
        gradients = iter(self.backward_op(*inputs, *results, grad, grad_kv, grad_z, *ctx.options))
        found = [None if t is None else next(gradients) for t in inputs[:DIFFERENTIABLE]]
        return (*found, *[None] * (len(Arguments._fields) - DIFFERENTIABLE))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.mark_non_differentiable(*output[3:])
    # Else every result that got no gradient would get one of zeros, as large as it is itself.
    ctx.set_materialize_grads(False)
    ctx.options = inputs[TENSORS:]


def _like_inputs(*given: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in given[:DIFFERENTIABLE] if t is not None]


def _needs_operator(x: Arguments) -> bool:
    """Whether a compiler or autograd looks on."""
    if torch.compiler.is_compiling() or type(x.q) is not Tensor:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x.differentiable)
