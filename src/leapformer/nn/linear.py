"""Linear attention as a layer: feature map x proportion x re-weighting, with decay, convolution and output norm as
switches.

Letters: B batch, T queries, S keys, D hidden size, H query heads, G key/value heads, K head width, R rank of the
re-weighting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.clocks import Clocks
from leapformer.nn.feature_maps import FEATURE_MAPS, FeatureMap
from leapformer.nn.layer import Call, Capabilities, Mechanism, Shared
from leapformer.nn.packing import token_positions
from leapformer.nn.plain import is_plain
from leapformer.nn.proportions import LeapModule, PositionProportion, Proportion, Start
from leapformer.nn.reweighting import REWEIGHTINGS, Cosine, Reweighting
from leapformer.nn.state import LayerState
from leapformer.nn.sums import SummingAttention
from leapformer.ops import angle_factors, leap_attention, linear_attention
from leapformer.ops.api import Impl

Proportions = Literal["position", "learned", "running"] | Proportion | tuple[Proportion, Proportion]


class Decay(nn.Module):
    """log_decay = logsigmoid(W x + b) per head.

    At the start b = 4, so that the state keeps 98 % a token; or, with ``scales`` = (shortest, longest), what is kept
    falls to 1/e in times between these, in tokens and in equal ratios over the heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, scales: Sequence[float] | None = None) -> None:
        super().__init__()
        if scales is not None and not (len(scales) == 2 and 0 < scales[0] <= scales[1] < math.inf):
            raise ValueError(
                f"decay_scales: expected (shortest, longest) in tokens, 0 < shortest <= longest, got {scales}"
            )
        self.scales = scales
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.scales is None:
            nn.init.constant_(self.bias, 4.0)
            return
        shortest, longest = self.scales
        times = shortest * (longest / shortest) ** torch.linspace(0, 1, len(self.bias))
        with torch.no_grad():  # logsigmoid(b) = -1 / time
            self.bias.copy_(-torch.expm1(1 / times).log())

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, H] <= 0; padding doesn't decay."""
        log_decay = F.logsigmoid(F.linear(x, self.weight, self.bias))
        return log_decay if key_mask is None else log_decay.masked_fill(~key_mask[..., None], 0)


class LinearAttention(SummingAttention):
    """Attention whose cost is linear in the length, as a composition (design section 1; arXiv 2405.13046, eq. 5-9).

    Args:
        hidden_size, num_heads, num_kv_heads (num_heads), head_dim (hidden_size / num_heads): D, H, G, K.
        feature_map: "relu", "elu" (elu + 1), or a function or module of [..., K] that gives no negative numbers.
        proportion: None (plain linear attention), "position" (cosFormer), "learned" (LeaPformer), "running" (clocks,
            see ``Clocks``; it goes with ``output_norm``, since its re-weighting may be negative), or a ``Proportion``,
            or two, for queries and for keys.
        clocks, clock_rate, clock_decades: of running proportions, see ``Clocks``.
        leap_places: running proportions are where the clocks stand plus the paper's learned ones.
        cross: cross-attention, which has no decay, and where queries and keys have clocks of their own.
        reweighting: "cosine", "quadratic" or a ``Reweighting``.
        max_positions: cosFormer's M.
        leap_hidden, leap_per_head, leap_bins, leap_start: see ``LeapModule``.
        decay: a learned, data-dependent decay per head between the two tokens of self-attention. decay_scales: its
            start, see ``Decay``.
        conv_width: width of the short causal convolution on the layer's input, 0 for none.
        output_norm: RMSNorm over each head's output instead of division by the normaliser.
        dropout: on the attention's output. eps, impl: as in ``leapformer.ops.linear_attention``.

    Raises:
        ValueError: an unknown name, an object that is none of these, or running proportions without the output norm.
    """

    capabilities = Capabilities(causal=True, cross=True, streaming=True, arbitrary_length=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        feature_map: str | FeatureMap = "relu",
        proportion: Proportions | None = "learned",
        reweighting: str | Reweighting = "cosine",
        max_positions: int = 2048,
        clocks: int = 1,
        clock_rate: float = math.pi / 2,
        clock_decades: float = 2.0,
        leap_places: bool = False,
        cross: bool = False,
        leap_hidden: int = 8,
        leap_per_head: bool = False,
        leap_bins: int | None = None,
        leap_start: Start = "default",
        decay: bool = False,
        decay_scales: Sequence[float] | None = None,
        output_norm: bool = False,
        eps: float = 1e-6,
        impl: Impl = "auto",
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.feature_map: FeatureMap = _named(FEATURE_MAPS, feature_map, "feature_map")
        self.reweighting = _reweighting(reweighting)
        self.q_proportion, self.k_proportion, self.position_proportion, self.clocks = None, None, None, None
        if proportion == "running":
            if not output_norm:
                raise ValueError(
                    "proportion='running': expected output_norm (its re-weighting may be negative), got none"
                )
            self.clocks = Clocks(
                self.head_dim,
                self.num_heads,
                self.num_kv_heads,
                clocks=clocks,
                rate=clock_rate,
                decades=clock_decades,
                cross=cross,
                hidden=leap_hidden,
                per_head=leap_per_head,
                start=leap_start,
            )
        if proportion == "learned" or (proportion == "running" and leap_places):
            leap = {"hidden": leap_hidden, "bins": leap_bins, "start": leap_start}
            self.q_proportion = LeapModule(self.head_dim, heads=self.num_heads if leap_per_head else 1, **leap)
            self.k_proportion = LeapModule(self.head_dim, heads=self.num_kv_heads if leap_per_head else 1, **leap)
        elif proportion == "position":
            self.position_proportion = PositionProportion(max_positions)
        elif isinstance(proportion, PositionProportion):
            self.position_proportion = proportion
        elif proportion is not None and proportion != "running":
            self.q_proportion, self.k_proportion = _two(proportion)
        self.has_relu = self.feature_map is FEATURE_MAPS["relu"]
        self.is_plain_leap = (
            self.clocks is None and self.has_relu and type(self.reweighting) is Cosine and _is_exact(self.q_proportion)
        )
        self.is_plain_leap = self.is_plain_leap and _is_exact(self.k_proportion)
        decay = decay and not cross
        self.decay = Decay(hidden_size, num_heads, scales=decay_scales) if decay else None
        self.output_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if output_norm else None
        self.eps = eps
        self.impl: Impl = impl
        self.feature_width, self.has_decay = self.head_dim, decay
        weighted = self.q_proportion is not None or self.position_proportion is not None
        self.rank = self.reweighting.rank if weighted else 1
        if self.clocks is not None:
            self.rank = 2 * clocks
        self.capabilities = Capabilities(True, True, True, arbitrary_length=self.position_proportion is None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call) -> tuple[Tensor, LayerState | None]:
        state, visible = call.state, call.visible
        log_decay = self.decay(x, key_mask=call.key_mask) if self.decay is not None and call.is_self else None
        keywords = {
            "visible": visible,
            "key_mask": call.key_mask,
            "cu_seqlens": call.cu_seqlens,
            "cu_seqlens_k": call.cu_seqlens_k,
            "log_decay": log_decay,
            "initial_state": None if state is None else state.linear,
            "return_state": call.return_state,
            "normalize": self.output_norm is None,
            "eps": self.eps,
            "impl": self.impl,
            "update_state": state is not None and call.return_state and state.updates_in_place,
        }
        leaps, clock, query_clock = self._plain_leaps(), None, None
        if self.clocks is not None:
            q, k = self.feature_map(q), self.feature_map(k)
            q_angles, k_angles, clock, query_clock = self._angles(self.clocks, q, k, call)
            output, linear = linear_attention(q, k, v, q_angles=q_angles, k_angles=k_angles, **keywords)
        elif leaps is not None:
            output, linear = leap_attention(q, k, v, leaps[0].weights(), leaps[1].weights(), **keywords)
        else:
            # A learned proportion looks at the features; otherwise nobody needs them outside the operator.
            relu = self.has_relu and self.q_proportion is None
            q, k = (q, k) if relu else (self.feature_map(q), self.feature_map(k))
            q_factors, k_factors = self._factors(q, k, call)
            output, linear = linear_attention(q, k, v, q_factors, k_factors, relu=relu, **keywords)
        if self.output_norm is not None:
            wanted = getattr(self.output_norm, "weight", output).dtype  # autocast: bf16, float32
            output = self.output_norm(output.to(wanted)).to(output.dtype)
        output = F.dropout(output, self.dropout, self.training)
        if linear is None:
            return output, None
        return output, LayerState(length=q.new_zeros(0), linear=linear, clock=clock, query_clock=query_clock)

    def _angles(self, clocks: Clocks, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of the features of queries and of keys: angles [B, T, H, m] and [B, S, G, m], and where the clocks of keys,
        and in cross-attention those of queries, stand behind them."""
        state = call.state
        past = None if state is None else state.clock
        bounds = call.cu_seqlens if call.is_self else call.cu_seqlens_k
        k_angles, clock = clocks.of_keys(k, past, key_mask=call.key_mask, cu_seqlens=bounds)
        if clocks.q_steps is None:
            if not call.is_self:
                raise ValueError("proportion='running': expected cross=True for cross-attention, got cross=False")
            q_angles, query_clock = clocks.for_query_heads(k_angles), None
        else:
            past = None if state is None else state.query_clock
            q_angles, query_clock = clocks.of_queries(q, past, cu_seqlens=call.cu_seqlens)
        if self.q_proportion is not None and self.k_proportion is not None:
            q_angles = q_angles + clocks.at_places(self.q_proportion(q))
            k_angles = k_angles + clocks.at_places(self.k_proportion(k))
        return q_angles, k_angles, clock, query_clock

    def next_keys(
        self, k: Tensor, places: Tensor, state: LayerState, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.clocks is None:
            return super().next_keys(k, places, state, key_mask)
        k = self.feature_map(k)
        angles, state.clock = self.clocks.of_keys(k, state.clock, key_mask=key_mask)
        if self.k_proportion is not None:
            angles = angles + self.clocks.at_places(self.k_proportion(k))
        return k, angle_factors(angles)

    def next_queries(self, q: Tensor, position_ids: Tensor, state: LayerState) -> tuple[Tensor, Tensor | None]:
        if self.clocks is None:
            return super().next_queries(q, position_ids, state)
        q = self.feature_map(q)
        angles = self.clocks.of_queries(q, state.query_clock).angles
        if self.q_proportion is not None:
            angles = angles + self.clocks.at_places(self.q_proportion(q))
        return q, angle_factors(angles)

    def _empty_state(self, rows: Tensor, *, keep_mass: bool) -> LayerState:
        state = super()._empty_state(rows, keep_mass=keep_mass)
        if self.clocks is not None:
            shape, wide = (len(rows), self.num_kv_heads, self.clocks.clocks), torch.float64
            state.clock = rows.new_zeros(shape, dtype=wide)
            if self.clocks.q_steps is not None:
                state.query_clock = rows.new_zeros(len(rows), self.num_heads, self.clocks.clocks, dtype=wide)
        return state

    def key_features(self, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor | None]:
        k = self.feature_map(k)
        p = self.k_proportion(k) if self.k_proportion is not None else self._proportion_of_places(places)
        if p is None:
            return k, None
        p = p.expand(k.shape[0], -1, -1)
        return k, self.reweighting.factors_k(p.to(torch.promote_types(k.dtype, torch.float32)))

    def query_features(self, q: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        q, p = self.feature_map(q), None
        if self.q_proportion is not None:
            p = self.q_proportion(q)
        elif self.position_proportion is not None:
            p = self.position_proportion(position_ids)
        if p is None:
            return q, None
        return q, self.reweighting.factors_q(p.to(torch.promote_types(q.dtype, torch.float32)))

    def _proportion_of_places(self, places: Tensor) -> Tensor | None:
        """Of keys, [B or 1, S, 1]; slots of padding have places too, which may lie beyond the maximum."""
        return None if self.position_proportion is None else self.position_proportion(places)

    def _plain_leaps(self) -> tuple[LeapModule, LeapModule] | None:
        """The modules for queries and keys where `leap_attention` computes the whole, which may be one kernel."""
        if not self.is_plain_leap:
            return None
        q_leap, k_leap = self.q_proportion, self.k_proportion
        # Whatever is wrapped around a module waits for a call.
        if isinstance(q_leap, LeapModule) and isinstance(k_leap, LeapModule):
            return (q_leap, k_leap) if is_plain(q_leap, LeapModule) and is_plain(k_leap, LeapModule) else None
        return None

    def _factors(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Factors [B, T, H or 1, R] and [B, S, G or 1, R] of the re-weighting, or none."""
        if self.q_proportion is not None and self.k_proportion is not None:
            p_q, p_k = self.q_proportion(q), self.k_proportion(k)
        elif self.position_proportion is not None:
            own = call.position_ids
            if own is None:
                first = None if call.state is None else call.state.length
                mask = call.key_mask if call.is_self else None
                own = token_positions(q.shape[1], q.device, key_mask=mask, cu_seqlens=call.cu_seqlens, first=first)
            p_q = p_k = self.position_proportion(own).expand(q.shape[0], -1, -1)
            if not call.is_self:
                keys = token_positions(k.shape[1], k.device, key_mask=call.key_mask, cu_seqlens=call.cu_seqlens_k)
                p_k = self.position_proportion(keys).expand(k.shape[0], -1, -1)
        else:
            return None, None
        if p_q.dtype != torch.promote_types(q.dtype, torch.float32):
            p_q, p_k = (p.to(torch.promote_types(q.dtype, torch.float32)) for p in (p_q, p_k))
        return self.reweighting.factors_q(p_q), self.reweighting.factors_k(p_k)


class CosformerCrossAttention(LinearAttention):
    """cosFormer over a source: P(i) = i / M, with one maximum for the target's tokens and one for the source's states.

    Args: ``max_positions`` and ``max_source_positions``; all else as in ``LinearAttention``.

    Source: arXiv 2202.08791, eq. 9-10.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, max_source_positions: int, **rest: Any) -> None:
        super().__init__(hidden_size, num_heads, proportion="position", **rest)
        self.source_proportion = PositionProportion(max_source_positions)

    def _proportion_of_places(self, places: Tensor) -> Tensor:
        return self.source_proportion(places.clamp(max=self.source_proportion.max_positions - 1))

    def _factors(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        assert call.position_ids is not None and self.position_proportion is not None
        assert not call.is_self and call.cu_seqlens is None
        dtype = torch.promote_types(q.dtype, torch.float32)
        p_q = self.position_proportion(call.position_ids).to(dtype).expand(q.shape[0], -1, -1)
        p_k = self.source_proportion(torch.arange(k.shape[1], device=k.device)[None]).to(dtype)
        return self.reweighting.factors_q(p_q), self.reweighting.factors_k(p_k.expand(k.shape[0], -1, -1))


def _named(table: dict, name: Any, what: str) -> Any:
    """What a name stands for; a function or module stands for itself."""
    if not isinstance(name, str) and callable(name):
        return name
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what}: expected one of {sorted(table)}, got {name!r}")
    return table[name]


def _reweighting(given: Any) -> Reweighting:
    if all(hasattr(given, name) for name in ("rank", "factors_q", "factors_k")) and not isinstance(given, type):
        return given
    return _named(REWEIGHTINGS, given, "reweighting")()


def _two(proportion: Any) -> tuple[Proportion, Proportion]:
    """Those of queries and of keys, where one may do for both."""
    pair = proportion if isinstance(proportion, tuple) else (proportion, proportion)
    if len(pair) != 2 or not all(callable(one) for one in pair):
        raise ValueError(f"proportion: expected None, 'position' or 'learned', got {proportion!r}")
    return pair


def _is_exact(proportion: Any) -> bool:
    """A LeaP module that rounds nothing."""
    return isinstance(proportion, LeapModule) and proportion.bins is None


_COMPOSITION = {
    "feature_map": "feature_map",
    "reweighting": "reweighting",
    "decay": "decay",
    "decay_scales": "decay_scales",
    "output_norm": "output_norm",
    "eps": "attention_eps",
    "impl": "attention_impl",
    "cross": None,
}
_LEAP = {name: name for name in ("proportion", "leap_hidden", "leap_per_head", "leap_bins", "leap_start")}
_LEAP |= {name: name for name in ("clocks", "clock_rate", "clock_decades", "leap_places")}
_GATED = {"decay": True, "conv_width": 4, "output_norm": True}


def _linear(name: str, label: str, row: int, *, compared: bool = True, translates: bool = False, **fixed: Any):
    fixed = {"proportion": None, **fixed}
    return Mechanism(
        name=name,
        layer=LinearAttention,
        label=label,
        row=row,
        compared=compared,
        options=_COMPOSITION,
        fixed=fixed,
        gated=_GATED,
        translates=translates,
    )


MECHANISMS = (
    Mechanism(
        name="leap",
        layer=LinearAttention,
        label="LeaPformer",
        row=5,
        options={**_COMPOSITION, **_LEAP},
        gated=_GATED,
        translates=True,
    ),
    Mechanism(
        name="cosformer",
        layer=LinearAttention,
        label="cosFormer",
        row=4,
        options={**_COMPOSITION, "max_positions": "max_position_embeddings"},
        fixed={"proportion": "position"},
        gated=_GATED,
        limit="cosFormer's proportion is i / {field} and must stay within 1",
        over_source=CosformerCrossAttention,
        translates=True,
    ),
    # "linear" has the feature map that is asked for; the two after it are that with one of their own.
    _linear("linear", "linear", 1, compared=False, translates=True),
    _linear("linear-relu", "linear, relu", 2, feature_map="relu"),
    _linear("linear-elu", "linear, elu + 1", 3, feature_map="elu"),
)
