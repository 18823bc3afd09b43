"""The short causal depthwise convolution in front of an attention layer, with its streaming state.

Letters: B batch, T tokens, N packed sequences, D hidden size, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.packing import check_packing, sequence_of


class ShortConvolution(nn.Module):
    """y_t = sum_w weight[w] x_{t - w}, channel by channel. It starts near the identity: weight[0] = 1, the rest
    small.
    """

    def __init__(self, hidden_size: int, *, width: int = 4) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"ShortConvolution: expected width >= 2, got {width}")
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.weight[0] = 1

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> (y [B, T, D], the last W - 1 inputs [B, W - 1, D], the ``past`` of what follows).

        Padding (``key_mask`` [B, T] False) is skipped, wherever it lies: y of the real tokens is what it is without
        padding, and what follows goes on from each row's last real token. Packed sequences (``cu_seqlens``, B = 1)
        don't see one another; ``past`` and the result are [N, W - 1, D].

        Raises:
            ValueError: ``cu_seqlens`` that doesn't divide the one row of x.
        """
        check_packing("convolution", x.shape, cu_seqlens)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        past = x.new_zeros(rows, self.width - 1, x.shape[2]) if past is None else past.to(x.dtype)
        if key_mask is None:
            return self._rows(x, past) if cu_seqlens is None else self._packed(x, past, cu_seqlens, cu_seqlens.diff())
        x = x.masked_fill(~key_mask[..., None], 0)
        if cu_seqlens is not None:
            lengths = _real_in_each(key_mask, cu_seqlens)
            bounds = F.pad(lengths.cumsum(0), (1, 0))
            bounds[-1] = x.shape[1]  # what lies behind the real tokens is padding, which nobody looks at
            y, tail = self._packed(x.gather(1, _front_order(key_mask, x)), past, bounds, lengths)
            return y.gather(1, _place_in_front(key_mask, x)), tail
        if _ends_with_padding(key_mask):
            return self._rows(x, past, key_mask.sum(1))
        y, tail = self._rows(x.gather(1, _front_order(key_mask, x)), past, key_mask.sum(1))
        return y.gather(1, _place_in_front(key_mask, x)), tail

    def _rows(self, x: Tensor, past: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows whose real tokens stand in front, ``lengths`` int64 [B] of them (None: all)."""
        T = x.shape[1]
        padded = torch.cat([past, x], dim=1)
        if T == 1:
            y = (padded * self.weight.flip(0)).sum(1, keepdim=True)
        else:
            y = x * self.weight[0]
            for w in range(1, self.width):
                start = self.width - 1 - w
                y = torch.addcmul(y, padded[:, start : start + T], self.weight[w])
        if lengths is None:
            return y, padded[:, T:]
        index = lengths[:, None] + torch.arange(self.width - 1, device=x.device)
        return y, padded.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

    def _packed(self, x: Tensor, past: Tensor, cu_seqlens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The same over packed sequences of ``lengths`` [N]: an earlier input is a slot of the same sequence, or of its
        past.
        """
        (N, kept, D), T = past.shape, x.shape[1]
        slots = torch.arange(T, device=x.device)
        row, since_start = sequence_of(cu_seqlens, slots)
        inputs = torch.cat([past.reshape(N * kept, D), x[0]])
        y = x[0] * self.weight[0]
        for w in range(1, self.width):
            in_past = row * kept + kept - w + since_start
            y = torch.addcmul(y, inputs[torch.where(since_start < w, in_past, N * kept + slots - w)], self.weight[w])
        starts = cu_seqlens[:-1].to(torch.int64)
        place = lengths.to(torch.int64)[:, None] + torch.arange(-kept, 0, device=x.device)
        in_past = torch.arange(N, device=x.device)[:, None] * kept + kept + place
        return y[None], inputs[torch.where(place < 0, in_past, N * kept + starts[:, None] + place)]


def _ends_with_padding(mask: Tensor) -> bool:
    """Whether it is known that padding [B, T] stands at the end of each row only; a look costs a synchronisation on a
    GPU.
    """
    if mask.shape[1] == 1:
        return True
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not bool((mask[:, 1:] > mask[:, :-1]).any())


def _front_order(mask: Tensor, x: Tensor) -> Tensor:
    """The index that brings the real slots of x [B, T, D] to the front, in order."""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return order[..., None].expand(x.shape)


def _place_in_front(mask: Tensor, x: Tensor) -> Tensor:
    """The index that brings each slot what stands for it in front; padding gets what the token before it does."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)[..., None].expand(x.shape)


def _real_in_each(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 [N]: real tokens of every packed sequence."""
    counts = F.pad(mask[0].long().cumsum(0), (1, 0))
    return counts[cu_seqlens.to(torch.int64)].diff()
