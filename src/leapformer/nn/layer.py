"""What all attention layers share: projections, short convolution, state handling, and the interface that models call.

A mechanism is a class of its own in a file of its own, which writes ``attend`` and says what it is in one
``Mechanism``.

Letters: B batch, T queries, S keys, D hidden size, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.conv import ShortConvolution
from leapformer.nn.packing import check_packing, token_positions
from leapformer.nn.state import LayerState, real_tokens
from leapformer.ops.api import Visible

OutputGate = Literal["silu", "sigmoid"]
GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class Capabilities:
    """What a mechanism can do; ``streaming`` means a state of constant size."""

    causal: bool
    cross: bool
    streaming: bool
    arbitrary_length: bool


class Call(NamedTuple):
    """What ``attend`` gets besides q, k, v and x.

    Attributes:
        is_self: self-attention; else k and v are of a context.
        visible, cu_seqlens, cu_seqlens_k: as in ``leapformer.ops.linear_attention``.
        key_mask: bool [B, S], True = real. position_ids: int64 [B or 1, T] from 0, or None.
        state: what came before. return_state: whether the state after x is wanted.
    """

    is_self: bool
    visible: Visible = "all"
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    position_ids: Tensor | None = None
    state: LayerState | None = None
    return_state: bool = False

    @property
    def stateful(self) -> bool:
        """Whether a state is given or wanted."""
        return self.state is not None or self.return_state

    def places(self, q: Tensor) -> Tensor:
        """Positions int64 [B or 1, T] of the tokens of q [B, T, ...]: ``position_ids``, or real tokens counted, on from
        the state.
        """
        if self.position_ids is not None:
            return self.position_ids
        first = None if self.state is None else self.state.length
        mask = self.key_mask if self.is_self else None
        return token_positions(q.shape[1], q.device, key_mask=mask, cu_seqlens=self.cu_seqlens, first=first)


class Shared(TypedDict, total=False):
    """Arguments of ``AttentionLayer`` that a mechanism passes on."""

    num_kv_heads: int | None
    head_dim: int | None
    conv_width: int
    output_gate: OutputGate | None
    bias: bool
    dropout: float


class AttentionLayer(nn.Module):
    """Projections, short convolution and state handling that all mechanisms share; a mechanism writes ``attend``.

    Args:
        hidden_size, num_heads, num_kv_heads (None: num_heads), head_dim (None: hidden_size / num_heads): D, H, G, K.
        conv_width: width of the short causal convolution on the layer's input, 0 for none.
        share_qk: keys are the queries; then num_kv_heads is num_heads.
        output_gate: multiply the heads' outputs, behind an output norm, by silu(W x) or sigmoid(W x), W [H K, D]
            without bias and x what the projections see ("silu": arXiv 2307.08621, eq. 8; "sigmoid": arXiv 2505.06708);
            None: don't.
        bias: of the projections. dropout: where it is, the mechanism says.

    Raises:
        ValueError: heads that do not divide each other or the width, or an unknown gate.
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
        output_gate: OutputGate | None = None,
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
        if output_gate is not None and output_gate not in GATES:
            raise ValueError(f"output_gate: expected one of {sorted(GATES)} or None, got {output_gate!r}")
        self.output_gate: OutputGate | None = output_gate
        self.gate_proj = None if output_gate is None else nn.Linear(hidden_size, num_heads * head_dim, bias=False)

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
            position_ids: int64 [B or 1, T] from 0, for cosFormer and rotary positions; None counts real tokens, on from
                the state.
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
        call = Call(context is None, visible, key_mask, cu_seqlens, cu_seqlens_k, position_ids, state, return_state)
        y, kept = self.attend(q, k, v, x, call)
        y = self.o_proj(self._gated(y.flatten(-2), x))
        if kept is None:
            return y, None
        kept.conv = None if tail is None else tail.clone()  # a view would keep all inputs alive
        kept.length = real_tokens(x, own_mask, state, cu_seqlens=cu_seqlens)
        return y, kept if state is None else state.update(kept)

    def _gated(self, y: Tensor, x: Tensor) -> Tensor:
        """The heads' outputs y [B, T, H K], each as far open as x [B, T, D] says."""
        if self.output_gate is None or self.gate_proj is None:
            return y
        return y * GATES[self.output_gate](self.gate_proj(x))

    def _check_packing(
        self, x: Tensor, context: Tensor | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None
    ) -> None:
        check_packing("attention", x.shape, cu_seqlens)
        if context is not None:
            check_packing("attention", context.shape, cu_seqlens_k, what="cu_seqlens_k")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call) -> tuple[Tensor, LayerState | None]:
        """From projected q [B, T, H, K], k, v [B, S, G, K] to the heads' outputs [B, T, H, K]."""
        raise NotImplementedError

    def prefix_state(self, k: Tensor, v: Tensor) -> LayerState:
        """The state after S keys and values [B, S, G, K] that no token was projected to, such as those of prefix
        tuning.

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

    # ---- step by step: its own past, or a source that comes in pieces

    def empty_state(self, rows: Tensor, *, keep_mass: bool = False) -> LayerState:
        """The state of a layer that has seen nothing, for the B rows of ``rows`` [B, any, D], of that dtype and device.

        keep_mass: with what ``mass`` needs, which grows with the chunks of the source.

        Raises:
            ValueError: a mechanism without a state.
        """
        state = self._empty_state(rows, keep_mass=keep_mass)
        state.length = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        if self.conv is not None:
            state.conv = rows.new_zeros(len(rows), self.conv.width - 1, rows.shape[2])
        return state

    def absorb(
        self, context: Tensor, state: LayerState, *, first: Tensor, key_mask: Tensor | None = None, chunk: int = 1
    ) -> None:
        """Put keys and values of context [B, n, D], a further piece of a source, into the state of cross-attention over
        it.

        first: int64 [B], the place of the piece in each row's source. key_mask: bool [B, n], True = real. chunk: places
        of a chunk, of which ``mass`` tells.
        """
        assert self.k_proj is not None  # where queries are the keys there is no cross-attention
        k = self.k_proj(context).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(context).unflatten(-1, (self.num_kv_heads, self.head_dim))
        self._absorb(k, v, state, first=first, key_mask=key_mask, chunk=chunk)

    def read(self, x: Tensor, state: LayerState, *, position_ids: Tensor) -> Tensor:
        """Cross-attention of x [B, 1, D] over all that ``state`` has absorbed; a convolution over x, and clocks of
        queries, go on in ``state``.
        """
        none = x.new_zeros(len(x), 0, x.shape[2])
        moves = self.conv is not None or state.query_clock is not None
        y, kept = self(x, none, position_ids=position_ids, state=replace(state), return_state=moves)
        if kept is not None:
            state.conv, state.query_clock = kept.conv, kept.query_clock
        return y

    def mass(self, x: Tensor, state: LayerState, *, position_ids: Tensor, chunk: int) -> Tensor:
        """The share of the attention of x [B, 1, D] over what ``state`` has absorbed that each chunk has, [B, H,
        chunks].

        ``state`` began with ``keep_mass``; ``chunk`` is as in ``absorb``. It comes before ``read``.
        """
        if self.conv is not None:
            x, _ = self.conv(x, past=state.conv)
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        return self._mass(q, state, position_ids=position_ids, chunk=chunk)

    def _empty_state(self, rows: Tensor, *, keep_mass: bool) -> LayerState:
        raise self._no_state()

    def _absorb(
        self, k: Tensor, v: Tensor, state: LayerState, *, first: Tensor, key_mask: Tensor | None, chunk: int
    ) -> None:
        raise self._no_state()

    def _mass(self, q: Tensor, state: LayerState, *, position_ids: Tensor, chunk: int) -> Tensor:
        raise self._no_state()

    def _no_state(self) -> ValueError:
        return ValueError(f"{type(self).__name__}: expected a mechanism that goes on from a state, got one without")


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """All that the rest of the package has to know of one mechanism: its entry in the registry
    (``leapformer.nn.build``).

    Attributes:
        name: in configurations and recipes, ``build_attention``'s ``kind``. layer: its class.
        label: in tables and pictures. row: its place there, equal ones in the order of the registry.
        compared: whether it is a row of its own where all mechanisms are compared.
        options: arguments of ``layer`` besides those of ``AttentionLayer``, each with the field of a configuration that
            sets it (None: the model sets it). fixed: arguments that the name stands for. gated: what the variant
            "gated" sets where nothing else is asked for.
        limit: why ``max_positions`` is the longest length, "{field}" standing for its name in a configuration; None:
            any length will do. over_source: its cross-attention where the source has a maximum of its own.
        weights: how many weights a layer with these arguments has beyond projections and LeaP, where that may be many.
        translates: whether a translation model offers it; then it goes on from a state, also over a source.
    """

    name: str
    layer: type[AttentionLayer]
    label: str
    row: int = 100
    compared: bool = True
    options: Mapping[str, str | None] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    gated: Mapping[str, Any] = field(default_factory=dict)
    limit: str | None = None
    over_source: type[AttentionLayer] | None = None
    weights: Callable[[Mapping[str, Any]], int] | None = None
    translates: bool = False

    @property
    def capabilities(self) -> Capabilities:
        """What its layers can do."""
        return replace(self.layer.capabilities, arbitrary_length=self.limit is None)
