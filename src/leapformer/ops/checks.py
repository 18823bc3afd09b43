"""Checks of the arguments at the public doors: one ValueError line with what, expected and got.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, K key width, V value width, N packed
sequences. A message is put together only when a check fails: writing a size down would fix it while torch.compile traces,
and would cost more than the step of one token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leapformer.ops.state import LinearState
from leapformer.ops.visibility import Staircase, Visible

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class Call(NamedTuple):
    """What an implementation may refuse a call for: tensors, rank, hidden size of the LeaP modules in it, and state."""

    q: Tensor
    v: Tensor
    rank: int = 1
    hidden: int = 0
    state: LinearState | None = None


def expect(ok: bool, what: str, expected: str, got: object, *sizes: object) -> None:
    """Raise unless ``ok``; ``sizes`` fill the braces of ``expected``."""
    if not ok:
        shown = tuple(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{what}: expected {expected.format(*sizes)}, got {shown}")


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, q_factors: Tensor | None, k_factors: Tensor | None, visible: Visible,
    key_mask: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, log_decay: Tensor | None,
    initial_state: LinearState | None, eps: float, *, rank: int | None = None, update_state: bool = False,
) -> None:  # fmt: skip
    """Everything that ``linear_attention`` takes; what only the values could tell (they may be on a GPU) is trusted.

    ``rank``: of factors that are still to come.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(x.dim() == 4, name, "4 axes [batch, tokens, heads, width]", x.shape)
        expect(x.is_floating_point(), name, "a floating dtype", x.dtype)
        expect(x.dtype == q.dtype, name, "the dtype of q, {}", x.dtype, q.dtype)
        expect(x.device == q.device, name, "the device of q, {}", x.device, q.device)
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    expect(k.shape[0] == B and k.shape[3] == K, "k", "shape [{}, S, G, {}] to go with q", k.shape, B, K)
    expect(v.shape[:3] == k.shape[:3], "v", "shape [{}, {}, {}, V] to go with k", v.shape, B, S, G)
    expect(G > 0 and H % G == 0, "heads of q", "a multiple of the {} heads of k", H, G)
    expect(eps > 0, "eps", "a number above 0", eps)
    _check_factors(q, k, q_factors, k_factors)
    if key_mask is not None:
        expect(key_mask.dtype == torch.bool, "key_mask", "dtype torch.bool (True = real)", key_mask.dtype)
        expect(key_mask.shape == k.shape[:2], "key_mask", "shape [{}, {}]", key_mask.shape, B, S)
    N = _check_packing(B, T, S, cu_seqlens, cu_seqlens_k)
    _check_visible(visible, B, T, S, N)
    if log_decay is not None:
        expect(isinstance(visible, str) and visible == "causal", "visible with log_decay", "'causal'", visible)
        expect(log_decay.shape == q.shape[:3], "log_decay", "shape [{}, {}, {}]", log_decay.shape, B, T, H)
        expect(log_decay.is_floating_point(), "log_decay", "a floating dtype", log_decay.dtype)
    if initial_state is not None:
        R = rank or (1 if q_factors is None else q_factors.shape[-1])
        V, heads = v.shape[3], G if log_decay is None else H
        kv, z = initial_state.kv.shape, initial_state.z.shape
        fits = tuple(kv) == (N, heads, R, K, V)
        expect(fits, "initial_state.kv", "shape [{}, {}, {}, {}, {}]", kv, N, heads, R, K, V)
        expect(tuple(z) == (N, heads, R, K), "initial_state.z", "shape [{}, {}, {}, {}]", z, N, heads, R, K)
    if update_state:
        expect(initial_state is not None, "update_state", "an initial_state to update", None)
        has_grad = torch.is_grad_enabled()
        expect(not has_grad, "update_state", "gradients switched off (torch.no_grad), which need the old state", "on")


def check_leap(name: str, x: Tensor, weights: tuple[Tensor | None, Tensor | None, Tensor, Tensor]) -> None:
    """The weights of one LeaP module against the q or k [B, T, H, K] that they read."""
    expect(x.dim() == 4, name[0], "4 axes [batch, tokens, heads, width]", x.shape)
    heads, K = (1, x.shape[2]), x.shape[3]
    w1, b1, w2, b2 = weights
    if w1 is not None:
        fits = w1.dim() == 3 and w1.shape[0] in heads and w1.shape[2] == K
        expect(fits, f"{name}.w1", "shape [1 or {}, r, {}]", w1.shape, heads[1], K)
    r = K if w1 is None else w1.shape[1]
    expect(b1 is None or w1 is not None, f"{name}.b1", "None without w1", "a tensor")
    if b1 is not None:
        fits = b1.dim() == 2 and b1.shape[0] in heads and b1.shape[1] == r
        expect(fits, f"{name}.b1", "shape [1 or {}, {}]", b1.shape, heads[1], r)
    fits = w2.dim() == 2 and w2.shape[0] in heads and w2.shape[1] == r
    expect(fits, f"{name}.w2", "shape [1 or {}, {}]", w2.shape, heads[1], r)
    expect(b2.dim() == 1 and b2.shape[0] in heads, f"{name}.b2", "shape [1 or {}]", b2.shape, heads[1])


def _check_factors(q: Tensor, k: Tensor, q_factors: Tensor | None, k_factors: Tensor | None) -> None:
    if q_factors is None and k_factors is None:
        return
    if q_factors is None or k_factors is None:
        raise ValueError("q_factors and k_factors: expected both or neither, got only one")
    for name, x, of in (("q_factors", q_factors, q), ("k_factors", k_factors, k)):
        B, T, H, _ = of.shape
        fits = x.dim() == 4 and x.shape[:2] == of.shape[:2] and x.shape[2] in (1, H)
        expect(fits, name, "shape [{}, {}, {} or 1, R]", x.shape, B, T, H)
        expect(x.is_floating_point(), name, "a floating dtype", x.dtype)
    expect(q_factors.shape[3] == k_factors.shape[3], "rank of k_factors", "{}", k_factors.shape[3], q_factors.shape[3])


def _check_visible(visible: Visible, B: int, T: int, S: int, N: int) -> None:
    forms = "'all', 'causal', a Staircase or integers [B, T]"
    if isinstance(visible, str):
        expect(visible in ("all", "causal"), "visible", forms, repr(visible))
        expect(visible == "all" or T == S, "visible='causal'", "as many keys as queries ({})", S, T)
    elif isinstance(visible, Staircase):
        for name, field in zip(Staircase._fields, visible, strict=True):
            if isinstance(field, Tensor):
                expect(field.dtype in INTEGERS, f"visible.{name}", "an integer dtype", field.dtype)
                fits = field.dim() <= 1 and field.numel() in (1, N)
                expect(fits, f"visible.{name}", "shape [{}]", field.shape, N)
        expect(isinstance(visible.every, Tensor) or visible.every > 0, "visible.every", "at least 1", visible.every)
    elif isinstance(visible, Tensor):
        fits = visible.dim() == 2 and visible.shape[0] in (1, B) and visible.shape[1] == T
        expect(fits, "visible", "shape [{}, {}]", visible.shape, B, T)
        expect(visible.dtype in INTEGERS, "visible", "an integer dtype", visible.dtype)
    else:
        raise ValueError(f"visible: expected {forms}, got {type(visible).__name__}")


def _check_packing(B: int, T: int, S: int, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> int:
    """The number of states: N packed sequences, else the batch."""
    if cu_seqlens is None:
        expect(cu_seqlens_k is None, "cu_seqlens_k", "None without cu_seqlens", "a tensor")
        return B
    expect(B == 1, "batch with cu_seqlens", "1", B)
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds is not None:
            expect(bounds.dim() == 1 and bounds.numel() >= 2, name, "shape [N + 1], N >= 1", bounds.shape)
            integer = bounds.dtype in (torch.int32, torch.int64)
            expect(integer, name, "dtype torch.int32 or torch.int64", bounds.dtype)
    if cu_seqlens_k is None:
        expect(T == S, "keys with cu_seqlens but no cu_seqlens_k", "as many as queries ({})", S, T)
    else:
        same = cu_seqlens_k.shape == cu_seqlens.shape
        expect(same, "cu_seqlens_k", "shape [{}]", cu_seqlens_k.shape, cu_seqlens.shape[0])
    return cu_seqlens.shape[0] - 1
