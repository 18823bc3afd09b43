"""Checks of the arguments at the public doors: one ValueError line with what, expected and got.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, K key width, V value width, N packed
sequences. A message is put together only when a check fails: writing a size down would fix it while torch.compile
traces, and would cost more than the step of one token.
"""

from __future__ import annotations

import numbers
from itertools import pairwise
from operator import attrgetter

import torch
from torch import Tensor

from leapformer.ops.arguments import FIELDS, MODULES, TENSORS, Arguments, LeapWeights
from leapformer.ops.state import LinearState
from leapformer.ops.visibility import Staircase, Visible

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDINARY = frozenset((Tensor, torch.nn.Parameter))  # types whose bytes are where and what they seem

_place = attrgetter("device", "layout")
# How the tensors of ``Arguments`` are called at the doors, and two that are not among them.
_NAMES = (
    *(
        f"initial_state.{name}" if name in ("kv", "z") else name.replace("_", "_leap.") if name in MODULES else name
        for name in FIELDS[:TENSORS]
    ),
    "initial_state.log_decay",
    "visible",
)


def expect(ok: bool, what: str, expected: str, got: object, *sizes: object) -> None:
    """Raise unless ``ok``; ``sizes`` fill the braces of ``expected``."""
    if not ok:
        shown = tuple(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{what}: expected {expected.format(*sizes)}, got {shown}")


def state_tensors(state: LinearState | None) -> tuple[Tensor | None, Tensor | None]:
    """kv and z of a state that may be missing."""
    if state is None:
        return None, None
    if not isinstance(state, LinearState):
        expect(False, "initial_state", "a LinearState", type(state).__name__)
    return state.kv, state.z


def module_weights(name: str, weights: LeapWeights) -> LeapWeights:
    """The weights of a LeaP module, if they are that: without w2 and b2 it is none."""
    if not (isinstance(weights, tuple) and len(weights) == 4):
        expect(False, name, "LeapWeights(w1, b1, w2, b2)", type(weights).__name__)
    if weights[2] is None or weights[3] is None:
        expect(False, name, "w2 and b2", "None")
    return weights


def check_arguments(
    x: Arguments, visible: Visible, initial_state: LinearState | None, update_state: bool = False
) -> None:
    """Everything that the doors take; what only the values could tell (they may be on a GPU) is trusted.

    x: as it was given: ``counts`` and, where ``visible`` is no word, ``causal`` are yet to be made of ``visible``.
    """
    q, k, v = x[:3]
    decay = None if initial_state is None else initial_state.log_decay
    check_tensors(_NAMES, (*x[:TENSORS], decay, visible if isinstance(visible, Tensor) else None), q, 3)
    _check_main(q, k, v)
    if x.q_w2 is not None:
        _check_module("q_leap", q, x.q_w1, x.q_b1, x.q_w2, x.q_b2)
        _check_module("k_leap", k, x.k_w1, x.k_b1, x.k_w2, x.k_b2)
    B, T, H, _ = q.shape
    S = k.shape[1]
    if not (type(x.eps) is float or isinstance(x.eps, numbers.Real | torch.SymFloat)) or not x.eps > 0:
        expect(False, "eps", "a number above 0", x.eps)
    for name, option in (("normalize", x.normalize), ("relu", x.relu)):
        if not isinstance(option, bool):
            expect(False, name, "True or False", option)
    if x.q_factors is not None or x.k_factors is not None:
        _check_pair("factors", q, k, x.q_factors, x.k_factors)
    if x.q_angles is not None or x.k_angles is not None:
        expect(x.q_factors is None, "q_factors with q_angles", "None", "a tensor")
        _check_pair("angles", q, k, x.q_angles, x.k_angles)
    if x.key_mask is not None:
        expect(x.key_mask.dtype == torch.bool, "key_mask", "dtype torch.bool (True = real)", x.key_mask.dtype)
        expect(x.key_mask.shape == k.shape[:2], "key_mask", "shape [{}, {}]", x.key_mask.shape, B, S)
    if x.cu_seqlens is not None or x.cu_seqlens_k is not None:
        _check_packing(B, T, S, x.cu_seqlens, x.cu_seqlens_k)
    _check_visible(visible, x)
    if x.log_decay is not None:
        if not x.causal:
            _check_two_sided(visible, T, S)
        expect(x.log_decay.shape == q.shape[:3], "log_decay", "shape [{}, {}, {}]", x.log_decay.shape, B, T, H)
        expect(x.log_decay.dtype in FLOATING, "log_decay", "a floating dtype", x.log_decay.dtype)
    if initial_state is not None:
        _check_state(x, initial_state)
    if update_state:
        expect(initial_state is not None, "update_state", "an initial_state to update", None)
        if torch.is_grad_enabled():
            wanted = "gradients switched off (torch.no_grad), which need the old state"
            expect(False, "update_state", wanted, "on")
        # What a compiler or a transform puts in a tensor's place has no address.
        if initial_state is not None and type(initial_state.kv) in ORDINARY and not torch.compiler.is_compiling():
            _check_written(initial_state)


def check_tensors(names: tuple[str, ...], tensors: tuple[object, ...], q: Tensor, needed: int = 0) -> None:
    """All are tensors or None (the first ``needed`` are tensors), dense, and on the device of ``q``.

    Kernels read addresses: what lies elsewhere, or is laid out otherwise, must not reach them.
    """
    given = [t for t in tensors if t is not None]
    if not torch.compiler.is_compiling() and ORDINARY.issuperset(map(type, given)) and len(given) >= needed:
        places = set(map(_place, given))
        if len(places) == 1 and places.pop()[1] is torch.strided:
            return
    for place, (name, t) in enumerate(zip(names, tensors, strict=True)):
        if t is not None or place < needed:
            expect(isinstance(t, Tensor), name, "a tensor", type(t).__name__)
            assert isinstance(t, Tensor)
            expect(t.layout is torch.strided, name, "a dense tensor (torch.strided)", t.layout)
            expect(t.device == q.device, name, "the device of q, {}", t.device, q.device)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _check_module(name: str, x: Tensor, *weights: Tensor | None) -> None:
    """The weights w1, b1, w2 and b2 of a LeaP module against the q or k [B, T, H, K] that it reads."""
    w1, b1, w2, b2 = weights
    assert w2 is not None and b2 is not None
    (_, _, H, K), last = x.shape, w2.shape
    r = K
    if w1 is not None:
        shape = w1.shape
        if not (len(shape) == 3 and shape[0] in (1, H) and shape[2] == K):
            expect(False, f"{name}.w1", "shape [1 or {}, r, {}]", shape, H, K)
        r = shape[1]
    if b1 is not None:
        if w1 is None:
            expect(False, f"{name}.b1", "None without w1", "a tensor")
        shape = b1.shape
        if not (len(shape) == 2 and shape[0] in (1, H) and shape[1] == r):
            expect(False, f"{name}.b1", "shape [1 or {}, {}]", shape, H, r)
    if not (len(last) == 2 and last[0] in (1, H) and last[1] == r):
        expect(False, f"{name}.w2", "shape [1 or {}, {}]", last, H, r)
    shape = b2.shape
    if not (len(shape) == 1 and shape[0] in (1, H)):
        expect(False, f"{name}.b2", "shape [1 or {}]", shape, H)
    for w in weights:
        if w is not None and w.dtype not in FLOATING:
            expect(False, f"weights of {name}", "a floating dtype", w.dtype)


def _check_main(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, T, H, K], k [B, S, G, K] and v [B, S, G, V]."""
    dtype = q.dtype
    if not (q.dim() == k.dim() == v.dim() == 4 and dtype in FLOATING and k.dtype == dtype and v.dtype == dtype):
        for name, x in (("q", q), ("k", k), ("v", v)):
            expect(x.dim() == 4, name, "4 axes [batch, tokens, heads, width]", x.shape)
            expect(x.dtype in FLOATING, name, "a floating dtype", x.dtype)
            expect(x.dtype == dtype, name, "the dtype of q, {}", x.dtype, dtype)
    (B, _, H, K), keys, values = q.shape, k.shape, v.shape
    G = keys[2]
    if not (keys[0] == B and keys[3] == K):
        expect(False, "k", "shape [{}, S, G, {}] to go with q", keys, B, K)
    if values[:3] != keys[:3]:
        expect(False, "v", "shape [{}, {}, {}, V] to go with k", values, *keys[:3])
    if not (G > 0 and H % G == 0):
        expect(False, "heads of q", "a multiple of the {} heads of k", H, G)


def _check_state(x: Arguments, state: LinearState) -> None:
    """kv [N, heads, R, K, V], z [N, heads, R, K] and log_decay [N, H] or None."""
    kv, z, decay = state
    if kv is None or z is None:
        expect(False, "initial_state", "kv and z", "None")
    N, R, K, V, H = x.sequences, x.rank, x.q.shape[3], x.v.shape[3], x.q.shape[2]
    heads = x.k.shape[2] if x.log_decay is None else H
    if kv.shape != (N, heads, R, K, V):
        expect(False, "initial_state.kv", "shape [{}, {}, {}, {}, {}]", kv.shape, N, heads, R, K, V)
    if z.shape != (N, heads, R, K):
        expect(False, "initial_state.z", "shape [{}, {}, {}, {}]", z.shape, N, heads, R, K)
    if not (kv.dtype in FLOATING and z.dtype in FLOATING):
        expect(False, "initial_state", "floating dtypes", f"{kv.dtype} and {z.dtype}")
    if decay is not None:
        fits = decay.shape == (N, H) and decay.dtype in FLOATING
        expect(
            fits, "initial_state.log_decay", "floating numbers [{}, {}]", f"{decay.dtype} {tuple(decay.shape)}", N, H
        )


def _check_written(state: LinearState) -> None:
    """A state that is written to: no element of its tensors may be another's too."""
    kv, z, decay = state
    if kv.is_contiguous() and z.is_contiguous() and (decay is None or decay.is_contiguous()):
        begin, end = kv.data_ptr(), kv.data_ptr() + kv.nbytes
        other, last = z.data_ptr(), z.data_ptr() + z.nbytes
        if end <= other or last <= begin:
            if decay is None:
                return
            own, after = decay.data_ptr(), decay.data_ptr() + decay.nbytes
            if (own >= end or after <= begin) and (own >= last or after <= other):
                return
    fields = [t for t in state if t is not None and t.numel()]
    alone = all(t.is_contiguous() or _holds_apart(t) for t in fields)
    expect(alone, "update_state", "a state whose elements have memory of their own", "an expanded or overlapping one")
    apart = all(_apart(a, b) for i, a in enumerate(fields) for b in fields[:i])
    expect(apart, "update_state", "a state whose tensors do not share memory", "tensors that do")


def _holds_apart(t: Tensor) -> bool:
    """Whether no two elements share an address: either each stride reaches over all smaller ones, or by looking at
    all."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride <= reach:
            found = _addresses(t)
            return found.unique().numel() == found.numel()
        reach += stride * (size - 1)
    return True


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share no element: by where they begin and end, or by looking at all."""
    if a.device.type == "meta":
        return True
    spans = [(t.data_ptr(), t.data_ptr() + _bytes_reached(t)) for t in (a, b)]
    if spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]:
        return True
    return not torch.isin(_addresses(a), _addresses(b)).any()


def _bytes_reached(t: Tensor) -> int:
    """From the first element to the end of the last; none of the axes is empty."""
    return (1 + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))) * t.element_size()


def _addresses(t: Tensor) -> Tensor:
    """Of every element, int64 on the CPU; elements of different sizes are taken to lie on a common grid."""
    found = torch.tensor(t.data_ptr())
    for stride, size in zip(t.stride(), t.shape, strict=True):
        found = found[..., None] + torch.arange(size) * (stride * t.element_size())
    return found.flatten()


def _check_pair(what: str, q: Tensor, k: Tensor, of_q: Tensor | None, of_k: Tensor | None) -> None:
    """Factors of queries and of keys, or their angles: as many for each."""
    if of_q is None or of_k is None:
        raise ValueError(f"q_{what} and k_{what}: expected both or neither, got only one")
    last, rank = ("R", "rank") if what == "factors" else ("m", "number")
    for name, x, of in ((f"q_{what}", of_q, q), (f"k_{what}", of_k, k)):
        B, T, H, _ = of.shape
        fits = x.dim() == 4 and x.shape[:2] == of.shape[:2] and x.shape[2] in (1, H)
        expect(fits, name, "shape [{}, {}, {} or 1, " + last + "]", x.shape, B, T, H)
        expect(x.dtype in FLOATING, name, "a floating dtype", x.dtype)
    expect(of_q.shape[3] == of_k.shape[3], f"{rank} of k_{what}", "{}", of_k.shape[3], of_q.shape[3])


def _check_two_sided(visible: Visible, T: int, S: int) -> None:
    """What may be seen with a decay that is not causal: all, or blocks of a number of tokens and all before them."""
    expected = "'all', 'causal' or blocks (offset = every - phase, step = every, integers)"
    if isinstance(visible, Staircase):
        offset, step, every, phase = visible
        fits = not any(isinstance(field, Tensor) for field in visible)
        fits = fits and bool(step == every and offset == every - phase)
        expect(fits, "visible with log_decay", expected, visible)
    else:
        expect(isinstance(visible, str), "visible with log_decay", expected, type(visible).__name__)
    expect(T == S, "keys with log_decay", "as many as queries ({})", S, T)


def _check_visible(visible: Visible, x: Arguments) -> None:
    B, T, S, device = *x.q.shape[:2], x.k.shape[1], x.q.device
    forms = "'all', 'causal', a Staircase or integers [B, T]"
    if isinstance(visible, str):
        if visible == "causal":
            if T != S:
                expect(False, "visible='causal'", "as many keys as queries ({})", S, T)
        else:
            expect(visible == "all", "visible", forms, repr(visible))
    elif isinstance(visible, Staircase):
        for name, field in zip(Staircase._fields, visible, strict=True):
            if isinstance(field, Tensor):
                expect(field.dtype in INTEGERS, f"visible.{name}", "an integer dtype", field.dtype)
                N = x.sequences
                fits = field.dim() <= 1 and field.numel() in (1, N)
                expect(fits, f"visible.{name}", "shape [{}]", field.shape, N)
                near = field.device == device or field.device.type == "cpu"
                expect(near, f"visible.{name}", "a tensor on {} or the CPU", field.device, device)
            else:
                expect(isinstance(field, int | torch.SymInt), f"visible.{name}", "an integer", field)
        every = visible.every
        if isinstance(every, Tensor):
            # Elsewhere than on the CPU a look would make the device wait.
            known = every.device.type == "cpu" and not torch.compiler.is_compiling()
            expect(not known or bool((every > 0).all()), "visible.every", "at least 1", "less")
        else:
            expect(every > 0, "visible.every", "at least 1", every)
    elif isinstance(visible, Tensor):
        fits = visible.dim() == 2 and visible.shape[0] in (1, B) and visible.shape[1] == T
        expect(fits, "visible", "shape [{}, {}]", visible.shape, B, T)
        expect(visible.dtype in INTEGERS, "visible", "an integer dtype", visible.dtype)
    else:
        raise ValueError(f"visible: expected {forms}, got {type(visible).__name__}")


def _check_packing(B: int, T: int, S: int, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    if cu_seqlens is None:
        raise ValueError("cu_seqlens_k: expected None without cu_seqlens, got a tensor")
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


def boundaries(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, tokens: int, slots: int, *, same: bool
) -> tuple[list[int], list[int]]:
    """The boundaries of queries and of keys, where every implementation reads them: they rise from 0 to the length.

    same: a decay needs each sequence to have as many keys as queries.
    """
    found = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for name, bounds, total in zip(("cu_seqlens", "cu_seqlens_k"), found, (tokens, slots), strict=True):
        rises = bounds[0] == 0 and bounds[-1] == total and all(a <= b for a, b in pairwise(bounds))
        expect(rises, name, "boundaries that rise from 0 to {}", bounds[:10], total)
    if same:
        expect(found[0] == found[1], "cu_seqlens_k with log_decay", "the boundaries of cu_seqlens", "others")
    return found
