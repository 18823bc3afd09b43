"""Linear attention with a decay per key channel: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T.

Source: arXiv 2312.06635, sec. 4.

Letters: B batch, T tokens, H query heads, G key/value heads, K key width, V value width, N packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapformer.ops.api import AttentionOutput
from leapformer.ops.autocast import without_autocast
from leapformer.ops.checks import expect
from leapformer.ops.cuts import Cut, check_rows, check_state, first_state, hidden
from leapformer.ops.fading import CHANNEL_CHUNK, Faded
from leapformer.ops.state import LinearState


def channel_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
) -> AttentionOutput:
    """Causal linear attention whose state fades by channels of the keys.

    Args:
        q: features [B, T, H, K], k: [B, T, G, K], v: [B, T, G, V]; q and k not negative where ``normalize`` is used.
        log_decay: [B, T, H, K] <= 0; row c of the state is multiplied by the exponential of channel c before key t is
            added. A step counts as no less than -40.
        key_mask, cu_seqlens, return_state, normalize, eps: as in ``linear_attention``; padding doesn't decay.
        initial_state: kv [B or N, H, R, K / R, V] and z with any R, as ``linear_attention`` has it for keys of rank R,
            which here lie behind one another.

    Returns:
        ``AttentionOutput(output [B, T, H, V] in the dtype of v, state)``, the state with the R of ``initial_state``, or
        1, and its log decay, which is one of heads, as it was. Time and memory are linear in T; autograd differentiates
        it.

    Raises:
        ValueError: shapes that don't fit.

    Source: arXiv 2312.06635, eq. 3 and sec. 4.
    """
    _check(q, k, v, log_decay, key_mask, cu_seqlens, initial_state)
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with without_autocast(q.device.type):
        state = first_state(q, v, cu_seqlens, wide) if initial_state is None else initial_state
        q, k, v = (x.to(wide) for x in (q, k, v))
        if key_mask is not None:
            q, k, v, log_decay = (hidden(x, key_mask) for x in (q, k, v, log_decay))
        repeats = q.shape[2] // k.shape[2]
        k, v = (x if repeats == 1 else x.repeat_interleave(repeats, 2) for x in (k, v))
        cut = Cut.of(q.shape[1], CHANNEL_CHUNK, cu_seqlens)
        x, v = Faded.by_channel(*(cut.cut(part) for part in (q, k, log_decay))), cut.cut(v)
        before, kv = cut.run(state.kv.flatten(2, 3), (x.left, x.to_end.mT @ v), _fade_and_add)
        output = cut.join(x.q @ before + x.seen @ v)
        sums = x.to_end.sum(-2)[..., None]  # what values of 1 would add
        before, z = cut.run(state.z.flatten(2, 3)[..., None], (x.left, sums), _fade_and_add)
        if normalize:
            total = cut.join(x.q @ before + x.seen.sum(-1, keepdim=True))
            output = output / total.clamp(min=eps)
        output = output.to(dtype)
    if not return_state:
        return AttentionOutput(output, None)
    return AttentionOutput(output, LinearState(kv.reshape(state.kv.shape), z.reshape(state.z.shape), state.log_decay))


def _fade_and_add(state: Tensor, left: Tensor, new: Tensor) -> Tensor:
    return state * left + new


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: LinearState | None,
) -> None:
    check_rows(q, k, v, key_mask, cu_seqlens)
    expect(log_decay.shape == q.shape, "log_decay", "{}", log_decay.shape, list(q.shape))
    check_state(q, v, cu_seqlens, initial_state)
