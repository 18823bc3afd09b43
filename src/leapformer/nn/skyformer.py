"""Skyformer. Letters: B batch, T tokens, H heads, K head width, M landmarks of queries, and as many of keys."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.nn.bidirectional import BidirectionalAttention, SharedBidirectional, lengths
from leapformer.nn.layer import Capabilities, Mechanism
from leapformer.nn.nystromformer import pseudo_inverse
from leapformer.ops.autocast import without_autocast


class SkyformerAttention(BidirectionalAttention):
    """C v with C_ij = exp(-|q_i - k_j|^2 / (2 sqrt(K))), by Nystrom's method and without a normaliser (arXiv
    2111.00035, eq. 5).

    The Gaussian kernel of all queries and keys stacked is positive semi-definite. With C_S its columns at the
    landmarks, half of them queries, half keys, C is nearly C_S (C_SS + gamma)^-1 C_S^T, whose inverse is iterated after
    scaling rows and columns by their sums (the paper's lemma 3). The landmarks are drawn one from each of M segments of
    equal length: at random in training, the middle ones in evaluation. Padding changes nothing. Dropout is on the
    output.

    Args:
        num_features: 2 M. gamma: added to the diagonal of C_SS. iterations: of the inverse. The others as in
            ``BidirectionalAttention``.
    """

    name = "skyformer"
    capabilities = Capabilities(causal=False, cross=False, streaming=False, arbitrary_length=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_features: int = 128,
        gamma: float = 0.1,
        iterations: int = 6,
        **shared: Unpack[SharedBidirectional],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.num_landmarks, self.gamma, self.iterations = max(1, num_features // 2), gamma, iterations

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        places, seen = self._places(lengths(mask, k), k.shape[1])
        if mask is not None:
            v = v.masked_fill(~mask[:, :, None, None], 0)
        with without_autocast(q.device.type):
            wide = torch.promote_types(q.dtype, torch.float32)
            rows, columns = (x.transpose(1, 2).to(wide) for x in (q, k))
            marks = torch.cat([_rows(rows, places), _rows(columns, places)], 2)
            seen = torch.cat([seen, seen], 1)[:, None, :, None]  # of the landmarks, [B or 1, 1, 2 M, 1]
            right = gaussian(marks, columns) @ v.transpose(1, 2).to(wide) * seen
            middle = self._inverse(gaussian(marks, marks), seen)
            y = gaussian(rows, marks) @ (middle @ right)
        return F.dropout(y.to(q.dtype).transpose(1, 2), self.dropout, self.training)

    def _places(self, real: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Landmarks int64 [B or 1, M] among ``real`` tokens [B or 1], and which there are: a token is none twice."""
        M = min(self.num_landmarks, T)
        count = real.clamp(max=M)[:, None]
        ranks = torch.arange(M, device=real.device)
        within = self.random(M).to(real.device) if self.training else 0.5
        start, end = ranks * real[:, None] // count, (ranks + 1) * real[:, None] // count
        places = start + (within * (end - start)).long()
        return places.minimum(real[:, None] - 1), ranks < count

    def _inverse(self, c: Tensor, seen: Tensor) -> Tensor:
        """(c + gamma)^-1 for symmetric c [B, H, 2 M, 2 M] on the landmarks that there are, 0 elsewhere."""
        pairs = seen & seen.transpose(-1, -2)
        c = (c + self.gamma * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)).masked_fill(~pairs, 0)
        scale = c.sum(-1, keepdim=True).masked_fill(~seen, 1).rsqrt()
        scale = scale * scale.transpose(-1, -2)
        return pseudo_inverse(c * scale, self.iterations) * scale


MECHANISM = Mechanism(
    name=SkyformerAttention.name,
    layer=SkyformerAttention,
    label="Skyformer",
    options={"num_features": "attention_features", "seed": None},
)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / (2 sqrt(K))): a [..., M, K], b [..., N, K] -> [..., M, N]."""
    squares = a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :] - 2 * a @ b.transpose(-1, -2)
    return torch.exp(squares.clamp(min=0) * (-0.5 * a.shape[-1] ** -0.5))


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """x [B, H, T, K] at places [B or 1, M] -> [B, H, M, K]."""
    B, H, _, K = x.shape
    return x.gather(2, places[:, None, :, None].expand(B, H, -1, K))
