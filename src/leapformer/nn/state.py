"""What an attention layer keeps between calls.

Letters: B batch, S tokens kept, G heads, K, V widths, W convolution width, M chunks of a source, R rank of the
re-weighting, H query heads, m clocks of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.nn.packing import sequence_of
from leapformer.ops import LinearState

TENSORS = ("length", "keys", "values", "key_mask", "conv", "chunk_keys", "clock", "query_clock")


@dataclass
class LayerState:
    """The past of one layer.

    Attributes:
        length: int64 [B], real tokens seen so far.
        linear: the state of linear attention, of constant size; None for softmax.
        keys, values: [B, S, G, K], [B, S, G, V] of softmax attention, growing; None for linear attention.
        key_mask: bool [B, S] for keys and values.
        conv: [B, W - 1, D], the last inputs of the short convolution; None without one.
        chunk_keys: [B, M, G, R, K], the sum of the key features of every chunk of a source, where its mass is asked
            for.
        clock, query_clock: float64 [B, G, m] and [B, H, m], the angles at which running proportions stand; of a
            source's keys, and of the target's queries in cross-attention.
    """

    length: Tensor
    linear: LinearState | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    key_mask: Tensor | None = None
    conv: Tensor | None = None
    chunk_keys: Tensor | None = None
    clock: Tensor | None = None
    query_clock: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = sum(t.numel() * t.element_size() for t in self._tensors().values())
        return own + (0 if self.linear is None else self.linear.nbytes)

    def snapshot(self) -> LayerState:
        """An independent copy."""
        linear = None if self.linear is None else self.linear.clone()
        return replace(self, linear=linear, **{name: t.clone() for name, t in self._tensors().items()})

    def restore(self, snapshot: LayerState) -> None:
        """Go back to ``snapshot``, in place where the shapes are the same (then addresses stay)."""
        if self.linear is not None and snapshot.linear is not None:
            if self.linear is not snapshot.linear:  # attention may have written there itself
                self.linear.copy_(snapshot.linear)
        else:
            self.linear = None if snapshot.linear is None else snapshot.linear.clone()
        for name in TENSORS:
            own, kept = getattr(self, name), getattr(snapshot, name)
            if own is not None and kept is not None and own.shape == kept.shape:
                own.copy_(kept)
            else:
                setattr(self, name, None if kept is None else kept.clone())

    def reorder(self, index: Tensor) -> LayerState:
        """Row b of the result is row index[b] of this state; ``index`` int64 of any length."""
        linear = None if self.linear is None else self.linear.reorder(index)
        return replace(self, linear=linear, **{name: t.index_select(0, index) for name, t in self._tensors().items()})

    def take(self, index: Tensor) -> LayerState:
        """``reorder``, without the masked keys that the company of longer rows gave these."""
        state = self.reorder(index)
        state.compact()
        return state

    @staticmethod
    def join(states: Sequence[LayerState]) -> LayerState:
        """The rows of several states of one layer behind one another; shorter rows get masked keys and empty chunks."""
        keys, values, key_mask = None, None, None
        if states[0].keys is not None:
            keys, values, masks = (torch.cat(part) for part in _aligned(states))
            key_mask = None if bool(masks.all()) else masks
        return LayerState(
            length=torch.cat([state.length for state in states]),
            linear=_join_linear([state.linear for state in states if state.linear is not None]),
            keys=keys,
            values=values,
            key_mask=key_mask,
            conv=_join_rows([state.conv for state in states if state.conv is not None]),
            chunk_keys=_join_rows(_as_long([state.chunk_keys for state in states if state.chunk_keys is not None])),
            clock=_join_rows([state.clock for state in states if state.clock is not None]),
            query_clock=_join_rows([state.query_clock for state in states if state.query_clock is not None]),
        )

    def put(self, index: Tensor, part: LayerState) -> None:
        """Row b of ``part`` takes the place of row index[b]; at fixed addresses, except for what grows."""
        self.length.index_copy_(0, index, part.length)
        for name in ("conv", "clock", "query_clock"):
            own, new = getattr(self, name), getattr(part, name)
            if own is not None and new is not None:
                own.index_copy_(0, index, new)
        if self.linear is not None and part.linear is not None:
            for own, new in zip(self.linear, part.linear, strict=True):
                if own is not None and new is not None:
                    own.index_copy_(0, index, new)
        if self.keys is not None:
            self.keys, self.values, self.key_mask = (
                own.index_copy(0, index, new) for own, new in _aligned([self, part])
            )
            self.compact()
        if self.chunk_keys is not None and part.chunk_keys is not None:
            own, new = _as_long([self.chunk_keys, part.chunk_keys])
            self.chunk_keys = own.index_copy(0, index, new)

    def append(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        """Keys and values [B, n, G, K], [B, n, G, V] behind those that are there; ``key_mask`` bool [B, n], True =
        real.
        """
        assert self.keys is not None and self.values is not None
        if key_mask is not None or self.key_mask is not None:
            self.key_mask = torch.cat([_mask_of(self.keys, self.key_mask), _mask_of(k, key_mask)], dim=1)
        self.keys, self.values = torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)
        self.compact()

    def compact(self) -> None:
        """As many slots for keys as the row with the most real ones has, and no mask where all have as many."""
        if self.key_mask is None or self.keys is None or self.values is None:
            return
        most = int(self.key_mask.sum(1).max()) if len(self.key_mask) else 0
        if most < self.key_mask.shape[1]:
            order = self.key_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            self.keys, self.values = (
                x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:])) for x in (self.keys, self.values)
            )
            self.key_mask = self.key_mask.gather(1, order)
        if bool(self.key_mask.all()):
            self.key_mask = None

    def update(self, new: LayerState) -> LayerState:
        """The state after one more call: without gradients it is written into this one's tensors, at fixed
        addresses.
        """
        if not self.updates_in_place or new.keys is not None:
            return new
        self.restore(new)
        return self

    @property
    def updates_in_place(self) -> bool:
        """Whether the state after one more call takes the place of this one."""
        return not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _tensors(self) -> dict[str, Tensor]:
        fields = {name: getattr(self, name) for name in TENSORS}
        return {name: t for name, t in fields.items() if t is not None}


def _mask_of(keys: Tensor, key_mask: Tensor | None) -> Tensor:
    return keys.new_ones(keys.shape[:2], dtype=torch.bool) if key_mask is None else key_mask


def _aligned(states: Sequence[LayerState]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Keys, values and masks of each state, with masked slots up to the number of the longest."""
    keys = [state.keys for state in states if state.keys is not None]
    values = [state.values for state in states if state.values is not None]
    masks = [_mask_of(k, state.key_mask) for k, state in zip(keys, states, strict=True)]
    return _as_long(keys), _as_long(values), _as_long(masks)


def _as_long(parts: Sequence[Tensor]) -> list[Tensor]:
    """Each [B, n, ...] with zeros up to the same n."""
    most = max((x.shape[1] for x in parts), default=0)
    return [F.pad(x, [0, 0] * (x.dim() - 2) + [0, most - x.shape[1]]) for x in parts]


def _join_rows(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat([*parts]) if parts else None


def _join_linear(states: Sequence[LinearState]) -> LinearState | None:
    if not states:
        return None
    decay = _join_rows([state.log_decay for state in states if state.log_decay is not None])
    return LinearState(torch.cat([state.kv for state in states]), torch.cat([state.z for state in states]), decay)


def real_tokens(
    x: Tensor, key_mask: Tensor | None, state: LayerState | None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """int64 [B], or [N] for N packed sequences: real tokens after x [B, T, D], those of the state included."""
    B, T = x.shape[:2]
    if cu_seqlens is None:
        new = torch.full((B,), T, dtype=torch.int64, device=x.device) if key_mask is None else key_mask.sum(1)
    elif key_mask is None:
        new = cu_seqlens.diff().to(torch.int64)
    else:
        row, _ = sequence_of(cu_seqlens, torch.arange(T, device=x.device))
        new = torch.zeros_like(cu_seqlens[1:], dtype=torch.int64).scatter_add(0, row, key_mask[0].to(torch.int64))
    return new if state is None else state.length + new
