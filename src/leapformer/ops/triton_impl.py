"""``impl="triton"``: linear attention on a GPU, as PyTorch custom operators around the kernels of triton_kernels.py.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, K and V widths, N packed sequences, C tokens of
a chunk, M tokens of a segment, D = R K (V + 1) numbers of a state.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leapformer.ops.arguments import MODULES, Arguments, Gradients, Incoming
from leapformer.ops.checks import boundaries
from leapformer.ops.implementation import BASIS, Implementation
from leapformer.ops.operator import Operator

INSTALLED = find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"  # by Triton's interpreter, on the CPU
SEGMENT_STEP = 32 if INTERPRETED else 64  # segments are multiples of this, which is one of all chunks
FUSED_WIDTH = 16 if INTERPRETED else 64  # of heads whose LeaP module is run inside the sweeps
MAX_HIDDEN = 128
# Rank times width, rounded up to a power of two: with more, the kernels' registers spill.
MAX_FEATURES = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}


# ---- who can be served -----------------------------------------------------------------------------------------------


def reasons(x: Arguments | None = None) -> list[str]:
    """Why the kernels can't run here, or for a call; empty where they can."""
    found = [] if INSTALLED else ["the package triton is not installed"]
    if x is None:
        if not INTERPRETED and not torch.cuda.is_available():
            found.append("PyTorch finds no GPU")
        return found
    device, rank = x.q.device, x.rank
    if device.type == "cuda":
        if torch.cuda.get_device_properties(device).major < 8:
            found.append("expected a GPU of compute capability 8.0 or more")
    elif not (INTERPRETED and device.type == "cpu"):
        found.append(f"expected tensors on a GPU, got {device}")
    if x.q.dtype not in MAX_FEATURES:
        found.append(f"expected dtype torch.bfloat16, torch.float16 or torch.float32, got {x.q.dtype}")
    for name, width in (("K", x.q.shape[-1]), ("V", x.v.shape[-1])):
        features, most = rank * power_of_two(width), MAX_FEATURES.get(x.q.dtype, 256)
        if features > most:
            found.append(f"expected rank x {name}, rounded up to a power of two, up to {most}, got {features}")
        if width == 0:
            found.append(f"expected {name} above 0, got 0")
    if rank == 0:
        found.append("expected a rank above 0, got 0")
    if x.hidden > MAX_HIDDEN:
        found.append(f"expected LeaP modules with r up to {MAX_HIDDEN}, got {x.hidden}")
    if x.kv is not None and x.kv.dtype == torch.float64:
        found.append("expected a state of torch.float32, got torch.float64")
    return found


@functools.cache
def _kernels() -> Any:
    from leapformer.ops import triton_kernels

    return triton_kernels


# ---- sizes of blocks -------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """chunk C, tiles of K and V, and Triton's warps per program and stages of loads under way."""

    C: int
    BK: int
    BV: int
    warps: int
    stages: int


def read_tiles(K: int, V: int, R: int, dtype: torch.dtype) -> Tiles:
    """For sweeps that hold all features and a tile of values."""
    BK, BV = power_of_two(K), power_of_two(V)
    # The state is the largest thing in registers, which must not spill.
    most = 2048 if dtype != torch.bfloat16 else 4096 if R * BK > 128 else 8192
    return Tiles(16, BK, min(BV, max(16, most // (R * BK))), 8, 1)


def feature_tiles(K: int, V: int, R: int, dtype: torch.dtype) -> Tiles:
    """For sweeps that hold all values and a tile of features."""
    BK, BV = power_of_two(K), power_of_two(V)
    most = 4096 if dtype != torch.bfloat16 else 8192
    return Tiles(16, min(BK, max(16, most // (R * BV))), BV, 8, 1)


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


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
        kernels = _kernels()
        self.visible = kernels.CAUSAL if x.causal else kernels.ALL if x.counts is None else kernels.COUNTS
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

    def constants(self, tiles: Tiles) -> dict[str, Any]:
        import triton.language as tl

        bf16 = self.x.q.dtype == torch.bfloat16
        exact = self.x.q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return {
            "R": self.R, "C": tiles.C, "BK": tiles.BK, "BV": tiles.BV,
            # float16 cannot hold sums over many keys, nor gradients divided by a small normaliser; tf32 has its precision.
            "DOT": tl.bfloat16 if bf16 else tl.float32, "PRECISION": "tf32x3" if exact else "tf32",
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def query_side(self, w: Tensor | None = None, scale=None, aux=None, score=None, leap=None) -> Any:
        return self._side(self.x.q, self.x.q_factors, w, scale, aux, score, leap, None)

    def key_side(self, score: Tensor | None = None, leap=None) -> Any:
        return self._side(self.x.k, self.x.k_factors, self.x.v, None, None, score, leap, self.mask)

    def _side(self, x, factors, w, scale, aux, score, leap, mask) -> Any:
        x, factors, strides = dense(x), by_head(factors), None
        w1, b1, w2, b2, *leap_strides, r = _leap((None,) * 4 if leap is None else leap)
        if factors is not None:
            strides = factors.stride(0), 0 if factors.shape[1] == 1 else factors.stride(1)
        return _kernels().Side(
            x=x, x_strides=_strides(x), relu=1 if self.x.relu else None, factors=factors, factor_strides=strides,
            score=score, w1=w1, b1=b1, w2=w2, b2=b2, leap_strides=tuple(leap_strides), r=r,
            w=w if w is None else dense(w), w_strides=None if w is None else _strides(dense(w)), scale=scale, aux=aux, mask=mask,
            decay=by_head(self.x.log_decay), tokens=x.shape[1], heads=x.shape[2],
        )  # fmt: skip

    def states(self, span: Any) -> Tensor:
        return self.x.q.new_empty(_programs(span) + span.sequences, self.G, self.D, dtype=torch.float32)

    def run_module(self, side: Any) -> Any:
        """Runs the side's LeaP module now where it won't fit into a sweep."""
        if side.w2 is None or self.K <= FUSED_WIDTH:
            return side
        B, T, heads = side.x.shape[:3]
        constants = {
            "BK": self.read.BK,
            "C": 16,
            "BH": self.hidden,
            "PRECISION": self.constants(self.read)["PRECISION"],
        }
        launch(_kernels().scores, (-(-T // 16), B, heads), side, self.K, **constants, num_warps=4, num_stages=1)
        return side._replace(w2=None)

    def run_states(
        self, side: Any, span: Any, kv: Tensor | None, z: Tensor | None, *, reverse: bool, heads: int, aux: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States at the segments' starts (in the sweep's direction), and kv and z at its end."""
        kernels, decay = _kernels(), self.x.log_decay is not None
        states = self.states(span)
        totals = states.new_empty(states.shape[:2]) if decay else None
        tiles = -(-self.V // self.read.BV)
        launch(
            kernels.segment_states, (tiles * _programs(span), self.G), side, span, states, totals, self.G, heads, self.K,
            self.V, AUX=aux, DECAY=decay, REVERSE=reverse, BH=self.hidden, **self.constants(self.read),
        )  # fmt: skip
        final_kv = states.new_empty(self.N, self.G, self.R, self.K, self.V)
        final_z = states.new_empty(self.N, self.G, self.R, self.K)
        kv, z = (None if t is None else t.float().contiguous() for t in (kv, z))
        block = min(1024, power_of_two(self.D))
        launch(
            kernels.scan_states, (self.N, self.G, -(-self.D // block)), span, states, totals, kv, z, final_kv, final_z,
            self.G, self.R * self.K * self.V, self.D, DECAY=decay, REVERSE=reverse, BLOCK=block, AHEAD=4, num_warps=4,
        )  # fmt: skip
        return states, final_kv, final_z

    def run_read(
        self,
        a: Any,
        b: Any,
        spans: tuple[Any, Any],
        states: Tensor,
        out: Tensor,
        normaliser: Tensor | None,
        *,
        reverse: bool,
    ) -> None:
        shares = (1, self.H // self.G) if reverse else (self.H // self.G, 1)
        tiles = -(-self.V // self.read.BV)
        launch(
            _kernels().read, (tiles * _programs(spans[0]), a.heads), a, b, *spans, states, self.counts, self.count_stride,
            out, _strides(out), normaliser, self.G, self.eps, *shares, self.K, self.V, VISIBLE=self.visible,
            REVERSE=reverse, NORMALIZE=self.normalize and not reverse, DECAY=self.x.log_decay is not None,
            BH=self.hidden, **self.constants(self.read),
        )  # fmt: skip

    def run_features(
        self, a: Any, b: Any, spans: tuple[Any, Any], states: Tensor, dx: Tensor, *, reverse: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes dx; returns the gradient of factors [B, heads, R, T] or of the proportion [B, heads, T], and the sums x . dx."""
        tiles, (B, T, heads) = -(-self.K // self.features.BK), a.x.shape[:3]
        decay = self.x.log_decay is not None
        factors = None
        if a.score is not None or a.factors is not None:
            shape = (tiles, B, heads, T) if a.score is not None else (tiles, B, heads, self.R, T)
            factors = dx.new_empty(shape, dtype=torch.float32)
        sums = dx.new_empty(tiles, B, heads, T, dtype=torch.float32) if decay else None
        shares = (1, self.H // self.G) if reverse else (self.H // self.G, 1)
        launch(
            _kernels().feature_gradients, (tiles * _programs(spans[0]), a.heads), a, b, *spans, states, self.counts,
            self.count_stride, dx, _strides(dx), factors, sums, self.G, *shares, self.K, self.V, VISIBLE=self.visible,
            REVERSE=reverse, ROW_AUX=reverse or self.normalize, COLUMN_AUX=self.normalize, DECAY=decay,
            **self.constants(self.features),
        )  # fmt: skip
        return None if factors is None else factors[0] if tiles == 1 else factors.sum(0), sums


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


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, token and head; 0 where an axis of one element stands for all heads."""
    batch, token, head = x.stride()[:3]
    return batch, token, 0 if x.shape[2] == 1 else head


def _leap(weights: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """(w1, b1, w2, b2, their strides from head to head, r) as the kernels take them."""
    fields = [None if w is None else w.contiguous() for w in weights]
    strides = [0 if w is None or w.shape[0] == 1 else w.stride(0) for w in fields]
    w1 = fields[0]
    return (*fields, *strides, 0 if w1 is None else w1.shape[1])


def _span(length: int, sequences: int, M: int, cu: Tensor | None) -> Any:
    """The sequences of one side and how they are cut into segments of M tokens."""
    Span = _kernels().Span
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


def _programs(span: Any) -> int:
    """Segments of all sequences; for packed ones an upper bound."""
    return span.segments * span.sequences if span.cu is None else span.rows.shape[0]


# ---- forward and backward --------------------------------------------------------------------------------------------


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _forward(x: Arguments) -> tuple[Tensor, ...]:
    """(output, kv, z, normaliser, states at the segments' starts, scores of queries, and of keys)."""
    plan, q = Plan(x), x.q
    leap = x.q_leap is not None
    q_score = q.new_empty((plan.B, plan.H, plan.T) if leap else (0,), dtype=torch.float32)
    k_score = q.new_empty((plan.B, plan.G, plan.S) if leap else (0,), dtype=torch.float32)
    output = q.new_empty(plan.B, plan.T, plan.H, plan.V)
    normaliser = q.new_empty((plan.B, plan.H, plan.T) if x.normalize else (0,), dtype=torch.float32)
    with _on(q):
        keys = plan.run_module(plan.key_side(score=k_score if leap else None, leap=x.k_leap))
        states, final_kv, final_z = plan.run_states(keys, plan.keys, x.kv, x.z, reverse=False, heads=1, aux=True)
        keys = keys._replace(w2=None)  # by now its scores are stored
        queries = plan.run_module(plan.query_side(score=q_score if leap else None, leap=x.q_leap))
        spans = plan.queries, plan.keys
        plan.run_read(queries, keys, spans, states, output, normaliser if x.normalize else None, reverse=False)
    return output, final_kv, final_z, normaliser, states, q_score, k_score


def _empty(x: Arguments) -> tuple[Tensor, ...]:
    (B, T, H, K), q = x.q.shape, x.q
    S, G, V = x.k.shape[1], x.k.shape[2], x.v.shape[3]
    packed, N, R, leap = x.cu_seqlens is not None, x.sequences, x.rank, x.q_w2 is not None
    M = segment_tokens(S, H if packed else B * H, q.device)
    slots = (S // M if packed else N * (-(-S // M))) + N
    if packed:
        slots = slots + N

    def float32(*shape):
        return q.new_empty(*shape, dtype=torch.float32)

    return (
        q.new_empty(B, T, H, V), float32(N, G, R, K, V), float32(N, G, R, K), float32(*((B, H, T) if x.normalize else (0,))),
        float32(slots, G, R * K * (V + 1)), float32(*((B, H, T) if leap else (0,))), float32(*((B, G, S) if leap else (0,))),
    )  # fmt: skip


def _backward(x: Arguments, results: Sequence[Tensor], incoming: Incoming) -> Gradients:
    with _on(x.q):
        return _gradients(x, results, incoming)


def _gradients(x: Arguments, results: Sequence[Tensor], incoming: Incoming) -> Gradients:
    output, _kv, _z, normaliser, states, q_score, k_score = results
    plan, kernels, normalize, eps = Plan(x), _kernels(), x.normalize, x.eps
    leap, share = x.q_leap is not None, plan.H // plan.G
    grad, scale, aux = dense(incoming.output), None, None
    if normalize:
        rows = plan.B * plan.T * plan.H
        scale, aux = torch.empty_like(normaliser), torch.empty_like(normaliser)
        block = 16 if INTERPRETED else 32
        launch(
            kernels.numerator_gradients, (-(-rows // block),), grad, _strides(grad), output, _strides(output), normaliser,
            scale, aux, plan.T, plan.H, rows, eps, plan.V, BLOCK=block, BV=power_of_two(plan.V), num_warps=4,
        )  # fmt: skip
    queries = plan.query_side(w=grad, scale=scale, aux=aux, score=q_score if leap else None)
    keys = plan.key_side(score=k_score if leap else None)
    reverse_states, d_kv, d_z = plan.run_states(
        queries, plan.queries, incoming.kv, incoming.z, reverse=True, heads=share, aux=normalize
    )
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v))
    forward, backward = (plan.queries, plan.keys), (plan.keys, plan.queries)
    dq_factors, query_sums = plan.run_features(queries, keys, forward, states, dq, reverse=False)
    dk_factors, key_sums = plan.run_features(keys, queries, backward, reverse_states, dk, reverse=True)
    plan.run_read(keys, queries, backward, reverse_states, dv, None, reverse=True)
    decay = None
    if query_sums is not None and key_sums is not None:
        decay = _decay_gradient(plan, states, reverse_states, query_sums, key_sums)
    q_weights: list[Tensor | None] = [None] * 4
    k_weights: list[Tensor | None] = [None] * 4
    if x.q_leap is not None and x.k_leap is not None:
        assert dq_factors is not None and dk_factors is not None
        q_weights = _leap_gradients(plan, queries, x.q_leap, dq_factors, dq, None)
        k_weights = _leap_gradients(plan, keys, x.k_leap, dk_factors, dk, plan.mask)
        dq_factors = dk_factors = None
    dq_factors, dk_factors = _for_heads_of(x.q_factors, dq_factors), _for_heads_of(x.k_factors, dk_factors)
    return Gradients(dq, dk, dv, dq_factors, dk_factors, decay, d_kv, d_z, *q_weights, *k_weights)


def _for_heads_of(factors: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """From [B, H, R, T] to the gradient of factors [B, T, H or 1, R]."""
    if factors is None or gradient is None:
        return None
    return (gradient.sum(1, keepdim=True) if factors.shape[2] == 1 else gradient).movedim(-1, 1)


def _decay_gradient(plan: Plan, states: Tensor, reverse_states: Tensor, query_sums: Tensor, key_sums: Tensor) -> Tensor:
    gradient = query_sums.new_empty(plan.B, plan.H, plan.T)
    launch(
        _kernels().decay_gradients, (_programs(plan.queries), plan.H), plan.queries, states, reverse_states, query_sums,
        key_sums, gradient, plan.T, plan.H, query_sums.shape[0], key_sums.shape[0], plan.D, C=16 if INTERPRETED else 64,
        BLOCK=min(1024, power_of_two(plan.D)), num_warps=4,
    )  # fmt: skip
    return gradient.movedim(-1, 1)


def _leap_gradients(
    plan: Plan, side: Any, weights: tuple[Tensor | None, ...], d_score: Tensor, dx: Tensor, mask: Tensor | None
) -> list[Tensor | None]:
    """Adds the module's part to dx [B, T, H, K] and returns the gradients of its four weights."""
    w1, b1, w2, b2 = weights
    assert w2 is not None and b2 is not None
    B, T, H, K = side.x.shape
    modules = max(w.shape[0] for w in weights if w is not None)
    r = 0 if w1 is None else w1.shape[1]
    numbers = K + 1 if r == 0 else r * K + 2 * r + 1
    rows, block = (B * T, 16) if modules > 1 else (B * T * H, 16)
    programs = max(1, min(-(-rows // block), 256))
    partial = dx.new_empty(programs, modules, numbers, dtype=torch.float32)
    import triton

    launch(
        _kernels().leap_gradients, (programs, modules), side.x, side.x_strides, side.score, d_score, dx, _strides(dx), mask,
        _leap(weights), partial, T, H, rows, K, numbers, per_head=modules > 1, r=r, BH=power_of_two(r), C=block,
        BK=triton.next_power_of_2(max(16, K)), PRECISION=plan.constants(plan.read)["PRECISION"], num_warps=8, num_stages=1,
    )  # fmt: skip
    total = partial.sum(0)
    sizes = [K, 1] if r == 0 else [r * K, r, r, 1]
    parts = list(total.split(sizes, dim=1))
    if r == 0:
        parts = [None, None, *parts]
    shaped = []
    for part, weight in zip(parts, weights, strict=True):
        if part is None or weight is None:
            shaped.append(None)
        else:
            part = part.sum(0, keepdim=True) if weight.shape[0] == 1 else part
            shaped.append(part.reshape(weight.shape).clone())  # operators may not return views of one another
    return shaped


def _direct(x: Arguments, update_state: bool) -> tuple[Tensor, ...]:
    if not x.is_step:
        return _forward(x)
    ready = all(t is not None and t.dtype == torch.float32 and t.is_contiguous() for t in (x.kv, x.z))
    return _step(x, x.kv, x.z) if update_state and ready else _step(x)


OPERATOR = Operator(
    "triton_linear_attention",
    forward=_forward,
    empty=_empty,
    backward=_backward,
    direct=_direct,
    results=7,
    takes=BASIS | MODULES,
)
IMPLEMENTATION = Implementation(OPERATOR.attend, takes=BASIS | MODULES, limits=reasons)


# ---- one token -------------------------------------------------------------------------------------------------------


def _step(x: Arguments, new_kv: Tensor | None = None, new_z: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output and state of one token, the state written where it is told."""
    plan = Plan(x)
    shape = (plan.B, plan.G, plan.R, plan.K)
    if new_kv is None or new_z is None:
        new_kv = x.q.new_empty(*shape, plan.V, dtype=torch.float32)
        new_z = x.q.new_empty(shape, dtype=torch.float32)
    kv, z = (None if t is None else t.float().contiguous() for t in (x.kv, x.z))
    output = x.q.new_empty(plan.B, 1, plan.H, plan.V)
    score = x.q.new_empty(0, dtype=torch.float32) if x.q_leap is not None else None  # factors come from scores
    BK = power_of_two(plan.K)
    with _on(x.q):
        launch(
            _kernels().step, (plan.B, plan.G), plan.query_side(score=score, leap=x.q_leap),
            plan.key_side(score=score, leap=x.k_leap), kv, z, new_kv, new_z, output, _strides(output), plan.G,
            plan.H // plan.G, x.eps, plan.K, plan.V, NORMALIZE=x.normalize, DECAY=x.log_decay is not None, R=plan.R,
            BH=plan.hidden, BK=BK, BV=max(16, min(power_of_two(plan.V), 4096 // BK)), num_warps=4,
        )  # fmt: skip
    return output, new_kv, new_z
