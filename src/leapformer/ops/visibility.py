"""Who sees what: query i sees the first g(i) key slots, g never decreasing.

Letters: B batch, T queries, S keys.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

LARGEST = 2**30  # that a field may count for: beyond every length, and products stay within int64


class Staircase(NamedTuple):
    """g(i) = clip(offset + step * ((i + phase) // every), 0, S), with integers or int tensors [B] as fields.

    A field beyond 2^30, more than any length, counts as 2^30.
    """

    offset: int | Tensor
    step: int | Tensor = 0
    every: int | Tensor = 1
    phase: int | Tensor = 0

    @classmethod
    def causal(cls) -> Staircase:
        """g(i) = i + 1: language models and decoders."""
        return cls(offset=1, step=1)

    @classmethod
    def blocks(cls, size: int) -> Staircase:
        """g(i) = (i // size + 1) size: a streaming encoder that sees whole blocks of ``size`` and the past."""
        return cls(offset=size, step=size, every=size)

    @classmethod
    def wait_k(cls, k: int | Tensor, ratio: int) -> Staircase:
        """g(i) = (k + i) ratio: wait-k cross-attention over a source read ``ratio`` states at a time."""
        return cls(offset=k * ratio, step=ratio)

    def counts(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """g as int64 [B, T], or [1, T] where all fields are integers, clipped to [0, S]."""
        i = torch.arange(T, dtype=torch.int64, device=device)[None]
        return self.at(i, S)

    def at(self, i: Tensor, S: int | Tensor) -> Tensor:
        """g at query indices ``i`` int64 [1 or B, T]."""

        def column(field: int | Tensor) -> int | Tensor:
            if not isinstance(field, Tensor):
                return field if -LARGEST <= field <= LARGEST else LARGEST if field > 0 else -LARGEST
            return field.to(i.device, torch.int64).clamp(-LARGEST, LARGEST).reshape(-1, 1)

        offset, step, every, phase = (column(field) for field in self)
        g = offset + step * torch.div(i + phase, every, rounding_mode="floor")
        return torch.minimum(g.clamp(min=0), S) if isinstance(S, Tensor) else g.clamp(0, S)


Visible: TypeAlias = Literal["all", "causal"] | Staircase | Tensor
