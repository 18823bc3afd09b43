"""Sizes, spans and launches of the GPU kernels: what forward and backward share.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, K and V widths, N packed sequences, C
tokens of a chunk, M tokens of a segment, D = R K (V + 1) numbers of a state.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops.arguments import Arguments
from leapformer.ops.checks import boundaries
from leapformer.ops.triton.limits import FUSED_WIDTH, INTERPRETED, SEGMENT_STEP, power_of_two


@functools.cache
def kernels() -> Any:
    """The kernels, of which nothing is imported before the first call."""
    from leapformer.ops.triton import kernels

    return kernels


# ---- sizes of blocks -------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """chunk C, tiles of K and V, and Triton's warps per program and stages of loads under way."""

    C: int
    BK: int
    BV: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def read_tiles(K: int, V: int, R: int, dtype: torch.dtype) -> Tiles:
    """For sweeps that hold all features and a tile of values."""
    BK, BV = power_of_two(K), power_of_two(V)
    # The state is the largest thing in registers, which must not spill.
    most = 2048 if dtype != torch.bfloat16 else 4096 if R * BK > 128 else 8192
    return Tiles(16, BK, min(BV, _fitting(most // (R * BK))), 8, 1)


def feature_tiles(K: int, V: int, R: int, dtype: torch.dtype) -> Tiles:
    """For sweeps that hold all values and a tile of features."""
    BK, BV = power_of_two(K), power_of_two(V)
    most = 4096 if dtype != torch.bfloat16 else 8192
    if R > 4:  # the gradients of so many features take as much again
        most //= 2
    return Tiles(16, min(BK, _fitting(most // (R * BV))), BV, 8, 1)


def _fitting(width: int) -> int:
    """The largest tile up to ``width``, a power of two, or the smallest that there is."""
    return max(16, 1 << max(0, width.bit_length() - 1))


def segment_tokens(tokens: int, heads: int, device: torch.device) -> int:
    """M: long enough that states are few, short enough that every multiprocessor has work."""
    if INTERPRETED:
        return SEGMENT_STEP
    programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 512
    wanted = max(1, programs // max(1, heads))
    return max(2, -(-tokens // (wanted * SEGMENT_STEP))) * SEGMENT_STEP


# ---- one plan --------------------------------------------------------------------------------------------------------


class Plan:
    """What forward and backward share: sides, spans, visibility and compile-time arguments."""

    def __init__(self, x: Arguments) -> None:
        B, T, H, K = x.q.shape
        S, G, V = x.k.shape[1], x.k.shape[2], x.v.shape[3]
        self.x, self.normalize, self.eps = x, x.normalize, x.eps
        self.B, self.T, self.S, self.H, self.G, self.K, self.V, self.R = B, T, S, H, G, K, V, x.rank
        self.D = self.R * K * (V + 1)
        words = kernels()
        self.visible = words.CAUSAL if x.causal else words.ALL if x.counts is None else words.COUNTS
        self.counts, self.count_stride = None, 0
        if x.counts is not None:
            self.counts = x.counts.to(torch.int32).contiguous()
            self.count_stride = 0 if x.counts.shape[0] == 1 else self.counts.stride(0)
        packed = x.cu_seqlens is not None
        self.N = x.sequences
        heads = H if packed else B * H
        self.queries = _span(T, self.N, segment_tokens(T, heads, x.q.device), x.cu_seqlens)
        if x.causal and x.cu_seqlens is not None and x.cu_seqlens_k is not None and x.cu_seqlens_k is not x.cu_seqlens:
            boundaries(
                x.cu_seqlens, x.cu_seqlens_k, T, S, same=True
            )  # a decay with keys packed otherwise: rare, so it may wait
        # Causal sweeps meet chunk by chunk, so both sides have the same segments.
        self.keys = self.queries if x.causal else _span(S, self.N, segment_tokens(S, heads, x.q.device), x.cu_seqlens_k)
        self.read = read_tiles(K, V, self.R, x.q.dtype)
        self.features = feature_tiles(K, V, self.R, x.q.dtype)
        self.hidden = 16
        for weights in (x.q_leap, x.k_leap):
            if weights is not None and weights.w1 is not None:
                self.hidden = max(self.hidden, power_of_two(weights.w1.shape[1]))
        self.mask = None if x.key_mask is None else x.key_mask.contiguous().view(torch.uint8)
        self.decay, self.later = by_head(x.log_decay), by_head(x.later_decay)
        if self.later is not None:
            self.later = self.first_steps(F.pad(self.later, (1, 0)))[..., :T].contiguous()

    def shape(self, tiles: Tiles, hidden: int | None = None) -> Any:
        """What kernels with these tiles are compiled for; ``hidden`` where it is not that of the modules."""
        import triton.language as tl

        bf16 = self.x.q.dtype == torch.bfloat16
        # float16 cannot hold sums over many keys, nor gradients divided by a small normaliser; tf32 has its precision.
        operands = tl.bfloat16 if bf16 else tl.float32
        hidden = self.hidden if hidden is None else hidden
        fields = self.K, self.V, self.R, tiles.C, tiles.BK, tiles.BV, hidden, operands, self.precision
        return kernels().Shape(*map(tl.constexpr, fields))

    @property
    def precision(self) -> str:
        exact = self.x.q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return "tf32x3" if exact else "tf32"

    def first_steps(self, steps: Tensor) -> Tensor:
        """0, in place, where ``steps`` [B, H, T + 1] would lead from one sequence into the next."""
        starts = steps.new_zeros(1, dtype=torch.int64) if self.queries.cu is None else self.queries.cu[:-1].long()
        return steps.index_fill_(-1, starts, 0)

    def query_side(self, w: Tensor | None = None, scale=None, aux=None, score=None, leap=None) -> Any:
        return self._side(self.x.q, self.x.q_factors, self.x.q_angles, w, scale, aux, score, leap, None)

    def key_side(self, score: Tensor | None = None, leap=None) -> Any:
        return self._side(self.x.k, self.x.k_factors, self.x.k_angles, self.x.v, None, None, score, leap, self.mask)

    def _side(self, x, factors, angles, w, scale, aux, score, leap, mask) -> Any:
        x, factors, angles, strides = dense(x), by_head(factors), by_head(angles), None
        w1, b1, w2, b2, *leap_strides, r = leap_weights((None,) * 4 if leap is None else leap)
        rows = factors if angles is None else angles
        if rows is not None:
            strides = rows.stride(0), 0 if rows.shape[1] == 1 else rows.stride(1)
        return kernels().Side(
            x=x, x_strides=strides_of(x), relu=1 if self.x.relu else None, factors=factors, angles=angles,
            factor_strides=strides, score=score, w1=w1, b1=b1, w2=w2, b2=b2, leap_strides=tuple(leap_strides), r=r,
            w=w if w is None else dense(w), w_strides=None if w is None else strides_of(dense(w)), scale=scale,
            aux=aux, mask=mask, decay=self.decay, later=self.later, tokens=x.shape[1], heads=x.shape[2],
        )  # fmt: skip

    def states(self, span: Any) -> Tensor:
        return self.x.q.new_empty(programs(span) + span.sequences, self.G, self.D, dtype=torch.float32)

    def run_module(self, side: Any) -> Any:
        """Runs the side's LeaP module now where it won't fit into a sweep, or two sweeps need it."""
        if side.w2 is None or (self.K <= FUSED_WIDTH and self.later is None):
            return side
        B, T, heads = side.x.shape[:3]
        grid, shape = (-(-T // 16), B, heads), self.shape(self.read)
        launch(kernels().scores, grid, side, shape, num_warps=4, num_stages=1)
        return side._replace(w2=None)

    def run_states(
        self, side: Any, span: Any, kv: Tensor | None, z: Tensor | None, *, reverse: bool, heads: int, aux: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States at the segments' starts (in the sweep's direction), and kv and z at its end."""
        final_kv = self.x.q.new_empty(self.N, self.G, self.R, self.K, self.V, dtype=torch.float32)
        final_z = final_kv.new_empty(self.N, self.G, self.R, self.K)
        states = self._run_states(side, span, kv, z, final_kv, final_z, reverse, heads, aux)
        return states, final_kv, final_z

    def run_later_states(self, side: Any, span: Any, *, reverse: bool, aux: bool) -> Tensor | None:
        """As ``run_states``, of the direction in which later keys are seen; there every query head has a key head."""
        if self.later is None:
            return None
        return self._run_states(side._replace(decay=self.later), span, None, None, None, None, reverse, 1, aux)

    def _run_states(self, side, span, kv, z, final_kv, final_z, reverse, heads, aux) -> Tensor:
        decay = side.decay is not None
        states = self.states(span)
        totals = states.new_empty(states.shape[:2]) if decay else None
        tiles = -(-self.V // self.read.BV)
        launch(
            kernels().segment_states, (tiles * programs(span), self.G), side, span, states, totals, self.G,
            self.shape(self.read), HEADS=heads, AUX=aux, DECAY=decay, REVERSE=reverse, **self.read.options,
        )  # fmt: skip
        kv, z = (None if t is None else t.float().contiguous() for t in (kv, z))
        block = min(1024, power_of_two(self.D))
        launch(
            kernels().scan_states, (self.N, self.G, -(-self.D // block)), span, states, totals, kv, z, final_kv,
            final_z, self.G, self.R * self.K * self.V, self.D, DECAY=decay, REVERSE=reverse, BLOCK=block, AHEAD=4,
            num_warps=4,
        )  # fmt: skip
        return states

    def run_read(
        self,
        a: Any,
        b: Any,
        spans: tuple[Any, Any],
        states: Tensor,
        later_states: Tensor | None,
        out: Tensor,
        normaliser: Tensor | None,
        *,
        reverse: bool,
    ) -> None:
        rows, columns = (1, self.H // self.G) if reverse else (self.H // self.G, 1)
        tiles = -(-self.V // self.read.BV)
        grid, normalize = (tiles * programs(spans[0]), a.heads), normaliser is not None
        part, part_totals = None, None
        if later_states is not None:
            part = self._part(out)
            part_totals = None if normaliser is None else normaliser.new_empty(tiles, *normaliser.shape)
            launch(
                kernels().read_against, grid, a, b, spans[0], later_states, part, strides_of(part), part_totals, self.G,
                self.shape(self.read), REVERSE=reverse, NORMALIZE=normalize, **self.read.options,
            )  # fmt: skip
        launch(
            kernels().read, grid, a, b, *spans, states, self.counts, self.count_stride, out,
            strides_of(out), normaliser, part, part_totals, self.G, self.eps,
            self.shape(self.read),
            ROW_SHARE=rows, COLUMN_SHARE=columns, VISIBLE=self.visible, REVERSE=reverse,
            NORMALIZE=normalize, DECAY=self.x.log_decay is not None, **self.read.options,
        )  # fmt: skip

    def run_features(
        self,
        a: Any,
        b: Any,
        spans: tuple[Any, Any],
        states: Tensor,
        later_states: Tensor | None,
        dx: Tensor,
        later_sums: Tensor | None,
        *,
        reverse: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes dx; returns the gradient of factors [B, heads, R, T], of angles [B, heads, R / 2, T] or of the
        proportion [B, heads, T], and the sums x . dx of ``log_decay``. Those of ``later_decay`` end in
        ``later_sums``."""
        tiles, (B, T, heads) = -(-self.K // self.features.BK), a.x.shape[:3]
        decay = self.x.log_decay is not None
        factors = None
        if a.score is not None:
            factors = dx.new_empty(tiles, B, heads, T, dtype=torch.float32)
        elif a.factors is not None or a.angles is not None:
            numbers = self.R if a.angles is None else self.R // 2
            factors = dx.new_empty(tiles, B, heads, numbers, T, dtype=torch.float32)
        sums = dx.new_empty(tiles, B, heads, T, dtype=torch.float32) if decay else None
        rows, columns = (1, self.H // self.G) if reverse else (self.H // self.G, 1)
        grid, shape = (tiles * programs(spans[0]), a.heads), self.shape(self.features, hidden=16)
        auxiliary = {"ROW_AUX": reverse or self.normalize, "COLUMN_AUX": self.normalize}
        part = None
        if later_states is not None:
            part = self._part(dx)
            launch(
                kernels().features_against, grid, a, b, spans[0], later_states, part, strides_of(part), factors,
                later_sums, self.G, shape, REVERSE=reverse, **auxiliary, **self.features.options,
            )  # fmt: skip
        launch(
            kernels().feature_gradients, grid, a, b, *spans, states, self.counts, self.count_stride, dx, strides_of(dx),
            factors, sums, part, later_sums, self.G, shape,
            ROW_SHARE=rows, COLUMN_SHARE=columns, VISIBLE=self.visible, REVERSE=reverse,
            DECAY=decay, **auxiliary, **self.features.options,
        )  # fmt: skip
        return None if factors is None else factors[0] if tiles == 1 else factors.sum(0), sums

    def run_diagonal(self, queries: Any, keys: Any) -> tuple[Tensor | None, Tensor | None]:
        """The sums x . dx [tiles, B, H, T] of ``later_decay`` for queries and for keys: what is in the same chunk, in
        the first tile. The sweeps do the rest."""
        if self.later is None:
            return None, None
        tiles = -(-self.K // self.features.BK)
        sums = self.later.new_empty(2, tiles, self.B, self.H, self.T)
        whole = self.features._replace(BK=power_of_two(self.K), warps=4)
        launch(
            kernels().diagonal_sums, (programs(self.queries), self.H), queries, keys, self.queries, sums[0], sums[1],
            self.shape(whole, hidden=16), AUX=self.normalize, **whole.options,
        )  # fmt: skip
        return sums[0], sums[1]

    def _part(self, whole: Tensor) -> Tensor:
        """Where a sweep leaves what the other direction gives to ``whole``: in float32, so there itself if it is."""
        return whole if whole.dtype == torch.float32 else torch.empty_like(whole, dtype=torch.float32)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel unless its grid is empty."""
    if 0 not in grid:
        kernel[grid](*args, **constants)


def dense(x: Tensor) -> Tensor:
    """x itself where its last axis has stride 1 (or no second element)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def by_head(x: Tensor | None) -> Tensor | None:
    """[B, T, H] or [B, T, H, R] as float32 [B, H, T] or [B, H, R, T]."""
    return None if x is None else x.movedim(1, -1).float().contiguous()


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, token and head; 0 where an axis of one element stands for all heads."""
    batch, token, head = x.stride()[:3]
    return batch, token, 0 if x.shape[2] == 1 else head


def leap_weights(weights: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """(w1, b1, w2, b2, their strides from head to head, r) as the kernels take them."""
    fields = [None if w is None else w.contiguous() for w in weights]
    strides = [0 if w is None or w.shape[0] == 1 else w.stride(0) for w in fields]
    w1 = fields[0]
    return (*fields, *strides, 0 if w1 is None else w1.shape[1])


def _span(length: int, sequences: int, M: int, cu: Tensor | None) -> Any:
    """The sequences of one side and how they are cut into segments of M tokens."""
    Span = kernels().Span
    if cu is None:
        return Span(length, -(-length // M), sequences, M, None, None, None, None)
    # The tables are made on the device, so that nothing waits for the lengths: a few programs too many find no segment.
    # Made to rise from 0 to the length: whatever they hold, no kernel reads beyond the tensors.
    cu = cu.to(torch.int64).clamp(0, length).cummax(0).values.to(torch.int32).contiguous()
    segments = (cu.diff() + (M - 1)) // M
    ends = segments.cumsum(0)
    index = torch.arange(length // M + sequences, device=cu.device)
    rows = torch.searchsorted(ends, index, right=True)
    starts = ends - segments
    places = index - starts[rows.clamp(max=sequences - 1)]
    slots = starts + torch.arange(sequences, device=cu.device)
    tables = (t.to(torch.int32) for t in (rows, places, slots))
    return Span(length, length // M + 1, sequences, M, cu, *tables)


def programs(span: Any) -> int:
    """Segments of all sequences; for packed ones an upper bound."""
    return span.segments * span.sequences if span.cu is None else span.rows.shape[0]
