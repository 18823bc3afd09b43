"""The delta rule: linear attention whose state, before it takes a key in, forgets what it holds under that key.

    S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        out_t = S_t^T q_t

Within a chunk all tokens are computed at once. With g the running sum of the log decay and u_t what token t really
writes, S_t = exp(g_t) S_0 + sum_{j <= t} exp(g_t - g_j) k_j u_j^T, and the u solve a triangular system (the WY form):

    u_t + beta_t sum_{j < t} exp(g_t - g_j) (k_t . k_j) u_j = beta_t (v_t - exp(g_t) S_0^T k_t)

Source: arXiv 2406.06484, sec. 3; with a decay arXiv 2412.06464, eq. 10.

Letters: B batch, T tokens, H query heads, G key/value heads, K key width, V value width, N packed sequences, C tokens
of a chunk, n chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapformer.ops.api import AttentionOutput
from leapformer.ops.autocast import without_autocast
from leapformer.ops.checks import expect
from leapformer.ops.cuts import Cut
from leapformer.ops.decay import running_sum, total_decay
from leapformer.ops.state import LinearState

CHUNK = 64


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
) -> AttentionOutput:
    """out_t = S_t^T q_t with S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, causal.

    Args:
        q: [B, T, H, K], k: [B, T, G, K], v: [B, T, G, V], of any sign. The state stays bounded where beta |k|^2 is at
            most 2: keys of length 1, such as normed features, and beta in [0, 2].
        beta: [B, T, H], how much of what the state holds under a key is replaced; above 1 its sign turns.
        log_decay: [B, T, H] <= 0; the state is multiplied by its exponential before token t.
        key_mask: bool [B, T], True = real; padding neither writes nor decays.
        cu_seqlens: int32 [N + 1], B = 1: N sequences packed behind one another; states are then [N, ...].
        initial_state: kv [B or N, H, R, K / R, V] with any R, as ``linear_attention`` has it for keys of rank R, which
            here lie behind one another; its z is not looked at.
        return_state: also return the state after all tokens (float32 or better): kv with the R of ``initial_state``, or
            1, and z of zeros.

    Returns:
        ``AttentionOutput(output [B, T, H, V] in the dtype of v, state)``. Time and memory are linear in T; autograd
        differentiates it.

    Raises:
        ValueError: shapes that don't fit.

    Source: arXiv 2406.06484, sec. 3; arXiv 2412.06464, eq. 10.
    """
    _check(q, k, v, beta, log_decay, key_mask, cu_seqlens, initial_state)
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with without_autocast(q.device.type):
        state = initial_state
        if state is None:
            rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = LinearState.zeros(rows, q.shape[2], 1, q.shape[3], v.shape[3], dtype=wide, device=q.device)
        q, k, v, beta = (x.to(wide) for x in (q, k, v, beta))
        if key_mask is not None:
            q, k, v, beta = (hidden(x, key_mask) for x in (q, k, v, beta))
            log_decay = None if log_decay is None else hidden(log_decay, key_mask)
        cut = Cut.of(q.shape[1], CHUNK, cu_seqlens)
        repeats = q.shape[2] // k.shape[2]
        k, v = (x if repeats == 1 else x.repeat_interleave(repeats, 2) for x in (k, v))
        q, k, v, beta = (cut.cut(x) for x in (q, k, v, beta))
        decay = None if log_decay is None else cut.cut(log_decay)
        output, kv = _chunks(cut, q, k, v, beta, decay, state.kv.flatten(2, 3))
    output = output.to(dtype)
    if not return_state:
        return AttentionOutput(output, None)
    total = state.log_decay
    if log_decay is not None:
        new = total_decay(log_decay, cu_seqlens, wide)
        total = new if total is None else new + total
    return AttentionOutput(output, LinearState(kv.reshape(state.kv.shape), torch.zeros_like(state.z), total))


def hidden(x: Tensor, key_mask: Tensor) -> Tensor:
    """x [B, T, ...] with zeros at padding."""
    return x.masked_fill(~key_mask.reshape(*key_mask.shape, *[1] * (x.dim() - 2)), 0)


def _chunks(
    cut: Cut, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, n, C, K or V], beta and log_decay [B, H, n, C], state [B or N, H, K, V] -> output [B, T, H, V] and
    the last states.
    """
    scores, overlap, to_end, whole = q @ k.mT, beta[..., None] * (k @ k.mT), k, None
    starts, from_start = beta[..., None] * k, q
    if log_decay is None:
        scores = scores.tril()
    else:
        sums = running_sum(log_decay, -1, k.dtype)
        left = sums[..., :, None] - sums[..., None, :]
        later = torch.ones(cut.size, cut.size, dtype=torch.bool, device=q.device).triu(1)
        kept = left.masked_fill(later, -torch.inf).exp().to(k.dtype)  # exactly 0 of what comes later
        scores, overlap = scores * kept, overlap * kept
        since = sums.exp().to(k.dtype)[..., None]
        starts, from_start, whole = starts * since, q * since, since[..., -1:, :]
        to_end = k * (sums[..., -1:] - sums).exp().to(k.dtype)[..., None]
    wanted = torch.cat([beta[..., None] * v, starts], -1)
    # The diagonal counts as ones, and what is above it as zeros.
    solved = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    fresh, known = solved.split([v.shape[-1], k.shape[-1]], -1)
    written = []

    def step(i: int, state: Tensor) -> Tensor:
        u = fresh[:, :, i] - known[:, :, i] @ state
        written.append(u)
        kept = state if whole is None else state * whole[:, :, i]
        return kept + to_end[:, :, i].mT @ u

    before, last = cut.run(state, step)
    u = torch.stack(written, 2) if written else fresh
    return cut.join(from_start @ before + scores @ u), last


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: LinearState | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(x.dim() == 4 and x.is_floating_point(), name, "a floating [batch, tokens, heads, width]", x.shape)
    B, T, H, K = q.shape
    G = k.shape[2]
    expect(k.shape[:2] == (B, T) and k.shape[3] == K, "k", "[{}, {}, G, {}]", k.shape, B, T, K)
    expect(G > 0 and H % G == 0, "k", "a number of heads that divides {}", G, H)
    expect(v.shape[:3] == k.shape[:3], "v", "[{}, {}, {}, V]", v.shape, B, T, G)
    expect(beta.shape == (B, T, H), "beta", "[{}, {}, {}]", beta.shape, B, T, H)
    if log_decay is not None:
        check_decay(log_decay, (B, T, H))
    check_rows(B, T, key_mask, cu_seqlens)
    if initial_state is not None:
        rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        kv = initial_state.kv
        fits = kv.dim() == 5 and (*kv.shape[:2], kv.shape[2] * kv.shape[3], kv.shape[4]) == (rows, H, K, v.shape[3])
        expect(fits, "initial_state.kv", "[{}, {}, R, {} / R, {}]", kv.shape, rows, H, K, v.shape[3])


def check_decay(log_decay: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a log decay of another shape."""
    expect(log_decay.shape == shape, "log_decay", "{}", log_decay.shape, list(shape))


def check_rows(B: int, T: int, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Refuse a mask of another shape or dtype, and bounds that are none, of [B, T] tokens."""
    if key_mask is not None:
        ok = key_mask.dtype == torch.bool and key_mask.shape == (B, T)
        expect(ok, "key_mask", "bool [{}, {}]", f"{key_mask.dtype} {list(key_mask.shape)}", B, T)
    if cu_seqlens is not None:
        ok = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 2
        expect(ok, "cu_seqlens", "[N + 1], N >= 1", cu_seqlens.shape)
        expect(B == 1, "cu_seqlens", "a batch of 1", B)
