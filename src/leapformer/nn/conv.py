"""The short causal depthwise convolution in front of an attention layer, with its streaming state.

Letters: B batch, T tokens, N packed sequences, D hidden size, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.packing import sequence_of


class ShortConvolution(nn.Module):
    """y_t = sum_w weight[w] x_{t - w}, channel by channel. It starts near the identity: weight[0] = 1, the rest small."""

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

        Padding (``key_mask`` [B, T] False) counts as zero, and what follows goes on from each row's last real token.
        Packed sequences (``cu_seqlens``, B = 1) don't see one another; ``past`` and the result are [N, W - 1, D].
        """
        if key_mask is not None:
            x = x.masked_fill(~key_mask[..., None], 0)
        B, T, D = x.shape
        rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        past = x.new_zeros(rows, self.width - 1, D) if past is None else past.to(x.dtype)
        if cu_seqlens is not None:
            return self._packed(x, past, key_mask, cu_seqlens)
        padded = torch.cat([past, x], dim=1)
        if T == 1:
            y = (padded * self.weight.flip(0)).sum(1, keepdim=True)
        else:
            y = x * self.weight[0]
            for w in range(1, self.width):
                start = self.width - 1 - w
                y = torch.addcmul(y, padded[:, start : start + T], self.weight[w])
        if key_mask is None:
            return y, padded[:, T:]
        after = key_mask * torch.arange(1, T + 1, device=x.device)
        ends = F.pad(after, (1, 0)).amax(1)  # slots up to the last real one; 0 where there is none
        index = ends[:, None] + torch.arange(self.width - 1, device=x.device)
        return y, padded.gather(1, index[..., None].expand(-1, -1, D))

    def _packed(self, x: Tensor, past: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The same over packed sequences: an earlier input is a slot of the same sequence, or of its own ``past``."""
        (N, kept, D), T = past.shape, x.shape[1]
        slots = torch.arange(T, device=x.device)
        row, since_start = sequence_of(cu_seqlens, slots)
        inputs = torch.cat([past.reshape(N * kept, D), x[0]])
        y = x[0] * self.weight[0]
        for w in range(1, self.width):
            in_past = row * kept + kept - w + since_start
            y = torch.addcmul(y, inputs[torch.where(since_start < w, in_past, N * kept + slots - w)], self.weight[w])
        starts, ends = cu_seqlens[:-1].to(torch.int64), cu_seqlens.diff().to(torch.int64)
        if key_mask is not None:
            ends = torch.zeros_like(starts).scatter_reduce(0, row, key_mask[0] * (since_start + 1), "amax")
        place = ends[:, None] + torch.arange(-kept, 0, device=x.device)
        in_past = torch.arange(N, device=x.device)[:, None] * kept + kept + place
        return y[None], inputs[torch.where(place < 0, in_past, N * kept + starts[:, None] + place)]
