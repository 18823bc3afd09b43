"""What an attention layer keeps between calls. Letters: B batch, S tokens kept, G heads, K, V widths, W convolution width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leapformer.nn.packing import sequence_of
from leapformer.ops import LinearState

TENSORS = ("length", "keys", "values", "key_mask", "conv")


@dataclass
class LayerState:
    """The past of one layer.

    Attributes:
        length: int64 [B], real tokens seen so far.
        linear: the state of linear attention, of constant size; None for softmax.
        keys, values: [B, S, G, K], [B, S, G, V] of softmax attention, growing; None for linear attention.
        key_mask: bool [B, S] for keys and values.
        conv: [B, W - 1, D], the last inputs of the short convolution; None without one.
    """

    length: Tensor
    linear: LinearState | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    key_mask: Tensor | None = None
    conv: Tensor | None = None

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

    def update(self, new: LayerState) -> LayerState:
        """The state after one more call: without gradients it is written into this one's tensors, at fixed addresses."""
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
