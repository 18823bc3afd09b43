"""An implementation of attention as a PyTorch custom operator with its gradient: the same form for all of them.

The operator exists so that torch.compile and torch.export see one opaque call with known shapes, and autograd one node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from leapformer.ops.arguments import DIFFERENTIABLE, NO_MODULE, TENSORS, Arguments, LeapWeights
from leapformer.ops.autocast import without_autocast
from leapformer.ops.checks import ORDINARY
from leapformer.ops.decay import without_resets
from leapformer.ops.state import LinearState

_ALWAYS = ("q", "k", "v")
_OPTIONS = "bool causal, bool normalize, float eps, bool relu"
_MODULES = tuple(name for name in Arguments._fields if name.startswith(("q_w", "q_b", "k_w", "k_b")))
_FACTORS = ("q_factors", "k_factors")
_NUMBERS = Arguments._fields[TENSORS:]
_NO_FORMULA = (
    'this implementation of linear attention has no autograd formula for them; impl="reference" works with all of them'
)
_LOG_DECAY = Arguments._fields.index("log_decay")

Forward = Callable[[Arguments], Sequence[Tensor]]
Backward = Callable[..., Sequence[Tensor | None]]


class Operator:
    """The custom operator ``leapformer::NAME`` and the doors to it; ``leapformer::NAME_leap`` where it takes LeaP modules.

    Two, because every argument of an operator costs some microseconds a call, given or not.

    Args:
        name: in the namespace "leapformer".
        forward: from ``Arguments`` to (output, final kv, final z, and what else the gradient needs), ``results`` in all.
        empty: from ``Arguments`` to tensors of the same shapes and dtypes, whose values nobody reads.
        backward: from ``Arguments``, the results, and the gradients of output, kv and z to a gradient or None for each of
            ``Arguments.differentiable``. Those of kv and z are None where nothing depends on the state.
        direct: from ``Arguments`` to (output, kv, z) where no gradient is asked for and no compiler looks on. The operator's
            dispatch costs more than the arithmetic of one token. Its second argument says whether the final state may take
            the place of the initial one, which are then the same tensors.
        takes_leap: whether it computes LeaP modules itself.
    """

    def __init__(
        self, name: str, *, forward: Forward, empty: Forward, backward: Backward,
        direct: Callable[[Arguments, bool], Sequence[Tensor]], results: int, takes_leap: bool,
    ) -> None:  # fmt: skip
        self._direct = direct
        self.linear = Form(name, _MODULES, forward, empty, backward, results)
        self.leap = Form(f"{name}_leap", _FACTORS, forward, empty, backward, results) if takes_leap else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_factors: Tensor | None, k_factors: Tensor | None, *, causal: bool,
        counts: Tensor | None, key_mask: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
        log_decay: Tensor | None, initial_state: LinearState | None, normalize: bool, eps: float, relu: bool,
        update_state: bool = False, q_leap: LeapWeights | None = None, k_leap: LeapWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Output [B, T, H, V] and the final kv and z; arguments checked and lowered by ``leapformer.ops.api``."""
        kv, z = (None, None) if initial_state is None else (initial_state.kv, initial_state.z)
        x = Arguments(
            q, k, v, q_factors, k_factors, log_decay, kv, z, *(q_leap or NO_MODULE), *(k_leap or NO_MODULE), key_mask, counts,
            cu_seqlens, cu_seqlens_k, causal, normalize, eps, relu,
        )  # fmt: skip
        form = self.linear if q_leap is None or self.leap is None else self.leap
        if torch.compiler.is_compiling():
            output, kv, z, *_ = form(x)
        else:
            given = [t for t in x[:TENSORS] if t is not None]
            _refuse_transforms(given)
            if _needs_operator(x, given):
                output, kv, z, *_ = form(x)
            else:
                output, kv, z, *_ = self._direct(x, update_state)
                if update_state:  # a graph that has kept the old state must not be followed backward with the new one
                    increment_version([t for t in (x.kv, x.z) if t is not None])
        return output, kv, z

    def attend_leap(
        self, q: Tensor, k: Tensor, v: Tensor, q_leap: LeapWeights, k_leap: LeapWeights, **keywords: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same from plain projections q and k and the weights of two LeaP modules; other keywords but relu."""
        return self.attend(q, k, v, None, None, relu=True, q_leap=q_leap, k_leap=k_leap, **keywords)


class Form:
    """One pair of custom operators, forward and backward, that takes all of ``Arguments`` but the fields ``without``."""

    def __init__(
        self, name: str, without: Sequence[str], forward: Forward, empty: Forward, backward: Backward, results: int
    ) -> None:
        self._backward = backward
        self.tensors = [n for n in Arguments._fields[:TENSORS] if n not in without]
        taken = [*self.tensors, *_NUMBERS]
        self._taken = [Arguments._fields.index(n) for n in taken]
        self._places = [taken.index(n) if n in taken else None for n in Arguments._fields]
        self.differentiable = sum(n in self.tensors for n in Arguments._fields[:DIFFERENTIABLE])
        inputs = ", ".join(("Tensor " if n in _ALWAYS else "Tensor? ") + n for n in self.tensors)
        saved = ", ".join(f"Tensor result{i}" for i in range(results))
        gradients = "Tensor grad, Tensor? grad_kv, Tensor? grad_z"
        self.forward_op = torch.library.custom_op(
            f"leapformer::{name}", lambda *given: tuple(forward(self.arguments(given))), mutates_args=(),
            schema=f"({inputs}, {_OPTIONS}) -> ({', '.join(['Tensor'] * results)})",
        )  # fmt: skip
        self.forward_op.register_fake(lambda *given: tuple(empty(self.arguments(given))))
        self.backward_op = torch.library.custom_op(
            f"leapformer::{name}_backward", self._gradients, mutates_args=(),
            schema=f"({inputs}, {saved}, {gradients}, {_OPTIONS}) -> Tensor[]",
        )  # fmt: skip
        self.backward_op.register_fake(self._like_inputs)
        self.backward_op.register_autograd(_refuse_second)
        self.forward_op.register_autograd(self._autograd, setup_context=self._save)

    def __call__(self, x: Arguments) -> Sequence[Tensor]:
        return self.forward_op(*self.given(x))

    def given(self, x: Arguments) -> Sequence[Any]:
        """What the operator is called with."""
        return [x[place] for place in self._taken]

    def arguments(self, given: Sequence[Any]) -> Arguments:
        """What it was called with."""
        return Arguments._make([None if place is None else given[place] for place in self._places])

    def _gradients(self, *given: Any) -> list[Tensor]:
        """Of the differentiable arguments that are there, in their order."""
        n, options = len(self.tensors), len(_NUMBERS)
        x = self.arguments((*given[:n], *given[-options:]))
        *results, grad, grad_kv, grad_z = given[n:-options]
        with without_autocast(x.q.device.type):
            gradients = list(self._backward(x, results, grad, grad_kv, grad_z))
            of_decay = gradients[_LOG_DECAY]
            if of_decay is not None and x.log_decay is not None:
                wide = torch.promote_types(x.q.dtype, torch.float32)
                gradients[_LOG_DECAY] = without_resets(of_decay, x.log_decay, wide)
        pairs = zip(gradients, x.differentiable, strict=True)
        return [g.to(t.dtype).contiguous() for g, t in pairs if g is not None and t is not None]

    def _like_inputs(self, *given: Any) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in given[: self.differentiable] if t is not None]

    def _save(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        n = len(self.tensors)
        ctx.save_for_backward(*inputs[:n], *output)
        ctx.mark_non_differentiable(*output[3:])
        # Else every result that got no gradient would get one of zeros, as large as it is itself.
        ctx.set_materialize_grads(False)
        ctx.options = inputs[n:]

    def _autograd(self, ctx: Any, grad: Tensor | None, grad_kv: Tensor | None, grad_z: Tensor | None, *_: Any) -> tuple:
        tensors, n = ctx.saved_tensors, len(self.tensors)  # once: under checkpointing a second reading is an error
        inputs, results = tensors[:n], tensors[n:]
        grad = torch.zeros_like(results[0]) if grad is None else grad
        try:
            gradients = iter(self.backward_op(*inputs, *results, grad, grad_kv, grad_z, *ctx.options))
        except RuntimeError as error:
            if "Batching rule" not in str(error):
                raise
            raise RuntimeError(f"gradients in batches (is_grads_batched, vectorize): {_NO_FORMULA}") from None
        found = [None if t is None else next(gradients) for t in inputs[: self.differentiable]]
        return (*found, *[None] * (n - self.differentiable + len(_NUMBERS)))


def _needs_operator(x: Arguments, given: list[Tensor]) -> bool:
    """Whether autograd looks on, or a tensor's bytes are not its values (a subclass, a negative that is yet to be taken):
    the dispatch of an operator turns those into what they stand for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x.differentiable):
        return True
    return not ORDINARY.issuperset(map(type, given)) or any(map(Tensor.is_neg, given))


def _refuse_transforms(given: list[Tensor]) -> None:
    """One line where the operators would fail in several ways, or leave a tangent out unsaid."""
    if peek_interpreter_stack() is not None and any(
        is_functorch_wrapped_tensor(t) or (t.requires_grad and torch.is_grad_enabled()) for t in given
    ):
        raise RuntimeError(f"torch.func (vmap, grad, jvp, ...): {_NO_FORMULA}")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise RuntimeError(f"forward-mode derivatives: {_NO_FORMULA}")


def _refuse_second(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"second derivatives: {_NO_FORMULA}")
