"""The explicit formula, one (query, key) weight at a time, in float64: what every implementation is measured against.

Letters: B samples (or packed sequences), T queries, S keys, H query heads, G key/value heads, R rank, K and V widths.
Nothing here is shared with the package: visibilities are lists of Python integers, masked keys are dropped from
the tensors, and the decay between a key and a query, whichever is the later one, is summed over its time steps.

The native implementation has no float64: `attend` hands it float32 copies, and it is held to the error that the torch
implementation makes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops import LinearState, Staircase, linear_attention
from leapformer.ops.api import _IMPLEMENTATIONS

# No comparison asks for less than this; the `impl` fixture raises it to what float32 allows for "native".
nearest = 0.0
FLOAT32 = 2e-5

LEAVES = ("q", "k", "v", "q_factors", "k_factors", "q_angles", "k_angles", "log_decay", "kv", "z", "state_decay")


def stairs(offset: int, step: int, every: int, phase: int, queries: int, keys: int) -> list[int]:
    """g(i) = clip(offset + step * ((i + phase) // every), 0, S), for i = 0 .. T - 1."""
    return [max(0, min(keys, offset + step * ((i + phase) // every))) for i in range(queries)]


def one_head(q, k, v, a, c, counts, keep, decay, kv, z, normalize, eps):
    """One head of one sample. q [T, K], k [S, K], v [S, V], a [T, R], c [S, R], kv [R, K, V], z [R, K]."""
    steps, slots = q.shape[0], torch.tensor(keep, dtype=torch.long)
    k, v, c = k[slots], v[slots], c[slots]
    sigma = (a[:, None, :] * c[None, :, :]).sum(-1)
    weight = (q[:, None, :] * k[None, :, :]).sum(-1) * sigma
    seen = torch.tensor([[slot < g for slot in keep] for g in counts], dtype=torch.bool).reshape(steps, len(keep))
    to_query, to_end = torch.zeros(steps, dtype=q.dtype), torch.zeros((), dtype=q.dtype)
    after_key = torch.zeros(len(keep), dtype=q.dtype)
    if decay is not None:
        t, i, j = torch.arange(steps), torch.arange(steps)[:, None], slots[:, None]
        none = torch.zeros((), dtype=q.dtype)  # a step that does not lie between: -inf is not to be multiplied by 0
        since_key = torch.where(j < t, decay, none).cumsum(1).T  # over j < t <= i
        until_key = F.pad(torch.where(i <= t, decay, none).cumsum(1), (1, 0))[:, slots]  # over i <= t < j
        weight = weight * torch.where(slots <= i, since_key, until_key).exp()
        to_query, to_end = decay.cumsum(0), decay.sum()
        after_key = torch.where(j < t, decay, none).sum(1)
    weight = torch.where(seen, weight, torch.zeros_like(weight))
    query_features = a[:, :, None] * q[:, None, :]
    past = to_query.exp()
    numerator = weight @ v + past[:, None] * (query_features[..., None] * kv).sum((1, 2))
    normaliser = weight.sum(-1) + past * (query_features * z).sum((1, 2))
    key_features = c[:, :, None] * k[:, None, :] * after_key.exp()[:, None, None]
    kv = to_end.exp() * kv + (key_features[..., None] * v[:, None, None, :]).sum(0)
    z = to_end.exp() * z + key_features.sum(0)
    output = numerator / normaliser.clamp(min=eps)[:, None] if normalize else numerator
    return output, kv, z, to_end


def explicit(
    q, k, v, q_factors=None, k_factors=None, *, counts, spans, key_mask=None, q_angles=None, k_angles=None,
    log_decay=None, kv=None, z=None, state_decay=None, normalize=True, eps=1e-6, relu=False,
):  # fmt: skip
    """Outputs [B, T, H, V] and states [N, G or H, R, K, V], [N, G or H, R, K], total decay [N, H] or None.

    counts: N lists of g(i), relative to the sequence. spans: N triples (row, query slice, key slice).
    """
    if relu:
        q, k = q.clamp(min=0), k.clamp(min=0)
    if q_angles is not None:  # cos(a - c) = cos a cos c + sin a sin c
        if key_mask is not None:
            k_angles = torch.where(key_mask[:, :, None, None], k_angles, 0)
        q_factors, k_factors = (torch.cat([t.cos(), t.sin()], -1) for t in (q_angles, k_angles))
    heads, groups = q.shape[2], k.shape[2]
    rank = 1 if q_factors is None else q_factors.shape[-1]
    a = torch.ones(*q.shape[:3], 1, dtype=q.dtype) if q_factors is None else q_factors.expand(*q.shape[:3], rank)
    c = torch.ones(*k.shape[:3], 1, dtype=q.dtype) if k_factors is None else k_factors.expand(*k.shape[:3], rank)
    state_heads = groups if log_decay is None else heads
    if kv is None:
        kv = torch.zeros(len(spans), state_heads, rank, k.shape[-1], v.shape[-1], dtype=q.dtype)
        z = torch.zeros(len(spans), state_heads, rank, k.shape[-1], dtype=q.dtype)
    outputs, kvs, zs, decays = [], [], [], []
    for n, (row, queries, keys) in enumerate(spans):
        length = keys.stop - keys.start
        keep = [j for j in range(length) if key_mask is None or bool(key_mask[row, keys.start + j])]
        results = []
        for h in range(heads):
            g = h // (heads // groups)
            s = h if log_decay is not None else g
            results.append(
                one_head(
                    q[row, queries, h],
                    k[row, keys, g],
                    v[row, keys, g],
                    a[row, queries, h],
                    c[row, keys, g],
                    counts[n],
                    keep,
                    None if log_decay is None else log_decay[row, queries, h],
                    kv[n, s],
                    z[n, s],
                    normalize,
                    eps,
                )  # fmt: skip
            )
        outputs.append(torch.stack([r[0] for r in results], 1))
        stride = 1 if log_decay is not None else heads // groups
        kvs.append(torch.stack([r[1] for r in results[::stride]]))
        zs.append(torch.stack([r[2] for r in results[::stride]]))
        decays.append(torch.stack([r[3] for r in results]))
    packed = len(spans) != q.shape[0] or any(row != n for n, (row, _, _) in enumerate(spans))
    output = torch.cat(outputs)[None] if packed else torch.stack(outputs)
    total = None
    if log_decay is not None:
        total = torch.stack(decays) if state_decay is None else torch.stack(decays) + state_decay
    return output, torch.stack(kvs), torch.stack(zs), total


VISIBLE: dict[str, Any] = {
    "blocks": (3, 3, 3, 0),
    "wait-k": (4, 2, 1, 0),
    "late": (-2, 2, 3, 1),
    "negative phase": (2, 1, 2, -3),
    "nothing": (0, 0, 1, 0),
}
VISIBILITIES = ("all", "causal", *VISIBLE, "per sample", "tensor")


def visibility(name: str | tuple[int, int, int, int], spans, generator):
    """The argument for the package, and the counts of every sequence for the formula; also from the integers of a
    staircase."""
    lengths = [(queries.stop - queries.start, keys.stop - keys.start) for _, queries, keys in spans]
    if name == "all":
        return "all", [[s] * t for t, s in lengths]
    if name == "causal":
        return "causal", [[min(i + 1, s) for i in range(t)] for t, s in lengths]
    if name == "per sample":
        fields = torch.stack([torch.randint(low, high, (len(spans),), generator=generator)
                              for low, high in ((-2, 4), (0, 3), (1, 4), (0, 3))])  # fmt: skip
        counts = [stairs(*map(int, fields[:, n]), t, s) for n, (t, s) in enumerate(lengths)]
        return Staircase(*fields), counts
    if name == "tensor":
        raw = [torch.randint(-2, s + 3, (t,), generator=generator).sort().values for t, s in lengths]
        counts = [[max(0, min(s, int(g))) for g in r] for r, (_, s) in zip(raw, lengths, strict=True)]
        packed = len(spans) > 1 and spans[1][0] == 0
        return (torch.cat(raw)[None] if packed else torch.stack(raw)), counts
    offset, step, every, phase = VISIBLE[name] if isinstance(name, str) else name
    return Staircase(offset, step, every, phase), [stairs(offset, step, every, phase, t, s) for t, s in lengths]


@dataclass
class Case:
    """Inputs for the package (`keywords`, `visible`) and for the formula (`counts`, `spans`), with the same leaves."""

    leaves: dict[str, Tensor | None]
    visible: Any
    counts: list[list[int]]
    spans: list[tuple[int, slice, slice]]
    key_mask: Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    cu: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        leaves = {name: None if t is None else t.detach().to(dtype) for name, t in self.leaves.items()}
        return Case(leaves, self.visible, self.counts, self.spans, self.key_mask, self.keywords, self.cu)

    def away_from_zero(self) -> Case:
        """Positive features and factors from 1/4 on, and angles so near to each other that cosines are from 1/2 on: a
        normaliser near 0 makes errors of any size, whoever divides by it.
        """
        names = ("q", "k", "q_factors", "k_factors")
        leaves = {
            n: torch.where(t > 0, 0.25 + 0.75 * t, t) if n in names and t is not None else t
            for n, t in self.leaves.items()
        }
        near = {n: 2 / 3 * t for n, t in leaves.items() if n in ("q_angles", "k_angles") and t is not None}
        return replace(self, leaves=leaves | near)

    def call(self, impl: str):
        x = self.leaves
        state = None if x["kv"] is None else LinearState(x["kv"], x["z"], x["state_decay"])
        return attend(
            x["q"], x["k"], x["v"], x["q_factors"], x["k_factors"], visible=self.visible, key_mask=self.key_mask,
            q_angles=x["q_angles"], k_angles=x["k_angles"], log_decay=x["log_decay"], initial_state=state,
            return_state=True, impl=impl, **self.cu, **self.keywords,
        )  # fmt: skip

    def formula(self):
        return explicit(**self.leaves, counts=self.counts, spans=self.spans, key_mask=self.key_mask, **self.keywords)


def attend(*tensors, impl: str, initial_state=None, q_angles=None, k_angles=None, log_decay=None, **keywords):
    """`linear_attention`, with float32 copies of float64 tensors where the implementation has no float64."""

    def taken(t):
        return t.float() if impl == "native" and t is not None and t.dtype == torch.float64 else t

    state = None if initial_state is None else LinearState(*map(taken, initial_state))
    angles = {"q_angles": taken(q_angles), "k_angles": taken(k_angles)}
    return linear_attention(
        *map(taken, tensors), impl=impl, initial_state=state, log_decay=taken(log_decay), **angles, **keywords
    )


def needs(impl: str, field: str) -> None:
    """Skip the test of an implementation that does not take this field of ``Arguments``, whose refusal is tested
    elsewhere."""
    if field not in _IMPLEMENTATIONS[impl].takes:
        pytest.skip(f"{impl} does not take {field}")


def takes(impl: str, dtype: torch.dtype) -> bool:
    """Whether the implementation takes this dtype; if not, it says so."""
    if impl != "native" or dtype in (torch.float32, torch.bfloat16):
        return True
    x = torch.ones(1, 1, 1, 1, dtype=dtype)
    with pytest.raises(ValueError, match=str(dtype)):
        linear_attention(x, x, x, impl=impl)
    return False


def make_case(
    visible="all", *, T=7, S=None, B=2, H=2, G=None, K=3, V=4, R=0, factor_heads=True, angles=0, mask=False,
    decay=False, state=False, lengths=None, key_lengths=None, seed=0, **keywords,
) -> Case:  # fmt: skip
    """A random case. `lengths` (and `key_lengths`) pack that many sequences into B = 1; `angles`, m of them, between 0
    and pi/2, in place of factors."""
    generator = torch.Generator().manual_seed(seed)
    S, G, cu = T if S is None else S, H if G is None else G, {}
    if lengths is None:
        spans = [(b, slice(0, T), slice(0, S)) for b in range(B)]
    else:
        B, starts = 1, [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        key_starts = starts if key_lengths is None else [sum(key_lengths[:n]) for n in range(len(lengths) + 1)]
        spans = [(0, slice(*starts[n : n + 2]), slice(*key_starts[n : n + 2])) for n in range(len(lengths))]
        T, S = starts[-1], key_starts[-1]
        cu["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32)
        if key_lengths is not None:
            cu["cu_seqlens_k"] = torch.tensor(key_starts, dtype=torch.int32)

    def positive(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def signed(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state_heads, rank, N = H if decay else G, max(R, 2 * angles, 1), len(spans)
    leaves: dict[str, Tensor | None] = dict.fromkeys(LEAVES)
    leaves.update(q=positive(B, T, H, K), k=positive(B, S, G, K), v=signed(B, S, G, V))
    if keywords.get("relu"):  # three in ten are negative
        leaves.update(q=leaves["q"] - 0.3, k=leaves["k"] - 0.3)  # type: ignore[operator]
    if R:
        leaves["q_factors"] = positive(B, T, H if factor_heads else 1, R)
        leaves["k_factors"] = positive(B, S, G if factor_heads else 1, R)
    if angles:  # their cosines, and those of differences, are then positive, as a normaliser needs
        leaves["q_angles"] = math.pi / 2 * positive(B, T, H if factor_heads else 1, angles)
        leaves["k_angles"] = math.pi / 2 * positive(B, S, G if factor_heads else 1, angles)
    if decay:
        leaves["log_decay"] = -2 * positive(B, T, H)
    if state:
        leaves.update(kv=signed(N, state_heads, rank, K, V), z=positive(N, state_heads, rank, K))
        leaves["state_decay"] = -positive(N, H) if decay else None
    argument, counts = visibility(visible, spans, generator)
    key_mask = positive(B, S) > 0.4 if mask else None
    return Case(leaves, argument, counts, spans, key_mask, keywords, cu)


def results_and_gradients(case: Case, run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and final state, and the gradients of a fixed random sum of all of them."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in case.leaves.items()}
    fresh = Case(leaves, case.visible, case.counts, case.spans, case.key_mask, case.keywords, case.cu)
    result = run(fresh)
    output, kv, z, decay = result if len(result) == 4 else (result.output, *_fields(result.state))
    results = {"output": output, "kv": kv, "z": z} | ({} if decay is None else {"decay": decay})
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in results.values()
    )
    given = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    return {name: t.detach() for name, t in results.items()}, {
        name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(given.items(), gradients, strict=True)
    }


def _fields(state: LinearState):
    return state.kv, state.z, state.log_decay


def check(case: Case, impl: str, tolerance: float = 1e-10) -> None:
    """Outputs, final state and every gradient against the explicit formula, relative to each one's scale."""
    if impl == "native":
        return check_low(case.away_from_zero().to(torch.float32), impl)
    actual, actual_gradients = results_and_gradients(case, lambda c: c.call(impl))
    expected, expected_gradients = results_and_gradients(case, Case.formula)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_near(actual[name], expected[name], tolerance, name)
    for name in expected_gradients:
        assert_near(actual_gradients[name], expected_gradients[name], tolerance, f"gradient of {name}")


def check_low(case: Case, impl: str, formula: Callable[[Case], Any] = Case.formula) -> None:
    """Below float64: errors against float64 are at most twice those of torch in the same dtype, plus 4 eps of the
    dtype.

    Errors are relative to the scale of all results, or of all gradients, of the case. Where terms cancel, as in
    gradients of a query that sees few keys, the error is that of the terms, and a single result's is a matter of luck.
    """
    exact = named_results(case.to(torch.float64), formula)
    theirs, ours = (named_results(case, lambda c, impl=impl: c.call(impl)) for impl in ("torch", impl))
    assert ours.keys() == exact.keys()
    errors: list[dict[str, float]] = [{}, {}]
    scales = {
        kind: max([1.0, *(largest(t) for name, t in exact.items() if is_gradient(name) == kind and name != "decay")])
        for kind in (False, True)
    }
    for name, expected in exact.items():
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == expected.shape, name
        if expected.numel():
            for found, results in zip(errors, (theirs, ours), strict=True):
                # A total of decays may be -1e30, which says nothing of the scale of the others.
                scale = max(1.0, largest(expected)) if name == "decay" else scales[is_gradient(name)]
                found[name] = difference(results[name], expected) / scale
    allowed = 2 * max(errors[0].values(), default=0.0) + 4 * torch.finfo(case.leaves["q"].dtype).eps
    for name, error in errors[1].items():
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def largest(t: Tensor) -> float:
    """The largest finite size in it."""
    sizes = t.double().abs()[t.isfinite()]
    return sizes.max().item() if sizes.numel() else 0.0


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; infinities that are the same do not differ."""
    actual, expected = actual.double(), expected.double()
    found = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return math.inf if found.isnan().any() else found.max().item()


def is_gradient(name: str) -> bool:
    return name.startswith("gradient of")


def named_results(case: Case, run) -> dict[str, Tensor]:
    """Results and gradients in one table."""
    results, gradients = results_and_gradients(case, run)
    return results | {f"gradient of {name}": t for name, t in gradients.items()}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, name: str = "result") -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error, scale = difference(actual, expected), max(1.0, largest(expected))
        assert math.isfinite(error) and error <= max(tolerance, nearest) * scale, (
            f"{name}: error {error:.2e} at scale {scale:.2e}"
        )
