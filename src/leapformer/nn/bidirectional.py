"""What the bidirectional mechanisms that LeaPformer is compared with share: refusals, padding, and their random
numbers.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from leapformer.nn.layer import AttentionLayer, Call, Shared
from leapformer.nn.state import LayerState
from leapformer.ops.api import Visible


class SharedBidirectional(Shared, total=False):
    """Those of ``BidirectionalAttention``."""

    seed: int


class BidirectionalAttention(AttentionLayer):
    """An attention in which every query sees every key; a mechanism writes ``mix``.

    Padding may lie anywhere: real tokens are moved to the front, in order, before ``mix`` sees them, and back after it.
    A sample without a real key gets 0.

    Random numbers (``random``): in training from torch's own generator, as dropout's; in evaluation always the same
    ones, of ``seed``. Further arguments as in ``AttentionLayer``.
    """

    name: str

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        share_qk: bool = False,
        seed: int = 0,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(hidden_size, num_heads, share_qk=share_qk, **shared)
        self.seed = seed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call) -> tuple[Tensor, LayerState | None]:
        self._refuse(call)
        is_self, key_mask = call.is_self, call.key_mask
        repeats = self.num_heads // self.num_kv_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        if key_mask is None:
            return self.mix(q, k, v, None), None
        order = _front_order(key_mask)
        if order is not None:
            k, v, key_mask = _take(k, order), _take(v, order), _take(key_mask, order)
            q = _take(q, order) if is_self else q
        some = key_mask.any(1)
        # No mechanism has to think of a sample without keys: it sees one, and its output is not used.
        filled = key_mask | (torch.arange(key_mask.shape[1], device=q.device) == 0) & ~some[:, None]
        y = self.mix(q, k, v, filled)
        if order is not None and is_self:
            y = _take(y, order.argsort(1))
        return y.masked_fill(~some[:, None, None, None], 0), None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, T, H, K], k, v [B, S, H, K] -> [B, T, H, K]; mask [B, S] bool, the real keys first, at least one, or
        None.
        """
        raise NotImplementedError

    def random(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float32, on the CPU."""
        return torch.rand(*shape, generator=self.generator())

    def generator(self) -> torch.Generator | None:
        """None (torch's own) in training, else one of ``seed``, so that evaluations repeat themselves."""
        return None if self.training else torch.Generator().manual_seed(self.seed)

    def _check_packing(
        self, x: Tensor, context: Tensor | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None
    ) -> None:
        raise ValueError(f"{self.name} attention: expected a key_mask for sequences of several lengths, got cu_seqlens")

    def _refuse(self, call: Call) -> None:
        if not (isinstance(call.visible, str) and call.visible == "all"):
            raise ValueError(
                f"{self.name} attention: expected visible='all' (it is bidirectional), got {_shown(call.visible)}"
            )
        if call.stateful:
            raise ValueError(
                f"{self.name} attention: expected no state (it doesn't stream), got one or return_state=True"
            )
        if not call.is_self and not self.capabilities.cross:
            raise ValueError(
                f"{self.name} attention: expected self-attention, got a context (it has no cross-attention)"
            )


def lengths(mask: Tensor | None, like: Tensor) -> Tensor:
    """How many real keys each sample has, int64 [B], or [1] where all of ``like`` [B, S, ...] are real."""
    return torch.tensor([like.shape[1]], device=like.device) if mask is None else mask.sum(1)


def _front_order(mask: Tensor) -> Tensor | None:
    """int64 [B, S] that brings the real keys to the front; None where they are there."""
    if not bool((mask[:, 1:] > mask[:, :-1]).any()):
        return None
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def _shown(visible: Visible) -> str:
    return repr(visible) if isinstance(visible, str) else f"a {type(visible).__name__}"
