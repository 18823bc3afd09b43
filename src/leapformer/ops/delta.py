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
from leapformer.ops.cuts import Cut, check_rows, check_state, first_state, hidden
from leapformer.ops.decay import total_decay
from leapformer.ops.fading import CHANNEL_CHUNK, CHUNK, Faded
from leapformer.ops.state import LinearState


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
        log_decay: [B, T, H] or, by channels of the keys, [B, T, H, K] <= 0; the state is multiplied by its exponential
            before token t. By channels a step counts as no less than -40.
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

    Source: arXiv 2406.06484, sec. 3; arXiv 2412.06464, eq. 10; by channels arXiv 2510.26692, eq. 1.
    """
    _check(q, k, v, beta, log_decay, key_mask, cu_seqlens, initial_state)
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with without_autocast(q.device.type):
        state = first_state(q, v, cu_seqlens, wide) if initial_state is None else initial_state
        q, k, v, beta = (x.to(wide) for x in (q, k, v, beta))
        if key_mask is not None:
            q, k, v, beta = (hidden(x, key_mask) for x in (q, k, v, beta))
            log_decay = None if log_decay is None else hidden(log_decay, key_mask)
        by_channel = log_decay is not None and log_decay.dim() == 4
        cut = Cut.of(q.shape[1], CHANNEL_CHUNK if by_channel else CHUNK, cu_seqlens)
        repeats = q.shape[2] // k.shape[2]
        k, v = (x if repeats == 1 else x.repeat_interleave(repeats, 2) for x in (k, v))
        q, k, v, beta = (cut.cut(x) for x in (q, k, v, beta))
        decay = None if log_decay is None else cut.cut(log_decay)
        output, kv = _chunks(cut, q, k, v, beta, decay, state.kv.flatten(2, 3))
    output = output.to(dtype)
    if not return_state:
        return AttentionOutput(output, None)
    total = state.log_decay
    if log_decay is not None and not by_channel:
        new = total_decay(log_decay, cu_seqlens, wide)
        total = new if total is None else new + total
    return AttentionOutput(output, LinearState(kv.reshape(state.kv.shape), torch.zeros_like(state.z), total))


def _chunks(
    cut: Cut, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, n, C, K or V], beta [B, H, n, C], log_decay [B, H, n, C] or with K, state [B or N, H, K, V] ->
    output [B, T, H, V] and the last states.
    """
    x, beta = Faded.of(q, k, log_decay), beta[..., None]
    wanted = torch.cat([beta * v, beta * x.k], -1)
    # The diagonal counts as ones, and what is above it as zeros.
    solved = torch.linalg.solve_triangular(beta * x.held, wanted, upper=False, unitriangular=True)
    fresh, known = solved.split([v.shape[-1], k.shape[-1]], -1)
    written = []

    def step(state: Tensor, fresh: Tensor, known: Tensor, to_end: Tensor, left: Tensor) -> Tensor:
        u = fresh - known @ state
        written.append(u)
        return state * left + to_end.mT @ u

    before, last = cut.run(state, (fresh, known, x.to_end, x.left), step)
    u = torch.stack(written, 2) if written else fresh
    return cut.join(x.q @ before + x.seen @ u), last


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
    check_rows(q, k, v, key_mask, cu_seqlens)
    B, T, H, K = q.shape
    expect(beta.shape == (B, T, H), "beta", "[{}, {}, {}]", beta.shape, B, T, H)
    if log_decay is not None:
        fits = log_decay.shape in ((B, T, H), (B, T, H, K))
        expect(fits, "log_decay", "[{}, {}, {}] or [{}, {}, {}, {}]", log_decay.shape, B, T, H, B, T, H, K)
    check_state(q, v, cu_seqlens, initial_state)
