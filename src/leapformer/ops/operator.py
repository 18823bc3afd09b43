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

from leapformer.ops.arguments import (
    ANGLES,
    DIFFERENTIABLE,
    FACTORS,
    FIELDS,
    MODULES,
    NUMBERS,
    TENSORS,
    Arguments,
    Gradients,
    Incoming,
)
from leapformer.ops.autocast import without_autocast
from leapformer.ops.checks import ORDINARY
from leapformer.ops.decay import without_resets
from leapformer.ops.implementation import BASIS

_NO_FORMULA = (
    'this implementation of linear attention has no autograd formula for them; impl="reference" works with all of them'
)

Compute = Callable[[Arguments], Sequence[Tensor]]
Differentiate = Callable[[Arguments, Sequence[Tensor], Incoming], Gradients]


class Operator:
    """The custom operator ``leapformer::NAME`` and the door to it; ``leapformer::NAME_leap`` where it takes LeaP
    modules, and ``leapformer::NAME_angles`` where it takes angles.

    Three, because every argument of an operator costs some microseconds a call, given or not.

    Args:
        name: in the namespace "leapformer".
        forward: from ``Arguments`` to (output, final kv, final z, and what else the gradient needs), ``results`` in
            all.
        empty: from ``Arguments`` to tensors of the same shapes and dtypes, whose values nobody reads.
        backward: from ``Arguments``, the results, and the gradients of output, kv and z to those of the arguments.
        direct: from ``Arguments`` to (output, kv, z) where no gradient is asked for and no compiler looks on. The
            operator's dispatch costs more than the arithmetic of one token. Its second argument says whether the final
            state may take the place of the initial one, which are then the same tensors.
        takes: the fields of ``Arguments`` that the operator has.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Compute,
        empty: Compute,
        backward: Differentiate,
        direct: Callable[[Arguments, bool], Sequence[Tensor]],
        results: int,
        takes: frozenset[str] = BASIS,
    ) -> None:
        self._direct = direct
        functions = forward, empty, backward
        self.linear = Form(name, takes - MODULES - ANGLES, functions, results)
        forms = (("leap", MODULES, FACTORS | ANGLES), ("angles", ANGLES, FACTORS | MODULES))
        self.leap, self.angles = (
            Form(f"{name}_{kind}", takes - others, functions, results) if takes >= own else self.linear
            for kind, own, others in forms
        )

    def attend(self, x: Arguments, update_state: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, T, H, V] and the final kv and z."""
        if not torch.compiler.is_compiling():
            given = [t for t in x[:TENSORS] if t is not None]
            _refuse_transforms(given)
            if not _needs_operator(x, given):
                output, kv, z, *_ = self._direct(x, update_state)
                if update_state:  # a graph that has kept the old state must not be followed backward with the new one
                    increment_version([t for t in (x.kv, x.z) if t is not None])
                return output, kv, z
        form = self.leap if x.q_w2 is not None else self.linear if x.q_angles is None else self.angles
        output, kv, z, *_ = form(x)
        return output, kv, z


class Form:
    """One pair of custom operators, forward and backward, whose arguments are the fields ``takes`` of ``Arguments``."""

    def __init__(
        self, name: str, takes: frozenset[str], functions: tuple[Compute, Compute, Differentiate], results: int
    ) -> None:
        forward, empty, self._backward = functions
        taken = [n for n in FIELDS if n in takes]
        self.tensors, self._numbers = [[n for n in taken if (n in NUMBERS) == number] for number in (False, True)]
        self._taken = [FIELDS.index(n) for n in taken]
        self._places = [taken.index(n) if n in takes else None for n in FIELDS]
        self._defaults = [Arguments._field_defaults.get(n) for n in FIELDS]
        self.differentiable = sum(n in takes for n in FIELDS[:DIFFERENTIABLE])
        inputs = ", ".join(("Tensor? " if n in Arguments._field_defaults else "Tensor ") + n for n in self.tensors)
        options = ", ".join(f"{NUMBERS[n].__name__} {n}" for n in self._numbers)
        saved = ", ".join(f"Tensor result{i}" for i in range(results))
        gradients = "Tensor grad, Tensor? grad_kv, Tensor? grad_z"
        self.forward_op = torch.library.custom_op(
            f"leapformer::{name}",
            lambda *given: tuple(forward(self.arguments(given))),
            mutates_args=(),
            schema=f"({inputs}, {options}) -> ({', '.join(['Tensor'] * results)})",
        )
        self.forward_op.register_fake(lambda *given: tuple(empty(self.arguments(given))))
        self.backward_op = torch.library.custom_op(
            f"leapformer::{name}_backward",
            self._gradients,
            mutates_args=(),
            schema=f"({inputs}, {saved}, {gradients}, {options}) -> Tensor[]",
        )
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
        pairs = zip(self._places, self._defaults, strict=True)
        return Arguments._make([default if place is None else given[place] for place, default in pairs])

    def _gradients(self, *given: Any) -> list[Tensor]:
        """Of the differentiable arguments that are there, in their order."""
        n, options = len(self.tensors), len(self._numbers)
        x = self.arguments((*given[:n], *given[-options:]))
        *results, grad, grad_kv, grad_z = given[n:-options]
        with without_autocast(x.q.device.type):
            gradients = self._backward(x, results, Incoming(grad, grad_kv, grad_z))
            gradients = gradients._replace(
                log_decay=without_resets(gradients.log_decay, x.log_decay, x.compute_dtype),
                later_decay=without_resets(gradients.later_decay, x.later_decay, x.compute_dtype),
            )
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
        return (*found, *[None] * (n - self.differentiable + len(self._numbers)))


def _needs_operator(x: Arguments, given: list[Tensor]) -> bool:
    """Whether autograd looks on, or a tensor's bytes are not its values (a subclass, a negative that is yet to be
    taken): the dispatch of an operator turns those into what they stand for."""
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
