"""Attention as other code computes it, beside what the package itself times: research code, and two libraries.

None of these is wanted by whoever uses the package; what is owed here is told by ratios to them. The libraries stand
only where they are installed. Letters: B batch, N tokens, H heads, K key and value width.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.bench import contenders
from leapformer.bench.contenders import Contender, Inputs, Shape
from leapformer.ops import cosine_factors

RESEARCH, FAST_TRANSFORMERS, FLA = "research code", "fast-transformers", "flash-linear-attention"
EPS = 1e-6


def contender(name: str) -> Contender:
    """One of those here, or of the package's."""
    own = {each.name: each for each in (_RESEARCH, _FAST_TRANSFORMERS, _FLA)}
    return own[name] if name in own else contenders.contender(name)


def others() -> list[Contender]:
    """Those here that are installed, the research code first."""
    modules = {"fast_transformers": _FAST_TRANSFORMERS, "fla": _FLA}
    return [_RESEARCH, *(each for module, each in modules.items() if importlib.util.find_spec(module))]


def _research(shape: Shape, length: int, inputs: Inputs) -> Callable[[], object]:
    """The formula as published code computes it: causal over all pairs, bidirectional by plain tensor products."""
    rows, N, K = shape.batch * shape.heads, length, shape.width
    q, k, v = (inputs.leaf(rows, N, K) for _ in range(3))
    if shape.leap:
        q_leap, k_leap = inputs.leap(shape), inputs.leap(shape)
        sources = [*q_leap, *k_leap]
    else:
        p_q, p_k = inputs.proportion(rows, N), inputs.proportion(rows, N)
        sources = [p_q, p_k]

    def features(x: Tensor, proportion: Tensor) -> Tensor:
        angle = math.pi / 2 * proportion[..., None]
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)

    def both_features() -> tuple[Tensor, Tensor]:
        queries, keys = q.relu(), k.relu()
        if shape.leap:
            return features(queries, _module(queries, q_leap)), features(keys, _module(keys, k_leap))
        return features(queries, p_q), features(keys, p_k)

    future = torch.ones(N, N, dtype=torch.bool, device=inputs.device).triu(1) if shape.visible == "causal" else None

    def attend() -> Tensor:
        queries, keys = both_features()
        if future is None:
            kv = torch.einsum("nsk,nsv->nkv", keys, v)
            normaliser = torch.einsum("ntk,nk->nt", queries, keys.sum(1)).clamp(min=EPS)
            return torch.einsum("ntk,nkv,nt->ntv", queries, kv, 1 / normaliser)
        weights = torch.bmm(queries, keys.transpose(1, 2)).masked_fill(future, 0)
        return torch.bmm(weights / weights.sum(-1, keepdim=True).clamp(min=EPS), v)

    return inputs.call(attend, [q, k, v, *sources], (rows, N, K))


def _fla(shape: Shape, length: int, inputs: Inputs) -> Callable[[], object]:
    """Its plain linear attention: ReLU and no re-weighting, so half the width of our features."""
    chunk_linear_attn = import_module("fla.ops.linear_attn").chunk_linear_attn
    size = (shape.batch, length, shape.heads, shape.width)
    q, k, v = (inputs.leaf(*size) for _ in range(3))
    return inputs.call(lambda: chunk_linear_attn(q.relu(), k.relu(), v, scale=1.0, normalize=True)[0], [q, k, v], size)


def _fast_transformers(shape: Shape, length: int, inputs: Inputs) -> Callable[[], object]:
    """Its linear attention over the features [q cos, q sin], [k cos, k sin], with the layout [B, N, H, 2K] it takes."""
    masking = import_module("fast_transformers.masking")
    B, N, H, K = shape.batch, length, shape.heads, shape.width
    q, k, v = (inputs.leaf(B, N, H, K) for _ in range(3))
    p_q, p_k = inputs.proportion(B, N, H), inputs.proportion(B, N, H)
    causal = shape.visible == "causal"
    mask, everything = masking.TriangularCausalMask(N) if causal else masking.FullMask(N), masking.FullMask(B, N)
    if causal:
        module = import_module("fast_transformers.attention.causal_linear_attention")
        layer = module.CausalLinearAttention(feature_map=lambda x: x, eps=EPS)
    else:
        module = import_module("fast_transformers.attention.linear_attention")
        layer = module.LinearAttention(2 * K, feature_map=lambda dimensions: _Identity(), eps=EPS)

    def attend() -> Tensor:
        queries, keys = (
            (x.relu()[..., None, :] * cosine_factors(p)[..., None]).flatten(-2) for x, p in ((q, p_q), (k, p_k))
        )
        return layer(queries, keys, v, mask, everything, everything)

    return inputs.call(attend, [q, k, v, p_q, p_k], (B, N, H, K))


class _Identity(torch.nn.Module):
    """A feature map of fast-transformers that changes nothing."""

    def new_feature_map(self, device: torch.device) -> None:
        pass

    def forward_queries(self, x: Tensor) -> Tensor:
        return x

    forward_keys = forward_queries


def _module(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Proportions [rows, N] of features [rows, N, K] by two plain linear layers."""
    w1, b1, w2, b2 = weights
    return torch.sigmoid(F.linear(F.linear(x, w1[0], b1[0]).relu(), w2, b2)).squeeze(-1)


_RESEARCH = Contender(RESEARCH, _research, home=__name__, quadratic=True, pairs=(3, 5), memory_kept=True)
_FAST_TRANSFORMERS = Contender(FAST_TRANSFORMERS, _fast_transformers, home=__name__)
_FLA = Contender(FLA, _fla, home=__name__, why_not="its kernels need a GPU")
