"""What an implementation of attention is to the doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from leapformer.ops.arguments import ANGLES, FACTORS, FIELDS, MODULES, Arguments

# What each of the four takes. A new field of ``Arguments`` is not in here: who supports it adds it.
BASIS = FACTORS | {
    "q",
    "k",
    "v",
    "log_decay",
    "kv",
    "z",
    "key_mask",
    "counts",
    "cu_seqlens",
    "cu_seqlens_k",
    "causal",
    "normalize",
    "eps",
    "relu",
}


def no_limits(x: Arguments | None) -> list[str]:
    """The limits of an implementation that has none."""
    return []


@dataclass(frozen=True)
class Implementation:
    """Who computes it.

    Args:
        attend: from lowered arguments, and whether the final state goes into the tensors of the initial one, to the
            output [B, T, H, V] and the final kv and z.
        takes: the fields of ``Arguments`` that it understands; a call with another one is refused. Without angles, or
            the weights of LeaP modules, it gets the factors that they give.
        limits: why it can't run here (None), or for a call; empty where it can.
    """

    attend: Callable[[Arguments, bool], tuple[Tensor, Tensor, Tensor]]
    takes: frozenset[str] = BASIS
    limits: Callable[[Arguments | None], list[str]] = no_limits
    takes_modules: bool = field(init=False)
    takes_angles: bool = field(init=False)
    _foreign: tuple[int, ...] = field(init=False)  # fields that it does not take, and that nothing can stand in for

    def __post_init__(self) -> None:
        foreign = tuple(i for i, name in enumerate(FIELDS) if name not in self.takes | MODULES | ANGLES)
        object.__setattr__(self, "takes_modules", self.takes >= MODULES)
        object.__setattr__(self, "takes_angles", self.takes >= ANGLES)
        object.__setattr__(self, "_foreign", foreign)

    def reasons(self, x: Arguments | None) -> list[str]:
        """Every reason why it can't run here, or for a call."""
        found = self.limits(x)
        if x is not None and self._foreign:
            given = [FIELDS[i] for i in self._foreign if _is_given(x, i)]
            return [*found, *(f"it does not take {name}" for name in given)]
        return found


def _is_given(x: Arguments, i: int) -> bool:
    default = Arguments._field_defaults[FIELDS[i]]
    return x[i] is not None if default is None else x[i] != default
