"""What is timed against what: attention of one shape as a function without arguments, for each contender.

Letters: B batch, N tokens, H heads, G key/value heads, K key and value width, r hidden size of the LeaP module.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import leapformer.ops
from leapformer.ops import LeapWeights, Staircase, cosine_factors, leap_attention, linear_attention

SDPA, RESEARCH, FAST_TRANSFORMERS, FLA = "SDPA", "research code", "fast-transformers", "flash-linear-attention"
LEAP = " + LeaP"  # after the name of an implementation: with the two learned modules, from plain q and k
CHUNK = 64  # of the count of useful operations
BACKWARD_FLOPS = 3.5  # forward and backward together, in forwards
QUADRATIC = {SDPA, RESEARCH}
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """One shape of attention. `leap`: learned proportions are a part of the work, not only a contender of their own."""

    name: str
    batch: int
    heads: int
    width: int
    visible: Literal["causal", "all", "wait-k"] = "causal"
    groups: int | None = None
    masked: bool = False
    hidden: int = 16
    leap: bool = False

    @property
    def kv_heads(self) -> int:
        return self.groups or self.heads


CAUSAL = Shape("causal", batch=1, heads=8, width=64)
LRA = Shape("LRA", batch=32, heads=2, width=32, visible="all", hidden=32, leap=True)
LONG = Shape("long", batch=1, heads=4, width=64)


def useful_flops(shape: Shape, length: int, *, backward: bool) -> float:
    """Operations that the result needs, by the count that the targets are written in.

    Per token and head, forward: 2 ((C + 1) / 2 (K + V) + 2 R K V) with chunks of C = 64 and R = 2; without a causal mask
    the first term, of the pairs inside a chunk, falls away.
    """
    inside_chunk = 0.0 if shape.visible == "all" else (CHUNK + 1) / 2 * 2 * shape.width
    forward = 2 * (inside_chunk + 2 * 2 * shape.width**2) * shape.batch * shape.heads * length
    return forward * (BACKWARD_FLOPS if backward else 1.0)


def cpu_impls() -> list[str]:
    """The linear implementations of `leapformer.ops` that run on this machine's processor."""
    available = getattr(leapformer.ops, "available_impls", None)
    names = ["torch"] if available is None else list(available())
    return [name for name in names if name not in ("auto", "reference", "triton")]


def contenders_for(shape: Shape) -> tuple[list[str], dict[str, str]]:
    """Names of the contenders, ours first, and why an installed one can't run.

    The libraries that are not a part of leapformer stand only where they are installed.
    """
    ours = [name + suffix for name in cpu_impls() for suffix in (("",) if not shape.leap else ()) + (LEAP,)]
    names = [*ours, SDPA, RESEARCH]
    not_run = {}
    if importlib.util.find_spec("fast_transformers"):
        names.append(FAST_TRANSFORMERS)
    if importlib.util.find_spec("fla"):
        not_run[FLA] = "its kernels need a GPU"
    return names, not_run


def bytes_needed(name: str, shape: Shape, length: int, *, backward: bool) -> float:
    """About the largest memory of a call, for those that keep all pairs; 0 where it is no concern."""
    if name != RESEARCH or shape.visible == "all":
        return 0.0
    return shape.batch * shape.heads * length**2 * 4 * (5 if backward else 3)


def build(
    name: str, shape: Shape, length: int, *, backward: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """One call of a contender: forward without gradients, or forward and backward with a dense random cotangent.

    Each contender starts from tensors of ``dtype`` in the layout it likes best. Ours and the research code start from plain
    queries and keys, as SDPA does, and a proportion for each: ReLU, sines and cosines are inside.
    """
    random = _Random(backward, device, dtype)
    if name == SDPA:
        return _sdpa(shape, length, random)
    if name == FAST_TRANSFORMERS:
        return _fast_transformers(shape, length, random)
    if name == FLA:
        return _fla(shape, length, random)
    if name == RESEARCH:
        return _research(shape, length, random)
    return _ours(name.removesuffix(LEAP), shape, length, random, leap=name.endswith(LEAP))


def _ours(impl: str, shape: Shape, length: int, random: _Random, *, leap: bool) -> Callable[[], object]:
    B, N, H, G, K = shape.batch, length, shape.heads, shape.kv_heads, shape.width
    q, k, v = random.leaf(B, N, H, K), random.leaf(B, N, G, K), random.leaf(B, N, G, K)
    keywords: dict = {"visible": Staircase.wait_k(3, 1) if shape.visible == "wait-k" else shape.visible, "impl": impl}
    if shape.masked:  # one key in eight is padding, at the end
        keywords["key_mask"] = (torch.arange(N, device=random.device) < N - N // 8).expand(B, N)
    if leap:
        q_leap, k_leap = random.leap(shape), random.leap(shape)
        leaves = [q, k, v, *q_leap, *k_leap]
        return random.call(
            lambda: leap_attention(q, k, v, LeapWeights(*q_leap), LeapWeights(*k_leap), **keywords).output,
            leaves, (B, N, H, K),
        )  # fmt: skip
    p_q, p_k = random.proportion(B, N, H), random.proportion(B, N, G)

    def attend() -> Tensor:
        factors = cosine_factors(p_q), cosine_factors(p_k)
        return linear_attention(q, k, v, *factors, relu=True, **keywords).output

    return random.call(attend, [q, k, v, p_q, p_k], (B, N, H, K))


def _sdpa(shape: Shape, length: int, random: _Random) -> Callable[[], object]:
    size = (shape.batch, shape.heads, length, shape.width)
    q, k, v = (random.leaf(*size) for _ in range(3))
    causal = shape.visible == "causal"
    return random.call(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), [q, k, v], size)


def _research(shape: Shape, length: int, random: _Random) -> Callable[[], object]:
    """The formula as published code computes it: causal over all N x N pairs, bidirectional by plain tensor products."""
    rows, N, K = shape.batch * shape.heads, length, shape.width
    q, k, v = (random.leaf(rows, N, K) for _ in range(3))
    if shape.leap:
        q_leap, k_leap = random.leap(shape), random.leap(shape)
        sources = [*q_leap, *k_leap]
    else:
        p_q, p_k = random.proportion(rows, N), random.proportion(rows, N)
        sources = [p_q, p_k]

    def features(x: Tensor, proportion: Tensor) -> Tensor:
        angle = math.pi / 2 * proportion[..., None]
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)

    def both_features() -> tuple[Tensor, Tensor]:
        queries, keys = q.relu(), k.relu()
        if shape.leap:
            return features(queries, _module(queries, q_leap)), features(keys, _module(keys, k_leap))
        return features(queries, p_q), features(keys, p_k)

    future = torch.ones(N, N, dtype=torch.bool, device=random.device).triu(1) if shape.visible == "causal" else None

    def attend() -> Tensor:
        queries, keys = both_features()
        if future is None:
            kv = torch.einsum("nsk,nsv->nkv", keys, v)
            normaliser = torch.einsum("ntk,nk->nt", queries, keys.sum(1)).clamp(min=EPS)
            return torch.einsum("ntk,nkv,nt->ntv", queries, kv, 1 / normaliser)
        weights = torch.bmm(queries, keys.transpose(1, 2)).masked_fill(future, 0)
        return torch.bmm(weights / weights.sum(-1, keepdim=True).clamp(min=EPS), v)

    return random.call(attend, [q, k, v, *sources], (rows, N, K))


def _fla(shape: Shape, length: int, random: _Random) -> Callable[[], object]:
    """Its plain linear attention: ReLU and no re-weighting, so half the width of our features."""
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]

    size = (shape.batch, length, shape.heads, shape.width)
    q, k, v = (random.leaf(*size) for _ in range(3))
    return random.call(lambda: chunk_linear_attn(q.relu(), k.relu(), v, scale=1.0, normalize=True)[0], [q, k, v], size)


def _fast_transformers(shape: Shape, length: int, random: _Random) -> Callable[[], object]:
    """Its linear attention over the features [q cos, q sin], [k cos, k sin], with the layout [B, N, H, 2K] it takes."""
    from fast_transformers.attention.causal_linear_attention import (  # type: ignore[import-not-found]
        CausalLinearAttention,
    )
    from fast_transformers.attention.linear_attention import LinearAttention  # type: ignore[import-not-found]
    from fast_transformers.masking import FullMask, TriangularCausalMask  # type: ignore[import-not-found]

    B, N, H, K = shape.batch, length, shape.heads, shape.width
    q, k, v = (random.leaf(B, N, H, K) for _ in range(3))
    p_q, p_k = random.proportion(B, N, H), random.proportion(B, N, H)
    causal = shape.visible == "causal"
    mask, everything = TriangularCausalMask(N) if causal else FullMask(N), FullMask(B, N)
    if causal:
        layer = CausalLinearAttention(feature_map=lambda x: x, eps=EPS)
    else:
        layer = LinearAttention(2 * K, feature_map=lambda dimensions: _Identity(), eps=EPS)

    def attend() -> Tensor:
        queries, keys = (
            (x.relu()[..., None, :] * cosine_factors(p)[..., None]).flatten(-2) for x, p in ((q, p_q), (k, p_k))
        )
        return layer(queries, keys, v, mask, everything, everything)

    return random.call(attend, [q, k, v, p_q, p_k], (B, N, H, K))


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


class _Random:
    """Inputs of one call, the same for the same order of requests, and the call itself."""

    def __init__(self, backward: bool, device: str, dtype: torch.dtype) -> None:
        self.backward, self.device, self.dtype = backward, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def leaf(self, *size: int) -> Tensor:
        return self._normal(*size).to(self.dtype).requires_grad_(self.backward)

    def proportion(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator, device=self.device).requires_grad_(self.backward)

    def leap(self, shape: Shape) -> list[Tensor]:
        """w1, b1, w2, b2 of one module."""
        r, K = shape.hidden, shape.width
        scaled = [self._normal(*size) / K**0.5 for size in ((1, r, K), (1, r), (1, r), (1,))]
        return [weight.requires_grad_(self.backward) for weight in scaled]

    def call(self, attend: Callable[[], Tensor], leaves: list[Tensor], size: tuple[int, ...]) -> Callable[[], object]:
        if not self.backward:

            def forward() -> object:
                with torch.no_grad():
                    return attend()

            return forward
        cotangent = self._normal(*size).to(self.dtype)
        return lambda: torch.autograd.grad(attend(), leaves, cotangent)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)
