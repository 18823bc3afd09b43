"""Nystromformer. Letters: B batch, T tokens, H heads, K head width, M landmarks."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.bidirectional import BidirectionalAttention, SharedBidirectional, lengths
from leapformer.nn.layer import Capabilities, Mechanism
from leapformer.ops.autocast import without_autocast


class NystromformerAttention(BidirectionalAttention):
    """softmax(q k~^T) pinv(softmax(q~ k~^T)) softmax(q~ k^T) v, plus a depthwise convolution of v (arXiv 2102.03902,
    eq. 13).

    The landmarks q~, k~ are means of M segments of equal length, as nearly as the number of real tokens allows. Fewer
    tokens than landmarks are their own landmarks, and then it is softmax as far as the pseudo-inverse has converged.
    Padding changes nothing. Dropout is on the output.

    Args:
        num_features: M. iterations: of the pseudo-inverse. conv_kernel: width of the convolution over tokens, odd, one
            filter a head; 0 for none. The others as in ``BidirectionalAttention``.
    """

    name = "nystromformer"
    capabilities = Capabilities(causal=False, cross=False, streaming=False, arbitrary_length=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_features: int = 128,
        iterations: int = 6,
        conv_kernel: int = 33,
        **shared: Unpack[SharedBidirectional],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        if conv_kernel and conv_kernel % 2 == 0:
            raise ValueError(f"nystromformer attention: expected an odd conv_kernel or 0, got {conv_kernel}")
        self.num_landmarks, self.iterations = num_features, iterations
        self.value_conv = None
        if conv_kernel:
            size, pad = (conv_kernel, 1), (conv_kernel // 2, 0)
            self.value_conv = nn.Conv2d(num_heads, num_heads, size, padding=pad, groups=num_heads, bias=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q_marks, k_marks, seen = self._landmarks(q, mask)[0], *self._landmarks(k, mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys = None if mask is None else mask[:, None, None]
        marks = None if seen is None else seen[:, None, None]
        with without_autocast(q.device.type):
            middle = _softmax_weights(q_marks, k_marks, marks)
            if marks is not None:  # without a row for landmarks that aren't there, the rest is a smaller matrix
                middle = middle * marks.transpose(-1, -2)
            inverse = pseudo_inverse(middle, self.iterations).to(v.dtype)
        right = F.scaled_dot_product_attention(q_marks.to(q.dtype), k, v, attn_mask=keys)
        y = F.scaled_dot_product_attention(q, k_marks.to(q.dtype), inverse @ right, attn_mask=marks)
        y = F.dropout(y, self.dropout, self.training)
        if self.value_conv is not None:
            v = v if mask is None else v.masked_fill(~mask[:, None, :, None], 0)
            y = y + self.value_conv(v)
        return y.transpose(1, 2)

    def _landmarks(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Means [B, H, M, K] of the segments of x [B, T, H, K], and which of them there are, [B or 1, M], None for
        all.
        """
        M, T = self.num_landmarks, x.shape[1]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if mask is None and T % M == 0:
            return x.unflatten(1, (M, T // M)).mean(2).transpose(1, 2), None
        real = lengths(mask, x)[:, None]
        segments = (torch.arange(T, device=x.device) * M // real).expand(x.shape[0], -1).clamp(max=M - 1)
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None, None], 0)
        weights = x.new_ones(segments.shape) if mask is None else mask.to(x.dtype)
        counts = x.new_zeros(x.shape[0], M).scatter_add(1, segments, weights)
        sums = x.new_zeros(x.shape[0], M, *x.shape[2:]).scatter_add(1, segments[..., None, None].expand_as(x), x)
        return (sums / counts.clamp(min=1)[..., None, None]).transpose(1, 2), counts > 0


MECHANISM = Mechanism(
    name=NystromformerAttention.name,
    layer=NystromformerAttention,
    label="Nystromformer",
    options={"num_features": "attention_features", "seed": None},
)


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of matrices [..., M, M], nearly, by an iteration of third order (arXiv 2102.03902, eq.
    11).

    Every matrix starts from its own norms, so a result doesn't depend on what else is in the batch. Rows and columns of
    zeros stay zero.
    """
    norms = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = a.transpose(-1, -2) / norms[..., None, None]
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def _softmax_weights(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
