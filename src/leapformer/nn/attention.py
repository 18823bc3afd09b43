"""Linear attention as a layer: feature map x proportion x re-weighting, with decay, convolution and output norm as switches.

Letters: B batch, T queries, S keys, D hidden size, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.conv import ShortConvolution
from leapformer.nn.feature_maps import FEATURE_MAPS
from leapformer.nn.packing import check_packing, token_positions
from leapformer.nn.plain import is_plain
from leapformer.nn.proportions import LeapModule, PositionProportion, Start
from leapformer.nn.reweighting import REWEIGHTINGS
from leapformer.nn.state import LayerState, real_tokens
from leapformer.ops import Staircase, leap_attention, linear_attention, linear_state
from leapformer.ops.api import Impl, Visible

# "linear" has the feature map that is asked for; the two after it are that with one of their own.
Kind = Literal[
    "leap", "cosformer", "linear", "linear-relu", "linear-elu", "softmax", "performer", "linformer", "nystromformer",
    "skyformer", "reformer", "bigbird", "informer",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(Kind)
Variant = Literal["paper", "gated"]


@dataclass(frozen=True)
class Capabilities:
    """What a mechanism can do; ``streaming`` means a state of constant size."""

    causal: bool
    cross: bool
    streaming: bool
    arbitrary_length: bool


class Decay(nn.Module):
    """log_decay = logsigmoid(W x + b) per head, b = 4 at the start, so that the state keeps 98 % a token."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, 4.0)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, H] <= 0; padding doesn't decay."""
        log_decay = F.logsigmoid(F.linear(x, self.weight, self.bias))
        return log_decay if key_mask is None else log_decay.masked_fill(~key_mask[..., None], 0)


class Shared(TypedDict, total=False):
    """Arguments of ``AttentionLayer`` that a mechanism passes on."""

    num_kv_heads: int | None
    head_dim: int | None
    conv_width: int
    bias: bool
    dropout: float


class AttentionLayer(nn.Module):
    """Projections, short convolution and state handling that all mechanisms share; a mechanism writes ``attend``.

    Args:
        hidden_size, num_heads, num_kv_heads (None: num_heads), head_dim (None: hidden_size / num_heads): D, H, G, K.
        conv_width: width of the short causal convolution on the layer's input, 0 for none.
        share_qk: keys are the queries; then num_kv_heads is num_heads.
        bias: of the projections. dropout: where it is, the mechanism says.

    Raises:
        ValueError: heads that do not divide each other or the width.
    """

    capabilities: Capabilities

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        conv_width: int = 0,
        share_qk: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"attention: expected num_heads a multiple of num_kv_heads={num_kv_heads}, got {num_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"attention: expected hidden_size a multiple of num_heads={num_heads}, got {hidden_size}"
                )
            head_dim = hidden_size // num_heads
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout = dropout
        self.conv = ShortConvolution(hidden_size, width=conv_width) if conv_width else None
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        if share_qk and num_kv_heads != num_heads:
            raise ValueError(f"attention with queries as keys: expected num_kv_heads={num_heads}, got {num_kv_heads}")
        self.k_proj = None if share_qk else nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        visible: Visible = "all",
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """Self-attention over x [B, T, D], or cross-attention of x over ``context`` [B, S, D].

        Args:
            visible, cu_seqlens, cu_seqlens_k: as in ``leapformer.ops.linear_attention``.
            key_mask: bool [B, S] (self: [B, T]), True = real; padding may lie anywhere.
            position_ids: int64 [B or 1, T] from 0, for cosFormer; None counts real tokens, on from the state.
            state: what came before (self-attention); written in place and returned where gradients are off.
            return_state: also return the state after x.

        Returns:
            (y [B, T, D], LayerState or None).

        Raises:
            ValueError: packing that doesn't divide the one row, or something that the mechanism can't do.
        """
        if cu_seqlens is not None:
            self._check_packing(x, context, cu_seqlens, cu_seqlens_k)
        own_mask = key_mask if context is None else None
        tail = None
        if self.conv is not None:
            past = None if state is None else state.conv
            x, tail = self.conv(x, key_mask=own_mask, cu_seqlens=cu_seqlens, past=past)
        source = x if context is None else context
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = q if self.k_proj is None else self.k_proj(source).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(source).unflatten(-1, (self.num_kv_heads, self.head_dim))
        y, kept = self.attend(
            q, k, v, x, is_self=context is None, visible=visible, key_mask=key_mask, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k, position_ids=position_ids, state=state, return_state=return_state,
        )  # fmt: skip
        y = self.o_proj(y.flatten(-2))
        if kept is None:
            return y, None
        kept.conv = None if tail is None else tail.clone()  # a view would keep all inputs alive
        kept.length = real_tokens(x, own_mask, state, cu_seqlens=cu_seqlens)
        return y, kept if state is None else state.update(kept)

    def _check_packing(
        self, x: Tensor, context: Tensor | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None
    ) -> None:
        check_packing("attention", x.shape, cu_seqlens)
        if context is not None:
            check_packing("attention", context.shape, cu_seqlens_k, what="cu_seqlens_k")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, is_self: bool, visible: Visible, key_mask: Tensor | None,
        cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, position_ids: Tensor | None,
        state: LayerState | None, return_state: bool,
    ) -> tuple[Tensor, LayerState | None]:  # fmt: skip
        """From projected q [B, T, H, K], k, v [B, S, G, K] to the heads' outputs [B, T, H, K]."""
        raise NotImplementedError

    def prefix_state(self, k: Tensor, v: Tensor) -> LayerState:
        """The state after S keys and values [B, S, G, K] that no token was projected to, such as those of prefix tuning.

        They stand before the first token, do not fade, and the convolution doesn't see them.

        Raises:
            ValueError: another shape, or a mechanism without a state.
        """
        expected = (self.num_kv_heads, self.head_dim)
        if k.dim() != 4 or k.shape[2:] != expected or v.shape != k.shape:
            raise ValueError(
                f"prefix: expected keys and values [B, S, {expected[0]}, {expected[1]}], "
                f"got {list(k.shape)} and {list(v.shape)}"
            )
        state = self._prefix_state(k, v)
        state.length = torch.full((k.shape[0],), k.shape[1], dtype=torch.int64, device=k.device)
        return state

    def _prefix_state(self, k: Tensor, v: Tensor) -> LayerState:
        raise ValueError(f"{type(self).__name__}: expected no prefix of keys and values (it has no state), got one")


class LinearAttention(AttentionLayer):
    """Attention whose cost is linear in the length, as a composition (design section 1; arXiv 2405.13046, eq. 5-9).

    Args:
        hidden_size, num_heads, num_kv_heads (num_heads), head_dim (hidden_size / num_heads): D, H, G, K.
        feature_map: "relu" or "elu" (elu + 1).
        proportion: None (plain linear attention), "position" (cosFormer) or "learned" (LeaPformer).
        reweighting: "cosine" or "quadratic".
        max_positions: cosFormer's M.
        leap_hidden, leap_per_head, leap_bins, leap_start: see ``LeapModule``.
        decay: multiply the state by a learned, data-dependent factor per head and token (causal self-attention only).
        conv_width: width of the short causal convolution on the layer's input, 0 for none.
        output_norm: RMSNorm over each head's output instead of division by the normaliser.
        dropout: on the attention's output. eps, impl: as in ``leapformer.ops.linear_attention``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        feature_map: str = "relu",
        proportion: Literal["position", "learned"] | None = "learned",
        reweighting: str = "cosine",
        max_positions: int = 2048,
        leap_hidden: int = 8,
        leap_per_head: bool = False,
        leap_bins: int | None = None,
        leap_start: Start = "default",
        decay: bool = False,
        output_norm: bool = False,
        eps: float = 1e-6,
        impl: Impl = "auto",
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.feature_map = _named(FEATURE_MAPS, feature_map, "feature_map")
        self.reweighting = _named(REWEIGHTINGS, reweighting, "reweighting")()
        self.q_proportion, self.k_proportion, self.position_proportion = None, None, None
        if proportion == "learned":
            leap = {"hidden": leap_hidden, "bins": leap_bins, "start": leap_start}
            self.q_proportion = LeapModule(self.head_dim, heads=self.num_heads if leap_per_head else 1, **leap)
            self.k_proportion = LeapModule(self.head_dim, heads=self.num_kv_heads if leap_per_head else 1, **leap)
        elif proportion == "position":
            self.position_proportion = PositionProportion(max_positions)
        elif proportion is not None:
            raise ValueError(f"proportion: expected None, 'position' or 'learned', got {proportion!r}")
        self.is_plain_leap = (feature_map, proportion, reweighting, leap_bins) == ("relu", "learned", "cosine", None)
        self.has_relu = feature_map == "relu"
        self.decay = Decay(hidden_size, num_heads) if decay else None
        self.output_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if output_norm else None
        self.eps = eps
        self.impl: Impl = impl
        self.capabilities = Capabilities(True, True, True, arbitrary_length=proportion != "position")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, is_self: bool, visible: Visible, key_mask: Tensor | None,
        cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, position_ids: Tensor | None,
        state: LayerState | None, return_state: bool,
    ) -> tuple[Tensor, LayerState | None]:  # fmt: skip
        causal = is_self and isinstance(visible, str) and visible == "causal"
        log_decay = self.decay(x, key_mask=key_mask) if self.decay is not None and causal else None
        keywords = {
            "visible": visible, "key_mask": key_mask, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k,
            "log_decay": log_decay, "initial_state": None if state is None else state.linear,
            "return_state": return_state, "normalize": self.output_norm is None, "eps": self.eps, "impl": self.impl,
            "update_state": state is not None and return_state and state.updates_in_place,
        }  # fmt: skip
        leaps = self._plain_leaps()
        if leaps is not None:
            output, linear = leap_attention(q, k, v, leaps[0].weights(), leaps[1].weights(), **keywords)
        else:
            # A learned proportion looks at the features; otherwise nobody needs them outside the operator.
            relu = self.has_relu and self.q_proportion is None
            q, k = (q, k) if relu else (self.feature_map(q), self.feature_map(k))
            q_factors, k_factors = self._factors(q, k, is_self, position_ids, key_mask, cu_seqlens, cu_seqlens_k, state)
            output, linear = linear_attention(q, k, v, q_factors, k_factors, relu=relu, **keywords)
        if self.output_norm is not None:
            wanted = getattr(self.output_norm, "weight", output).dtype  # autocast: bf16, float32
            output = self.output_norm(output.to(wanted)).to(output.dtype)
        output = F.dropout(output, self.dropout, self.training)
        return output, None if linear is None else LayerState(length=q.new_zeros(0), linear=linear)

    def _prefix_state(self, k: Tensor, v: Tensor) -> LayerState:
        k, p = self.feature_map(k), None
        if self.k_proportion is not None:
            p = self.k_proportion(k)
        elif self.position_proportion is not None:
            p = self.position_proportion(torch.arange(k.shape[1], device=k.device)[None]).expand(k.shape[0], -1, -1)
        if p is not None:
            p = self.reweighting.factors_k(p.to(torch.promote_types(k.dtype, torch.float32)))
        if self.decay is not None:  # every query head has a state of its own
            repeats = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
            p = p if p is None or p.shape[2] == 1 else p.repeat_interleave(repeats, 2)
        linear = linear_state(k, v, p)
        if self.decay is not None:
            linear = linear._replace(log_decay=linear.z.new_zeros(linear.z.shape[:2]))
        return LayerState(length=k.new_zeros(0), linear=linear)

    def _plain_leaps(self) -> tuple[LeapModule, LeapModule] | None:
        """The modules for queries and keys where `leap_attention` computes the whole, which may be one kernel."""
        if not self.is_plain_leap:
            return None
        q_leap, k_leap = self.q_proportion, self.k_proportion
        if q_leap is None or k_leap is None:
            return None
        # Whatever is wrapped around a module waits for a call.
        return (q_leap, k_leap) if is_plain(q_leap, LeapModule) and is_plain(k_leap, LeapModule) else None

    def _factors(
        self, q: Tensor, k: Tensor, is_self: bool, position_ids: Tensor | None, key_mask: Tensor | None,
        cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, state: LayerState | None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Factors [B, T, H or 1, R] and [B, S, G or 1, R] of the re-weighting, or none."""
        if self.q_proportion is not None and self.k_proportion is not None:
            p_q, p_k = self.q_proportion(q), self.k_proportion(k)
        elif self.position_proportion is not None:
            own = position_ids
            if own is None:
                first, mask = None if state is None else state.length, key_mask if is_self else None
                own = token_positions(q.shape[1], q.device, key_mask=mask, cu_seqlens=cu_seqlens, first=first)
            p_q = p_k = self.position_proportion(own).expand(q.shape[0], -1, -1)
            if not is_self:
                keys = token_positions(k.shape[1], k.device, key_mask=key_mask, cu_seqlens=cu_seqlens_k)
                p_k = self.position_proportion(keys).expand(k.shape[0], -1, -1)
        else:
            return None, None
        if p_q.dtype != torch.promote_types(q.dtype, torch.float32):
            p_q, p_k = (p.to(torch.promote_types(q.dtype, torch.float32)) for p in (p_q, p_k))
        return self.reweighting.factors_q(p_q), self.reweighting.factors_k(p_k)


def build_attention(
    kind: Kind,
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    variant: Variant = "paper",
    decay: bool | None = None,
    conv_width: int | None = None,
    output_norm: bool | None = None,
    leap_hidden: int = 8,
    leap_per_head: bool = False,
    leap_bins: int | None = None,
    leap_start: Start = "default",
    feature_map: str = "relu",
    reweighting: str = "cosine",
    max_positions: int = 2048,
    num_features: int = 128,
    num_hashes: int = 2,
    block_size: int = 64,
    random_blocks: int = 3,
    seed: int = 0,
    bias: bool = True,
    dropout: float = 0.0,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> AttentionLayer:
    """One attention layer by name, one of ``KINDS``.

    ``variant`` "gated" turns on decay, a convolution of width 4 and the output norm for the linear kinds; each of the
    three switches can be set by itself. The other kinds take the convolution only where ``conv_width`` asks for it.
    ``num_features`` to ``seed`` are for the mechanisms that LeaPformer is compared with; see their classes.
    """
    if variant not in ("paper", "gated"):
        raise ValueError(f"variant: expected 'paper' or 'gated', got {variant!r}")
    shape = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "bias": bias, "dropout": dropout}
    proportions = {"leap": "learned", "cosformer": "position", "linear": None, "linear-relu": None, "linear-elu": None}
    if kind not in KINDS:
        raise ValueError(f"attention: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind not in proportions:
        layer, own = _other_kinds(num_features, max_positions, num_hashes, block_size, random_blocks, seed, impl)[kind]
        return layer(hidden_size, num_heads, conv_width=conv_width or 0, **shape, **own)
    feature_map = {"linear-relu": "relu", "linear-elu": "elu"}.get(kind, feature_map)
    gated = variant == "gated"
    return LinearAttention(
        hidden_size, num_heads, feature_map=feature_map, proportion=proportions[kind], reweighting=reweighting,
        max_positions=max_positions, leap_hidden=leap_hidden, leap_per_head=leap_per_head, leap_bins=leap_bins,
        leap_start=leap_start, decay=gated if decay is None else decay,
        conv_width=(4 if gated else 0) if conv_width is None else conv_width,
        output_norm=gated if output_norm is None else output_norm, eps=eps, impl=impl, **shape,
    )  # fmt: skip


def _other_kinds(
    num_features: int, max_positions: int, num_hashes: int, block_size: int, random_blocks: int, seed: int, impl: Impl
) -> dict[str, tuple[type[AttentionLayer], dict[str, Any]]]:
    """Class and own arguments of each kind that isn't linear attention. The modules import this one, so they come late."""
    from leapformer.nn.bigbird import BigBirdAttention
    from leapformer.nn.informer import InformerAttention
    from leapformer.nn.linformer import LinformerAttention
    from leapformer.nn.nystromformer import NystromformerAttention
    from leapformer.nn.performer import PerformerAttention
    from leapformer.nn.reformer import ReformerAttention
    from leapformer.nn.skyformer import SkyformerAttention
    from leapformer.nn.softmax import SoftmaxAttention

    size, blocks = {"num_features": num_features, "seed": seed}, {"block_size": block_size, "seed": seed}
    return {
        "softmax": (SoftmaxAttention, {}),
        "performer": (PerformerAttention, {"num_features": num_features, "impl": impl}),
        "linformer": (LinformerAttention, {**size, "max_positions": max_positions}),
        "nystromformer": (NystromformerAttention, size),
        "skyformer": (SkyformerAttention, size),
        "reformer": (ReformerAttention, {**blocks, "num_hashes": num_hashes}),
        "bigbird": (BigBirdAttention, {**blocks, "random_blocks": random_blocks}),
        "informer": (InformerAttention, {**size, "max_positions": max_positions}),
    }


def _named(table: dict, name: str, what: str):
    if name not in table:
        raise ValueError(f"{what}: expected one of {sorted(table)}, got {name!r}")
    return table[name]


__all__ = ["AttentionLayer", "Capabilities", "Decay", "LinearAttention", "Staircase", "build_attention"]
