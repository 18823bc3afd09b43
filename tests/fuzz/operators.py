"""Random calls of the operators, valid and invalid, in every implementation, against the explicit float64 formula.

A valid call has the tolerance that the operator tests derive: in float64 the formula's own precision, below it twice
the error of the torch implementation in the same dtype, and 4 eps of the dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, relu

from leapformer.ops import (
    LeapWeights,
    LinearState,
    Staircase,
    cosine_factors,
    leap_attention,
    linear_attention,
    linear_state,
    proportion,
)
from leapformer.ops.api import available_impls
from tests.fuzz.harness import Wrong
from tests.ops import oracle
from tests.ops.oracle import Case, make_case, named_results, stairs

SECONDS = 60
CASES = {"short": 120, "full": 10_000}

torch.set_num_threads(1)
INF = float("inf")
DECAYS = (0.0, -0.0, -1e-9, -0.3, -3.0, -50.0, -99.0, -150.0, -300.0, -1e4, -1e6, -1e30, -INF)
HUGE = (2**30, 2**31, 2**62, 10**25)
IMPLEMENTATIONS = [name for name in ("reference", "torch", "native") if not available_impls()[name]]
DTYPES = {
    "reference": (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "torch": (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "native": (torch.float32, torch.float32, torch.bfloat16),
}


def case(seed: int, number: int, folder: Path) -> str:
    """One call, made from the two numbers alone."""
    chance = random.Random(f"{seed} {number}")
    torch.manual_seed(chance.randrange(2**31))
    kind = chance.choices((_linear, _leap, _blocks, _updated, _invalid), (40, 12, 8, 12, 28))[0]
    return kind(chance)


# ---- random arguments ------------------------------------------------------------------------------------------------


def _size(chance: random.Random) -> int:
    return chance.choice((0, 1, 2, 5, 17)) if chance.random() < 0.6 else chance.choice((63, 64, 65, 100, 129, 140))


def _form(chance: random.Random, visible: str) -> dict[str, Any]:
    G, rank = chance.choice((1, 1, 2, 3)), chance.choice((0, 0, 1, 2, 3))
    form: dict[str, Any] = {
        "H": G * chance.choice((1, 1, 2)),
        "G": G,
        "K": chance.choice((0, 1, 3, 8, 17)),
        "V": chance.choice((0, 1, 4, 17)),
        "R": rank,
        "angles": chance.choice((0, 1, 2, 3)) if rank == 0 else 0,
        "factor_heads": chance.random() < 0.6,
        "mask": chance.random() < 0.4,
        "state": chance.random() < 0.4,
        "decay": chance.random() < {"causal": 0.6, "all": 0.4, "own blocks": 0.8}.get(visible, 0.0),
        "normalize": chance.random() < 0.75,
        "eps": chance.choice((1e-6, 1e-6, 0.1, 2.0, 1e-30)),
        "relu": chance.random() < 0.4,
        "seed": chance.randrange(2**31),
    }
    if chance.random() < 0.3:
        n = chance.randint(1, 4)
        form["lengths"] = [_size(chance) for _ in range(n)]
        if not form["decay"] and chance.random() < 0.5:
            form["key_lengths"] = [_size(chance) for _ in range(n)]
            if visible == "causal":  # as many keys as queries in all, in other places
                form["key_lengths"] = chance.sample(form["lengths"], n)
                if n > 1 and form["key_lengths"][0]:
                    form["key_lengths"][0] -= 1
                    form["key_lengths"][-1] += 1
    else:
        form.update(T=_size(chance), B=chance.choice((1, 1, 2, 3)))
        if visible != "causal" and not form["decay"]:
            form["S"] = _size(chance)
    return form


def _case(chance: random.Random) -> Case:
    visible = chance.choice((*oracle.VISIBILITIES, "causal", "causal", "own blocks", "own blocks", "huge"))
    every, phase = chance.choice((1, 2, 5, 64, 70)), chance.randint(-9, 9)
    stairs_of = {"huge": "all", "own blocks": (every - phase, every, every, phase)}
    made = make_case(stairs_of.get(visible, visible), **_form(chance, visible)).away_from_zero()
    if not made.keywords["normalize"] and made.leaves["q_angles"] is not None and chance.random() < 0.5:
        for name in ("q_angles", "k_angles"):  # of any size: the sum of cosines is then of any sign
            made.leaves[name] = 30 * made.leaves[name] - 9
    lengths = [(t.stop - t.start, s.stop - s.start) for _, t, s in made.spans]
    if visible == "huge":
        _make_huge(chance, made, lengths)
    if made.key_mask is not None and chance.random() < 0.25:
        made.key_mask[chance.randrange(len(made.key_mask)) if len(made.key_mask) else 0 :] = False
    decay = made.leaves["log_decay"]
    if decay is not None and chance.random() < 0.8:
        few = chance.sample(DECAYS, chance.randint(1, 4))
        where = torch.rand(decay.shape) < chance.choice((0.05, 0.5, 1.0))
        made.leaves["log_decay"] = torch.where(where, torch.tensor(few)[torch.randint(len(few), decay.shape)], decay)
    return made


def _make_huge(chance: random.Random, made: Case, lengths: list[tuple[int, int]]) -> None:
    """A staircase with one field beyond any length."""
    fields = [chance.randint(-3, 9), chance.randint(0, 3), chance.randint(1, 4), chance.randint(-3, 3)]
    which, value = chance.choice((0, 1, 2, 3)), chance.choice(HUGE)
    fields[which] = value if which in (1, 2) or chance.random() < 0.5 else -value
    made.counts = [stairs(*(max(-(2**30), min(2**30, f)) for f in fields), T, S) for T, S in lengths]
    if chance.random() < 0.5:
        given: list[Any] = [
            torch.tensor([min(max(f, -(2**63)), 2**63 - 1)]) if i % 2 else f for i, f in enumerate(fields)
        ]
        fields = given
    made.visible = Staircase(*fields)


def _laid_out(chance: random.Random, t: Tensor) -> Tensor:
    """The same values in another layout: strided, transposed, offset, lazily negated, expanded."""
    how = chance.choice(("as it is", "as it is", "transposed", "wider", "every other", "offset", "negated"))
    if how == "transposed" and t.dim() > 2:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "wider":
        return torch.cat([t, t + 1], -1)[..., : t.shape[-1]]
    if how == "every other" and t.dim() > 1:
        return torch.stack([t, t + 1], 2).flatten(1, 2)[:, ::2]
    if how == "offset":
        room = t.new_zeros(t.numel() + 1)
        room[1:] = t.flatten()
        return room[1:].view(t.shape)
    if how == "negated" and t.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(t), -t).conj().imag
    return t


def _spread(chance: random.Random, made: Case) -> Case:
    leaves = {name: t if t is None else _laid_out(chance, t) for name, t in made.leaves.items()}
    mask = made.key_mask
    if mask is not None and chance.random() < 0.3:
        mask = torch.stack([mask, ~mask], -1)[..., 0]
    return Case(leaves, made.visible, made.counts, made.spans, mask, made.keywords, made.cu)


# ---- valid calls -----------------------------------------------------------------------------------------------------


def _linear(chance: random.Random) -> str:
    impl = chance.choice(IMPLEMENTATIONS)
    made = _case(chance).to(chance.choice(DTYPES[impl]))
    _state_in_float32(made)
    with_gradients = chance.random() < 0.5

    def results(run: Callable[[Case], Any], of: Case) -> dict[str, Tensor]:
        if with_gradients:
            return named_results(of, run)
        with torch.no_grad():
            return _results(run(of))

    ours = results(lambda c: c.call(impl), _spread(chance, made) if not with_gradients else made)
    exact = results(Case.formula, made.to(torch.float64))
    theirs = results(lambda c: c.call("torch"), made) if impl != "torch" else None
    _compare(ours, exact, theirs, made.leaves["q"].dtype)
    return f"{impl}: right"


def _state_in_float32(made: Case) -> None:
    if made.leaves["q"].dtype != torch.float64:
        for name in ("kv", "z", "state_decay"):
            made.leaves[name] = None if made.leaves[name] is None else made.leaves[name].float()


def _results(result: Any) -> dict[str, Tensor]:
    if len(result) == 4:
        output, kv, z, decay = result
    else:
        output, (kv, z, decay) = result
    return {"output": output, "kv": kv, "z": z} | ({} if decay is None else {"decay": decay})


def _compare(
    ours: dict[str, Tensor],
    exact: dict[str, Tensor],
    theirs: dict[str, Tensor] | None,
    dtype: torch.dtype,
    condition: float = 1.0,
) -> None:
    """Errors relative to the scale of all results, or of all gradients, as in tests/ops.

    condition: by how much a small normaliser may enlarge what is rounded in a gradient, where terms of that size
    cancel.
    """
    if ours.keys() != exact.keys():
        raise Wrong(f"results {sorted(ours)} in place of {sorted(exact)}")
    for kind in (False, True):
        names = [name for name in exact if oracle.is_gradient(name) == kind and exact[name].numel()]
        finite = [exact[name][exact[name].isfinite()].abs() for name in names if name != "decay"]
        scale = max([1.0, *(t.max().item() for t in finite if t.numel())])
        eps = torch.finfo(dtype).eps
        allowed = (
            1e-9 if dtype == torch.float64 else {torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        )
        if theirs is not None and dtype != torch.float64:
            allowed = max([2 * _error(theirs[name], exact[name], scale) for name in names], default=0.0)
            allowed += 8 * eps * (condition if kind else 1.0)
        for name in names:
            if ours[name].shape != exact[name].shape:
                raise Wrong(f"{name}: shape {tuple(ours[name].shape)} in place of {tuple(exact[name].shape)}")
            error = _error(ours[name], exact[name], max(scale, 1.0))
            if not error <= allowed:
                raise Wrong(f"{name}: error {error:.2e}, allowed {allowed:.2e}, {dtype}")


def _error(found: Tensor, exact: Tensor, scale: float) -> float:
    difference = (found.double() - exact).abs() / exact.abs().clamp(min=scale)
    difference = torch.where(found.double() == exact, 0.0, difference)  # infinities that agree
    return difference.max().item() if not difference.isnan().any() else INF


def _leap(chance: random.Random) -> str:
    """Against ``linear_attention`` of the reference in float64 with the factors of the formula; saturated scores
    too.
    """
    impl = chance.choice(IMPLEMENTATIONS)
    dtype = chance.choice(DTYPES[impl])
    G, K, V, r = chance.choice((1, 2)), chance.choice((1, 4, 9)), chance.choice((1, 5)), chance.choice((0, 1, 3, 17))
    H, T, B = G * chance.choice((1, 2)), _size(chance), chance.choice((1, 2))
    q, k, v = (torch.randn(B, T, heads, D).to(dtype) for heads, D in ((H, K), (G, K), (G, V)))

    def module(heads: int) -> list[Tensor | None]:
        n = chance.choice((1, heads))
        hidden = [torch.randn(n, r, K), torch.randn(n, r) if chance.random() < 0.7 else None] if r else [None, None]
        return [*hidden, torch.randn(n, r or K), torch.randn(n) + chance.choice((0, 0, 20, -20, 40, -40, 200, -200))]

    weights = [*module(H), *module(G)]
    decay = -torch.rand(B, T, H) if chance.random() < 0.3 else None
    if decay is not None and decay.numel():
        decay[torch.rand(decay.shape) < 0.1] = -INF
    keywords: dict[str, Any] = {
        "visible": chance.choice(("all", "causal", Staircase(2, 2, 3 if decay is None else 2))),
        "key_mask": torch.rand(B, T) > 0.3 if chance.random() < 0.4 else None,
        "return_state": True,
        "eps": chance.choice((0.1, 1.0)),
        "normalize": chance.random() < 0.7,
    }
    if dtype == torch.float64:  # else a gradient in the dtype of its input is rounded to float32
        weights, decay = [None if w is None else w.double() for w in weights], None if decay is None else decay.double()
    with_gradients = chance.random() < 0.5

    def run(which: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        given = [t if t is None else t.detach().to(dtype or t.dtype) for t in (q, k, v, *weights, decay)]
        leaves = {str(i): t.requires_grad_(with_gradients) for i, t in enumerate(given) if t is not None}
        leaps = LeapWeights(*given[3:7]), LeapWeights(*given[7:11])
        result = leap_attention(*given[:3], *leaps, log_decay=given[11], impl=which, **keywords)
        found = _results(result)
        if not with_gradients:
            return found
        loss = found["output"].double().sum() + found["kv"].double().square().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        named = {
            f"gradient of {n}": torch.zeros_like(t) if g is None else g
            for (n, t), g in zip(leaves.items(), gradients, strict=True)
        }
        return {name: t.detach() for name, t in found.items()} | named

    exact = {name: t.double() for name, t in run("reference", torch.float64).items()}
    theirs = run("torch", None) if impl != "torch" else None
    # Gradients are made of the state, whose values may cancel: it is rounded as a sum of their sizes is.
    features = (relu(k.double()), cosine_factors(proportion(relu(k.double()), LeapWeights(*map(_double, weights[4:])))))
    sizes = linear_state(features[0], v.double().abs(), features[1], key_mask=keywords["key_mask"]).kv
    cancels = max(1.0, sizes.max().item() / max(1.0, exact["kv"].abs().max().item())) if sizes.numel() else 1.0
    _compare(run(impl, None), exact, theirs, dtype, condition=cancels / min(1.0, keywords["eps"]))
    return f"{impl}: right"


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _blocks(chance: random.Random) -> str:
    """``linear_state`` after every block, against the formula of the keys up to there."""
    made = make_case(
        T=_size(chance),
        B=chance.choice((1, 2)),
        H=2,
        K=chance.choice((0, 1, 4)),
        R=chance.choice((0, 2)),
        mask=chance.random() < 0.5,
        state=chance.random() < 0.5,
        seed=chance.randrange(2**31),
    )
    every = chance.choice((None, 1, 3, 64, 10**12))
    x = _spread(chance, made).leaves
    initial = None if x["kv"] is None else LinearState(x["kv"], x["z"])
    state = linear_state(x["k"], x["v"], x["k_factors"], key_mask=made.key_mask, every=every, initial_state=initial)
    S = x["k"].shape[1]
    exact = {name: [] for name in ("kv", "z")}
    ends = [S] if every is None else [min(end, S) for end in range(every, S + every, every)]
    for end in ends:
        part = {n: t if n in ("kv", "z") or t is None else t[:, :end] for n, t in made.leaves.items()}
        mask = None if made.key_mask is None else made.key_mask[:, :end]
        spans = [(b, slice(0, end), slice(0, end)) for b in range(len(made.spans))]
        _, kv, z, _ = Case(part, "all", [[0] * end] * len(spans), spans, mask).formula()
        exact["kv"].append(kv), exact["z"].append(z)
    for name, found in (("kv", state.kv), ("z", state.z)):
        expected = exact[name][0] if every is None else torch.stack(exact[name], 1) if ends else torch.zeros_like(found)
        _compare({name: found}, {name: expected}, None, torch.float64)
    return "linear_state: right"


def _updated(chance: random.Random) -> str:
    """Split anywhere and resumed, the state updated in place in any layout: as one call over everything."""
    impl = chance.choice(IMPLEMENTATIONS)
    dtype = torch.float64 if impl != "native" else torch.float32
    T, rank = chance.choice((1, 2, 5, 66, 130)), chance.choice((0, 2))
    made = make_case(
        "causal",
        T=T,
        B=2,
        H=2,
        G=chance.choice((1, 2)),
        R=rank,
        angles=chance.choice((0, 1)) if rank == 0 else 0,
        decay=chance.random() < 0.7,
        K=3,
        mask=chance.random() < 0.3,
        relu=chance.random() < 0.3,
        seed=chance.randrange(2**31),
    ).away_from_zero()
    if made.leaves["log_decay"] is not None:
        made.leaves["log_decay"][torch.rand(2, T, 2) < 0.2] = chance.choice(DECAYS)
    made = made.to(dtype)
    x = made.leaves
    heads = 2 if x["log_decay"] is not None else x["k"].shape[2]
    rank = 1 if x["q_factors"] is None and x["q_angles"] is None else 2
    zeros = LinearState.zeros(2, heads, rank, 3, 4, dtype=dtype, decay_heads=2 if x["log_decay"] is not None else None)
    state = LinearState(*(t if t is None else _laid_out(chance, t) for t in zeros))
    outputs, start = [], 0
    with torch.no_grad():
        while start < T:
            stop = min(T, start + chance.choice((1, 1, 3, 64)))
            part = {n: None if t is None else _laid_out(chance, t[:, start:stop]) for n, t in x.items()}
            mask = None if made.key_mask is None else made.key_mask[:, start:stop]
            output, after = linear_attention(
                part["q"],
                part["k"],
                part["v"],
                part["q_factors"],
                part["k_factors"],
                visible="causal",
                key_mask=mask,
                q_angles=part["q_angles"],
                k_angles=part["k_angles"],
                log_decay=part["log_decay"],
                initial_state=state,
                update_state=True,
                impl=impl,
                **made.keywords,
            )
            if any(a is not b for a, b in zip(after, state, strict=True)):
                raise Wrong("update_state returned other tensors")
            outputs.append(output)
            start = stop
    ours = _results((torch.cat(outputs, 1), state))
    exact = _results(made.to(torch.float64).formula())
    theirs = _results(made.call("torch")) if impl == "native" else None
    _compare(ours, exact, theirs, dtype)
    return f"{impl}: right"


# ---- invalid calls ---------------------------------------------------------------------------------------------------


def _invalid(chance: random.Random) -> str:
    """One thing is wrong: a ValueError in one line, and nothing else."""
    impl = chance.choice((*IMPLEMENTATIONS, "auto"))
    B, T, S, H, G, K, V = 2, 5, chance.choice((5, 7)), 4, 2, 3, 4
    x: dict[str, Any] = {
        "q": torch.rand(B, T, H, K),
        "k": torch.rand(B, S, G, K),
        "v": torch.randn(B, S, G, V),
        "q_factors": torch.rand(B, T, H, 2),
        "k_factors": torch.rand(B, S, G, 2),
        "key_mask": torch.rand(B, S) > 0.3,
        "visible": torch.randint(S, (B, T)).sort().values,
        "initial_state": LinearState.zeros(B, G, 2, K, V, decay_heads=H if chance.random() < 0.5 else None),
    }
    form = chance.choice(("batch", "packed", "decay"))
    if form != "batch":
        for name in ("k", "v", "k_factors", "key_mask"):
            x[name] = x[name].narrow(1, 0, T) if S > T else x[name]
        x["visible"] = "causal"
    if form == "packed":
        x = {n: t[:1] if isinstance(t, Tensor) else t for n, t in x.items()}
        x["cu_seqlens"] = torch.tensor([0, 2, T], dtype=torch.int32)
        x["cu_seqlens_k"] = torch.tensor([0, 3, T], dtype=torch.int32)
    if form == "decay":
        x["log_decay"] = -torch.rand(B, T, H)
        x["initial_state"] = LinearState.zeros(B, H, 2, K, V, decay_heads=H)
    if chance.random() < 0.3:
        what = _spoil_option(chance, x)
    else:
        what = _spoil_tensor(chance, x)
    try:
        with torch.set_grad_enabled(chance.random() < 0.5 and "update_state" not in x):
            linear_attention(x.pop("q"), x.pop("k"), x.pop("v"), impl=x.pop("impl", impl), **x)
    except ValueError as error:
        if "\n" in str(error) or len(str(error)) > 400:
            raise Wrong(f"{what}: more than one line: {str(error)[:200]!r}") from error
        return "refused in one line"
    raise Wrong(f"{what} in {form}: taken by {impl}")


def _spoil_tensor(chance: random.Random, x: dict[str, Any]) -> str:
    """Another device, layout, dtype, shape or type in one of the tensors' places."""
    name = chance.choice([n for n, t in x.items() if isinstance(t, Tensor)] + ["kv", "z", "log_decay of the state"])
    if name in ("kv", "z") or name.startswith("log_decay of"):
        place = name.split()[0]
        t = getattr(x["initial_state"], place)
        if t is None:
            name, place, t = "kv", "kv", x["initial_state"].kv
    else:
        place, t = name, x[name]
    how = chance.choice(("device", "sparse", "complex", "axis", "shape", "type", "float8", "bits"))
    if how == "device":
        new: Any = t.to("meta")
    elif how == "sparse":
        new = t.to_sparse()
    elif how == "complex":
        new = t.to(torch.complex64)
    elif how == "axis":
        new = t[None]
    elif how == "shape":
        new = torch.cat([t, t], chance.randrange(1, t.dim()) if t.dim() > 1 else 0)
        if name == "k":
            new = torch.cat([t, t], 3)
        if name == "q":
            new = torch.cat([t, t], 3)
        if name == "v":
            new = torch.cat([t, t], 1)
        if name.startswith("cu_"):
            new = t + 1
        if name in ("q_factors", "k_factors"):
            new = torch.cat([t, t], 3)
    elif how == "type":
        new = chance.choice((t.tolist(), 3, "x", t.numpy()))
    elif how == "float8":
        new = t.to(torch.float8_e4m3fn)
    else:
        new = t.to(torch.bool) if t.dtype != torch.bool else t.to(torch.uint8)
    if name in x:
        x[name] = new
    else:
        x["initial_state"] = x["initial_state"]._replace(**{place: new})
    return f"{name} of another {how}"


def _spoil_option(chance: random.Random, x: dict[str, Any]) -> str:
    """A value that no option has."""
    state = x["initial_state"]
    alike = torch.zeros(1).expand(state.kv.shape), state.z
    shared = torch.zeros(state.kv.numel() + state.z.numel())
    wrong: list[tuple[str, Any]] = [
        ("eps", 0.0),
        ("eps", -1.0),
        ("eps", float("nan")),
        ("eps", "small"),
        ("eps", None),
        ("eps", 1j),
        ("visible", "past"),
        ("visible", None),
        ("visible", 3),
        ("visible", [1, 2]),
        ("visible", Staircase(1, 1, 0)),
        ("visible", Staircase(1.5, 1)),
        ("visible", Staircase("1", 1)),
        ("visible", Staircase(1, 1, torch.tensor([0]))),
        ("visible", Staircase(torch.zeros(1))),
        ("visible", Staircase(torch.zeros(1, dtype=torch.long, device="meta"))),
        ("impl", "cuda"),
        ("impl", None),
        ("impl", 3),
        ("impl", "triton"),
        ("normalize", "no"),
        ("normalize", None),
        ("relu", 2),
        ("initial_state", state.kv),
        ("initial_state", (state.kv, state.z, None)),
        ("initial_state", "x"),
        ("update_state", LinearState(*alike)),
        (
            "update_state",
            LinearState(shared[: state.kv.numel()].view(state.kv.shape), shared[: state.z.numel()].view(state.z.shape)),
        ),
    ]
    name, value = chance.choice(wrong)
    x[name] = value
    if name == "update_state":
        x["initial_state"], x["update_state"] = value, True
    return f"{name} = {str(value)[:40]}"
