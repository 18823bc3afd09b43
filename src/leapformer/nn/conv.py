"""The short causal depthwise convolution in front of an attention layer, with its streaming state.

Letters: B batch, T tokens, D hidden size, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

        Padding (``key_mask`` [B, T] False) counts as zero; packed sequences (``cu_seqlens``) don't see one another.
        """
        if key_mask is not None:
            x = x.masked_fill(~key_mask[..., None], 0)
        B, T, D = x.shape
        if past is None:
            past = x.new_zeros(B, self.width - 1, D)
        padded = torch.cat([past.to(x.dtype), x], dim=1)
        y = x * self.weight[0]
        since_start = None
        if cu_seqlens is not None:
            slots = torch.arange(T, device=x.device)
            row = torch.searchsorted(cu_seqlens[1:].to(torch.int64).contiguous(), slots, right=True)
            since_start = slots - cu_seqlens.to(torch.int64)[row]
        for w in range(1, self.width):
            earlier = padded[:, self.width - 1 - w : self.width - 1 - w + T]
            if since_start is not None:
                earlier = earlier.masked_fill((since_start < w)[None, :, None], 0)
            y = torch.addcmul(y, earlier, self.weight[w])
        return y, padded[:, T:]
