"""Performer. Letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, M features."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.layer import Call, Capabilities, Mechanism, Shared
from leapformer.nn.state import LayerState
from leapformer.nn.sums import SummingAttention
from leapformer.ops import linear_attention
from leapformer.ops.api import Impl
from leapformer.ops.autocast import without_autocast

# Features are taken relative to the largest one, so a normaliser may be small and yet exact.
EPS = 1e-30


class PerformerAttention(SummingAttention):
    """Linear attention with FAVOR+ features, an unbiased estimate of softmax attention (arXiv 2009.14794, sec. 2.2 to
    2.4).

    Padding changes nothing. Dropout is on the output.

    Args:
        num_features: M; the error falls as M^-1/2. impl: as in ``leapformer.ops.linear_attention``. The others as in
            ``AttentionLayer``.
    """

    capabilities = Capabilities(causal=True, cross=True, streaming=True, arbitrary_length=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_features: int = 128,
        impl: Impl = "auto",
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.features = RandomFeatures(self.head_dim, num_features)
        self.impl: Impl = impl
        self.feature_width, self.eps = num_features, EPS

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call) -> tuple[Tensor, LayerState | None]:
        # A state outlives the call, so its features have a scale that doesn't depend on what else is in the call.
        output, linear = linear_attention(
            self.features(q),
            self.features(k, call.key_mask, keys=True, relative=not call.stateful),
            v,
            visible=call.visible,
            key_mask=call.key_mask,
            cu_seqlens=call.cu_seqlens,
            cu_seqlens_k=call.cu_seqlens_k,
            initial_state=None if call.state is None else call.state.linear,
            return_state=call.return_state,
            eps=EPS,
            impl=self.impl,
        )
        output = F.dropout(output, self.dropout, self.training)
        return output, None if linear is None else LayerState(length=q.new_zeros(0), linear=linear)

    def key_features(self, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.features(k, None, keys=True, relative=False), None

    def query_features(self, q: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.features(q), None


MECHANISM = Mechanism(
    name="performer",
    layer=PerformerAttention,
    label="Performer",
    options={"num_features": "attention_features", "impl": "attention_impl"},
    weights=lambda given: given["num_features"] * given["head_dim"],
)


class RandomFeatures(nn.Module):
    """phi(x) = M^-1/2 exp(w x - |x|^2 / 2), x scaled by K^-1/4: phi(q) . phi(k) estimates exp(q . k / sqrt(K)).

    The rows w [M, K] are Gaussian vectors made orthogonal K at a time (sec. 2.4). They are drawn once, from torch's own
    generator as weights are, and kept: a buffer that a checkpoint holds.
    """

    directions: Tensor

    def __init__(self, head_dim: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("directions", torch.empty(num_features, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        M, K = self.directions.shape
        if self.directions.is_meta:
            return
        q, r = torch.linalg.qr(torch.randn(-(-M // K), K, K))
        # The signs that QR chooses aren't random: left as they are, the estimate would be biased.
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        norms = torch.randn(M, K).norm(dim=1, keepdim=True)
        self.directions.copy_(q.transpose(1, 2).flatten(0, 1)[:M] * norms)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, keys: bool = False, relative: bool = False) -> Tensor:
        """``of_keys`` or ``of_queries``: what is wrapped around a module, such as offloading, waits for its call."""
        return self.of_keys(x, mask, relative=relative) if keys else self.of_queries(x)

    def of_queries(self, q: Tensor) -> Tensor:
        """q [B, T, H, K] -> [B, T, H, M], each relative to its own largest, which the normaliser cancels."""
        exponents = self._exponents(q)
        return self._exp(exponents - exponents.detach().amax(-1, keepdim=True), q)

    def of_keys(self, k: Tensor, mask: Tensor | None, *, relative: bool) -> Tensor:
        """k [B, S, G, K] -> [B, S, G, M]; ``relative``: to the largest of a head's real keys."""
        exponents = self._exponents(k)
        if relative:
            seen = exponents.detach()
            if mask is not None:
                seen = seen.masked_fill(~mask[:, :, None, None], -torch.inf)
            largest = seen.amax((1, 3), keepdim=True) if k.shape[1] else seen.new_zeros(())
            # Without a real key any scale will do. A masked key may be larger than all, and is not used.
            exponents = (exponents - largest.clamp(min=torch.finfo(seen.dtype).min)).clamp(max=0)
        return self._exp(exponents, k)

    def _exponents(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25
            return x @ self.directions.to(x.dtype).T - 0.5 * x.square().sum(-1, keepdim=True)

    def _exp(self, exponents: Tensor, like: Tensor) -> Tensor:
        return (exponents.exp() * self.directions.shape[0] ** -0.5).to(like.dtype)
