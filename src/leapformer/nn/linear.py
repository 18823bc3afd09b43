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

from leapformer.nn.clocks import Angles, Clocks
from leapformer.nn.decay import ChannelDecay, Decay, DecayPer
from leapformer.nn.delta import DeltaRule, Update, spread
from leapformer.nn.feature_maps import FEATURE_MAPS, FeatureMap
from leapformer.nn.layer import Call, Capabilities, Mechanism, Shared
from leapformer.nn.norms import normed, unit
from leapformer.nn.packing import token_positions
from leapformer.nn.plain import is_plain
from leapformer.nn.prior import PriorProportion
from leapformer.nn.proportions import LeapModule, PositionProportion, Proportion, Start
from leapformer.nn.reweighting import REWEIGHTINGS, Cosine, Reweighting
from leapformer.nn.rotary import ROTARY_BASE, check_rotary, turned
from leapformer.nn.state import LayerState
from leapformer.nn.sums import SummingAttention
from leapformer.ops import (
    LinearState,
    angle_factors,
    channel_decay_attention,
    delta_attention,
    leap_attention,
    linear_attention,
)
from leapformer.ops.api import Impl

Proportions = Literal["position", "learned", "prior", "running"] | Proportion | tuple[Proportion, Proportion]


class LinearAttention(SummingAttention):
    """Attention whose cost is linear in the length, as a composition (design section 1; arXiv 2405.13046, eq. 5-9).

    Args:
        hidden_size, num_heads, num_kv_heads (num_heads), head_dim (hidden_size / num_heads): D, H, G, K.
        feature_map: "relu", "elu" (elu + 1), or a function or module of [..., K] that gives no negative numbers; or
            "silu", which does, where nothing is divided by a sum of weights.
        proportion: None (plain linear attention), "position" (cosFormer), "learned" (LeaPformer), "prior" (learned from
            the place on, see ``PriorProportion``), "running" (clocks, see ``Clocks``; it goes with ``output_norm``,
            since its re-weighting may be negative), or a ``Proportion``, or two, for queries and for keys.
        clocks, clock_rate, clock_decades: of running proportions, see ``Clocks``.
        leap_places: running proportions are where the clocks stand plus the paper's learned ones.
        cross: cross-attention, which has no decay, and where queries and keys have clocks of their own.
        reweighting: "cosine", "quadratic" or a ``Reweighting``.
        max_positions: cosFormer's M.
        leap_hidden, leap_per_head, leap_bins, leap_start: see ``LeapModule``.
        decay: a learned, data-dependent decay per head between the two tokens of self-attention. decay_scales: its
            start, see ``Decay``. decay_per: "head", or "channel": of its keys, see ``ChannelDecay``; that is of a past,
            so of causal self-attention only.
        conv_width: width of the short causal convolution on the layer's input, 0 for none.
        output_norm: RMSNorm over each head's output instead of division by the normaliser.
        qk_norm: features of every head's query and key have the length 1 (arXiv 2406.06484); what proportions
            are read off has not.
        rotary, rotary_base: features of self-attention are turned by their positions, see ``nn.rotary``.
        update: "sum", or "delta": before the state takes a key in, it forgets what it holds under that key, see
            ``leapformer.ops.delta_attention``. Features then have the length 1, beta is up to delta_range, see
            ``DeltaRule``, and without an output norm the output is as it is. Causal self-attention only.
        dropout: on the attention's output. eps, impl: as in ``leapformer.ops.linear_attention``.

    Raises:
        ValueError: an unknown name, an object that is none of these, or what may turn weights negative (running
            proportions, rotary positions, "silu") where they are divided by their sum.
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
        decay_per: DecayPer = "head",
        output_norm: bool = False,
        qk_norm: bool = False,
        rotary: bool = False,
        rotary_base: float = ROTARY_BASE,
        update: Update = "sum",
        delta_range: int = 1,
        eps: float = 1e-6,
        impl: Impl = "auto",
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.feature_map: FeatureMap = _named(FEATURE_MAPS, feature_map, "feature_map")
        self.reweighting = _reweighting(reweighting)
        self.has_relu = self.feature_map is FEATURE_MAPS["relu"]
        if proportion == "running" and not output_norm:
            raise ValueError("proportion='running': expected output_norm (its re-weighting may be negative), got none")
        self.eps = eps
        self.impl: Impl = impl
        turning = {
            "clocks": clocks,
            "rate": clock_rate,
            "decades": clock_decades,
            "cross": cross,
            "places": leap_places,
        }
        module = {"hidden": leap_hidden, "bins": leap_bins, "start": leap_start}
        self._add_proportion(proportion, max_positions, turning, module, leap_per_head)
        self._add_decay(hidden_size, decay and not cross, decay_scales, decay_per)
        self.output_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if output_norm else None
        if update not in ("sum", "delta"):
            raise ValueError(f"update: expected 'sum' or 'delta', got {update!r}")
        if update == "delta" and cross:
            raise ValueError("update='delta': expected self-attention (it is of a past), got cross-attention")
        self.delta = DeltaRule(hidden_size, num_heads, reach=delta_range) if update == "delta" else None
        self.rotary_base = check_rotary(self.head_dim, rotary_base) if rotary else None
        self.own_states, self.qk_norm = self.delta is not None or self.by_channel, qk_norm or self.delta is not None
        # Whether nothing stands between ReLU'd projections and the sums but what ``leap_attention`` computes.
        between = self.own_states or self.qk_norm or rotary or self.has_prior or self.clocks is not None
        exact = _is_exact(self.q_proportion) and _is_exact(self.k_proportion)
        self.is_plain_leap = not between and self.has_relu and type(self.reweighting) is Cosine and exact
        self.feature_width, self.has_decay = self.head_dim, self.decay is not None and not self.by_channel
        if not output_norm and self.delta is None:
            signed = {"rotary": rotary, "feature_map='silu'": feature_map == "silu"}
            for what in (what for what, there in signed.items() if there):
                raise ValueError(f"{what}: expected output_norm (products of features may be negative), got none")
        free = self.position_proportion is None
        self.capabilities = Capabilities(True, cross=not self.own_states, streaming=True, arbitrary_length=free)

    def _add_proportion(
        self, proportion: Any, max_positions: int, turning: dict[str, Any], module: dict[str, Any], per_head: bool
    ) -> None:
        """What gives proportions, of queries and of keys, and the rank of the re-weighting."""
        self.q_proportion, self.k_proportion, self.position_proportion, self.clocks = None, None, None, None
        heads, places = (self.num_heads, self.num_kv_heads), turning.pop("places")
        if proportion == "running":
            steps = {name: module[name] for name in ("hidden", "start")}
            self.clocks = Clocks(self.head_dim, *heads, **turning, **steps, per_head=per_head)
        self.has_prior = proportion == "prior"
        if self.has_prior:
            self.q_proportion, self.k_proportion = (
                PriorProportion(self.head_dim, n, heads=n if per_head else 1, **module) for n in heads
            )
        elif proportion == "learned" or (proportion == "running" and places):
            self.q_proportion, self.k_proportion = (
                LeapModule(self.head_dim, heads=n if per_head else 1, **module) for n in heads
            )
        elif proportion == "position":
            self.position_proportion = PositionProportion(max_positions)
        elif isinstance(proportion, PositionProportion):
            self.position_proportion = proportion
        elif proportion is not None and proportion != "running":
            self.q_proportion, self.k_proportion = _two(proportion)
        weighted = self.q_proportion is not None or self.position_proportion is not None
        self.rank = self.reweighting.rank if weighted else 1
        if self.clocks is not None:
            self.rank = 2 * self.clocks.clocks

    def _add_decay(self, hidden_size: int, decay: bool, scales: Sequence[float] | None, per: str) -> None:
        if per not in ("head", "channel"):
            raise ValueError(f"decay_per: expected 'head' or 'channel', got {per!r}")
        self.by_channel = decay and per == "channel"
        self.decay = None
        if self.by_channel:
            self.decay = ChannelDecay(hidden_size, self.num_heads, self.head_dim, scales=scales)
        elif decay:
            self.decay = Decay(hidden_size, self.num_heads, scales=scales)

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
            q, k = self._in_place(q, k, call)
            if self.own_states:
                factors = angle_factors(q_angles), angle_factors(k_angles)
                output, linear = self._step_by_step(q, k, v, x, *factors, log_decay, call)
            else:
                output, linear = linear_attention(q, k, v, q_angles=q_angles, k_angles=k_angles, **keywords)
        elif leaps is not None:
            output, linear = leap_attention(q, k, v, leaps[0].weights(), leaps[1].weights(), **keywords)
        else:
            # A learned proportion looks at the features; otherwise nobody needs them outside the operator.
            relu = self.has_relu and self.q_proportion is None
            relu = relu and not (self.own_states or self.qk_norm or self.rotary_base)
            q, k = (q, k) if relu else (self.feature_map(q), self.feature_map(k))
            q_factors, k_factors = self._factors(q, k, call)
            q, k = self._in_place(q, k, call)
            if self.own_states:
                output, linear = self._step_by_step(q, k, v, x, q_factors, k_factors, log_decay, call)
            else:
                output, linear = linear_attention(q, k, v, q_factors, k_factors, relu=relu, **keywords)
        if self.output_norm is not None:
            output = normed(self.output_norm, output)
        output = F.dropout(output, self.dropout, self.training)
        if linear is None:
            return output, None
        return output, LayerState(length=q.new_zeros(0), linear=linear, clock=clock, query_clock=query_clock)

    def _in_place(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Features as they are multiplied: of length 1 where that is asked for, and turned by their places."""
        q, k = self._unit(q), self._unit(k)
        if self.rotary_base is None or not call.is_self:
            return q, k
        places = call.places(q)
        return self.placed(q, places), self.placed(k, places)

    def placed(self, phi: Tensor, places: Tensor) -> Tensor:
        return phi if self.rotary_base is None else turned(phi, places, self.rotary_base)

    def _unit(self, x: Tensor) -> Tensor:
        if not self.qk_norm:
            return x
        return unit(x) if self.delta is not None else unit(x).to(x.dtype)  # beta |k|^2 must not round to above 2

    def _step_by_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        q_factors: Tensor | None,
        k_factors: Tensor | None,
        log_decay: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, LinearState | None]:
        """What ``linear_attention`` gives, by the delta rule or with a decay per channel."""
        if not (call.is_self and isinstance(call.visible, str) and call.visible == "causal"):
            what = "decay_per='channel'" if self.delta is None else "update='delta'"
            found = f"visible={call.visible!r}" if call.is_self else "a context"
            raise ValueError(f"{what}: expected causal self-attention (it is of a past), got {found}")
        keywords: dict[str, Any] = {
            "key_mask": call.key_mask,
            "cu_seqlens": call.cu_seqlens,
            "initial_state": None if call.state is None else call.state.linear,
            "return_state": call.return_state,
        }
        if self.by_channel and log_decay is not None:
            log_decay = log_decay.repeat(1, 1, 1, self.rank)
        if self.delta is not None:
            q, k = spread(q, q_factors, unit=True), spread(k, k_factors, unit=True)
            output, linear = delta_attention(q, k, v, self.delta(x), log_decay=log_decay, **keywords)
        else:
            assert log_decay is not None
            q, k = spread(q, q_factors), spread(k, k_factors)
            keywords |= {"normalize": self.output_norm is None, "eps": self.eps}
            output, linear = channel_decay_attention(q, k, v, log_decay, **keywords)
        if linear is None:
            return output, None
        kv, z = (x.flatten(2, 3).unflatten(2, (self.rank, self.feature_width)) for x in (linear.kv, linear.z))
        return output, LinearState(kv, z, linear.log_decay)

    def _angles(self, clocks: Clocks, q: Tensor, k: Tensor, call: Call) -> Angles:
        """Of the features of queries and of keys."""
        state, places = call.state, (None, None)
        if self.q_proportion is not None and self.k_proportion is not None:
            places = self.q_proportion(q), self.k_proportion(k)
        return clocks(
            k,
            None if call.is_self else q,
            past=(None, None) if state is None else (state.clock, state.query_clock),
            places=places,
            key_mask=call.key_mask,
            cu_seqlens=call.cu_seqlens,
            cu_seqlens_k=call.cu_seqlens if call.is_self else call.cu_seqlens_k,
        )

    def next_keys(
        self, k: Tensor, places: Tensor, state: LayerState, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.delta is not None:
            raise ValueError("update='delta': expected keys of tokens (no other key has a beta), got keys alone")
        if self.clocks is None:
            return super().next_keys(k, places, state, key_mask)
        k = self.feature_map(k)
        none = k.new_zeros(k.shape[0], 0, self.num_heads, k.shape[3]) if self.clocks.q_steps is not None else None
        added = None if self.k_proportion is None else self.k_proportion(k)
        angles: Angles = self.clocks(k, none, past=(state.clock, None), places=(None, added), key_mask=key_mask)
        state.clock = angles.clock
        return self._unit(k), angle_factors(angles.keys)

    def next_queries(self, q: Tensor, position_ids: Tensor, state: LayerState) -> tuple[Tensor, Tensor | None]:
        if self.clocks is None:
            return super().next_queries(q, position_ids, state)
        q = self.feature_map(q)
        none = q.new_zeros(q.shape[0], 0, self.num_kv_heads, q.shape[3])
        added = None if self.q_proportion is None else self.q_proportion(q)
        angles: Angles = self.clocks(none, q, past=(None, state.query_clock), places=(added, None))
        return self._unit(q), angle_factors(angles.queries)

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
        of_places = self._proportion_of_places
        p = of_places(places) if self.k_proportion is None else self._read_off(self.k_proportion, k, places)
        if p is None:
            return self._unit(k), None
        p = p.expand(k.shape[0], -1, -1)
        return self._unit(k), self.reweighting.factors_k(p.to(torch.promote_types(k.dtype, torch.float32)))

    def query_features(self, q: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        q, p = self.feature_map(q), None
        if self.q_proportion is not None:
            p = self._read_off(self.q_proportion, q, position_ids)
        elif self.position_proportion is not None:
            p = self.position_proportion(position_ids)
        if p is None:
            return self._unit(q), None
        return self._unit(q), self.reweighting.factors_q(p.to(torch.promote_types(q.dtype, torch.float32)))

    def _read_off(self, proportion: Any, x: Tensor, places: Tensor | None) -> Tensor:
        """The proportions of features x [B, T, H, K], at ``places`` where they count."""
        return proportion(x, places) if self.has_prior else proportion(x)

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
        if self.q_proportion is None and self.position_proportion is None:
            return None, None
        of_queries = of_keys = None
        if self.position_proportion is not None or self.has_prior:
            of_queries = of_keys = call.places(q)
            if not call.is_self:
                of_keys = token_positions(k.shape[1], k.device, key_mask=call.key_mask, cu_seqlens=call.cu_seqlens_k)
        if self.q_proportion is not None and self.k_proportion is not None:
            p_q, p_k = self._read_off(self.q_proportion, q, of_queries), self._read_off(self.k_proportion, k, of_keys)
        else:
            assert self.position_proportion is not None and of_queries is not None and of_keys is not None
            p_q = p_k = self.position_proportion(of_queries).expand(q.shape[0], -1, -1)
            if not call.is_self:
                p_k = self.position_proportion(of_keys).expand(k.shape[0], -1, -1)
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
        raise ValueError(f"proportion: expected None, 'position', 'learned', 'prior' or 'running', got {proportion!r}")
    return pair


def _is_exact(proportion: Any) -> bool:
    """A LeaP module that rounds nothing."""
    return isinstance(proportion, LeapModule) and proportion.bins is None


_COMPOSITION = {
    "feature_map": "feature_map",
    "reweighting": "reweighting",
    "decay": "decay",
    "decay_scales": "decay_scales",
    "decay_per": "decay_per",
    "output_norm": "output_norm",
    **{name: name for name in ("qk_norm", "rotary", "rotary_base", "delta_range")},
    "update": "attention_update",
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
