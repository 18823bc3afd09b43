"""`benchmarks/gpu.sh`: the Triton kernels on a GPU. Right first, then how fast, against FlashAttention and others.

Needs PyTorch and Triton alone, so nothing here imports the libraries of the models or of the command.
Letters: B batch, N tokens, H heads, K key and value width.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import leapformer
from benchmarks.contenders import FLA, contender
from leapformer.bench.contenders import LEAP, SDPA, Inputs, Shape
from leapformer.bench.result import Result, Settings, Table, ratio_text, short
from leapformer.bench.rows import KEY, Compared, names_of, rows_of
from leapformer.bench.timing import Race, Sample, Timer, race
from leapformer.nn import DecoderBlock, SinusoidalPositions, build_attention
from leapformer.ops import LeapWeights, LinearState, Staircase, available_impls, leap_attention, linear_attention
from leapformer.ops.visibility import Visible

SECONDS = 8 * 60  # the whole run; what does not fit is named as not run
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
WEIGHTED_LENGTHS = (2048, 16384, 131072)
CONTEXTS = (1024, 8192, 65536, 131072)
TOKENS = 32768  # in a call: shorter sequences come in larger batches, so that the GPU has work
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PASSES = {False: "forward", True: "forward + backward"}
HEADS, WIDTH, HIDDEN = 8, 64, 16
WEIGHTINGS = FACTORS, ANGLES, DECAY, TWO_SIDED = "factors", "angles", "angles, decay", "angles, two-sided decay"
CACHED, IN_PLACE = f"{SDPA} with a cache", ", in place"  # the latter after the name of an implementation

# The model of the recipe lm/wikitext103 (a test compares them): its vocabulary is that of the text, 267,744 words.
WIKITEXT103: dict[str, Any] = {
    "vocab_size": 267744,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "leap_hidden": 32,
    "adaptive_cutoffs": [20000, 60000],
    "adaptive_factor": 4,
    "adaptive_dropout": 0.2,
    "hidden_dropout": 0.3,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "max_position_embeddings": 513,
}
BATCH, BLOCK = 8, 513
MODELS = {
    "softmax": ("softmax", "auto"),
    "LeaPformer, triton": ("leap", "triton"),
    "LeaPformer, torch": ("leap", "torch"),
}


def main(argv: Sequence[str]) -> int:
    """Runs all of it; 0, or 1 where a result is wrong or ours failed, or 2 where there is no GPU to run on."""
    about = "Correctness and speed of the Triton kernels."
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=about)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    output = parser.parse_args(argv).output
    reasons = available_impls()["triton"]
    if reasons:
        found = "; ".join(reasons)
        print(f"benchmarks/gpu.sh: expected a GPU that Triton's kernels can run on, found: {found}", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    result = Result(f"gpu-{name}", Settings(output=output, threads=torch.get_num_threads()))
    result.content["settings"]["clock"] = "wall"
    bench = Bench(result, device="cuda", timed=gpu_timer, until=time.monotonic() + SECONDS)
    wrong = check(bench)
    if not wrong:
        measure_weightings(bench)
        measure_attention(bench)
        measure_decoding(bench)
        measure_training(bench)
        result.finish()
    for table in tables(result.content):
        print(table.markdown())
    print(f"Written to {result.path}")
    faults = [f"wrong: {line}" for line in wrong] + [f"failed: {line}" for line in bench.failed]
    for line in faults:
        print(line, file=sys.stderr)
    return 1 if faults else 0


@dataclass
class Bench:
    """Where a run happens: its result, device and clock, and when it has to end (of `time.monotonic`)."""

    result: Result
    device: str
    timed: Callable[[Callable[[], object]], Timer]
    until: float
    limit: float = 4.0  # seconds of one call
    failed: list[str] = field(default_factory=list)  # contenders that ended in an error other than a want of memory

    def race(self, runs: Mapping[str, Callable[[], Callable[[], object]]], repeats: int = 5) -> Race:
        """Contenders take turns; `runs` makes each one. One that fails is not run, and unless it was for want of
        memory, or it is another's library that may be broken or too new, it is a fault of the run."""
        timers, not_run = {}, {}
        for name, make in runs.items():
            if time.monotonic() > self.until:
                not_run[name] = "the time is up"
                continue
            try:
                run = make()
                run()
                timers[name] = self.timed(run)
            except Exception as error:  # the others must have their turn; nothing is lost, see `failed`
                not_run[name] = _first_line(error)
                if name != FLA and not isinstance(error, torch.OutOfMemoryError):
                    self.failed.append(f"{name}: {not_run[name]}")
        outcome = race(timers, repeats=repeats, clock="wall", limit=self.limit)
        outcome.not_run.update(not_run)
        return outcome


def _compared(outcome: Race, *against: str) -> dict[str, Any]:
    """What a race gives to the fields of a `Compared` row."""
    over = outcome.speed_over(against, "wall")
    return {"contenders": outcome.times(), "not_run": outcome.not_run, "speed_over": over}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def gpu_timer(run: Callable[[], object]) -> Timer:
    """Times calls by events on the GPU's own stream, which no work of before is in."""

    def timed(calls: int) -> Sample:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
        return Sample(cpu / calls, start.elapsed_time(end) / 1e3 / calls)

    return timed


# ---- right -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One form of attention. S tokens of keys, or as many as of queries; G key heads; V the width of values.

    Attributes:
        leap: hidden size of LeaP modules, or 0 for given factors.
        angles: how many in place of factors, up to some thousand turns; or 0.
        resets: of the decay stand among its steps.
        bounds: of packed sequences, in any unit that the last one is the whole of; empty for a batch with a key mask.
        only: the one dtype that it is for; empty for all.
    """

    K: int = 64
    V: int = 64
    H: int = 4
    G: int = 4
    S: int | None = None
    visible: Visible = "causal"
    decay: bool = False
    resets: bool = False
    leap: int = 0
    angles: int = 0
    bounds: tuple[int, ...] = ()
    normalize: bool = True
    only: str = ""


CHECKS = {
    "causal": Form(),
    "bidirectional": Form(visible="all", S=333),
    "decay": Form(decay=True),
    "packed": Form(bounds=(0, 130, 130, 401, 700)),
    "grouped heads": Form(G=2, K=32),
    "leap": Form(leap=16),
    "leap, 128 wide": Form(leap=32, K=128, V=128, only="bfloat16"),
    "leap with decay": Form(leap=16, decay=True),
    "numerator": Form(normalize=False, K=48, V=40),
    "angles": Form(angles=2, G=2, normalize=False),
    "angles, 128 wide": Form(angles=1, K=128, V=128, visible="all", normalize=False, only="bfloat16"),
    "two-sided": Form(visible="all", decay=True),
    "two-sided, blocks": Form(visible=Staircase.blocks(100), decay=True, resets=True, angles=1, normalize=False),
    "two-sided, leap": Form(visible="all", decay=True, leap=16),
    "two-sided, packed": Form(visible="all", decay=True, resets=True, bounds=(0, 130, 130, 401, 700)),
    "two-sided, 128 wide": Form(visible="all", decay=True, K=128, V=128, only="bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """The result of a form and dtype that is nearest to its limit: its error, and what is allowed."""

    case: str
    dtype: str
    worst: str
    error: float
    allowed: float


def check(bench: Bench, impl: str = "triton", tokens: int = 700) -> list[str]:
    """Outputs, states and gradients against the reference in float64; what is further off than twice torch + 4 eps."""
    wrong = []
    for name, form in CHECKS.items():
        for label, dtype in DTYPES.items():
            if form.only not in ("", label):
                continue
            case = _case(form, bench.device, dtype, tokens)
            exact, torchs = _results(case, "reference", torch.float64), _results(case, "torch", None)
            try:
                ours = _results(case, impl, None)
            except Exception as error:  # the other cases must have their turn
                wrong.append(f"{name}, {label}: {_first_line(error)}")
                continue
            off, allowed = {}, {}
            for what, right in exact.items():
                scale = max(1.0, right.abs().max().item())
                off[what], theirs = ((x[what].double() - right).abs().max().item() / scale for x in (ours, torchs))
                allowed[what] = 2 * theirs + 4 * torch.finfo(dtype).eps
            worst = max(off, key=lambda what: (not off[what] <= allowed[what], off[what] / allowed[what]))  # NaN first
            row = CheckRow(case=name, dtype=label, worst=worst, error=off[worst], allowed=allowed[worst])
            bench.result.add("checks", row)
            wrong += [
                f"{name}, {label}: {w}: {off[w]:.1e}, allowed {allowed[w]:.1e}" for w in off if not off[w] <= allowed[w]
            ]
    return wrong


def _case(form: Form, device: str, dtype: torch.dtype, tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, keywords) of one call."""
    generator = torch.Generator(device).manual_seed(0)
    B, S = 1 if form.bounds else 2, form.S or tokens
    H, G, K, V = form.H, form.G, form.K, form.V

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x = {"q": normal(B, tokens, H, K), "k": normal(B, S, G, K), "v": normal(B, S, G, V)}
    x = {n: t.to(dtype) for n, t in x.items()}
    for side, heads, length in (("q", H, tokens), ("k", G, S)):
        if form.leap:
            sizes = {"w1": (1, form.leap, K), "b1": (1, form.leap), "w2": (1, form.leap), "b2": (1,)}
            x |= {f"{side}_{n}": normal(*size) / K**0.5 for n, size in sizes.items()}
        elif form.angles:
            x[f"{side}_angles"] = 1e4 * normal(B, length, heads, form.angles)
        else:
            x[f"{side}_factors"] = torch.rand(B, length, heads, 2, generator=generator, device=device)
    if form.decay:
        x["log_decay"] = -torch.rand(B, tokens, H, generator=generator, device=device)
        if form.resets:
            x["log_decay"][:, 10::97] = -torch.inf
    keywords: dict[str, Any] = {"visible": form.visible, "normalize": form.normalize, "eps": 1e-2}
    if form.bounds:
        bounds = torch.tensor(form.bounds, dtype=torch.int32, device=device)
        keywords["cu_seqlens"] = bounds * tokens // form.bounds[-1]
    else:
        keywords["key_mask"] = torch.rand(B, S, generator=generator, device=device) > 0.2
    return x, keywords


def _results(case: tuple[dict[str, Tensor], dict[str, Any]], impl: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Output, state and the gradients of a random sum of them."""
    tensors, keywords = case
    x = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    keywords = keywords | {"log_decay": x.get("log_decay"), "return_state": True, "impl": impl}
    if "q_w2" in x:
        leaps = (LeapWeights(*(x[f"{side}_{n}"] for n in ("w1", "b1", "w2", "b2"))) for side in "qk")
        output, state = leap_attention(x["q"], x["k"], x["v"], *leaps, **keywords)
    else:
        weighting = {name: x[name] for side in "qk" for name in (f"{side}_factors", f"{side}_angles") if name in x}
        output, state = linear_attention(x["q"], x["k"], x["v"], **weighting, relu=True, **keywords)
    assert state is not None
    found = {"output": output, "kv": state.kv, "z": state.z}
    generator = torch.Generator(output.device).manual_seed(1)
    loss = output.double().new_zeros(())
    for t in found.values():
        cotangent = torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float64)
        loss = loss + (t.double() * cotangent).sum()
    gradients = dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))
    return {n: t.detach() for n, t in found.items()} | {f"gradient of {n}": g for n, g in gradients.items()}


# ---- angles and decays -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WeightingRow(Compared):
    """One race of WEIGHTINGS in bfloat16; `passes` is one of PASSES."""

    length: int
    batch: int
    passes: str = field(metadata={KEY: "pass"})


def measure_weightings(bench: Bench, lengths: Sequence[int] = WEIGHTED_LENGTHS, impl: str = "triton") -> None:
    """Causal attention with angles, against their factors, which the caller makes, and against decays in one direction
    and in both."""
    for length in lengths:
        batch = max(1, TOKENS // length)
        for backward in (False, True):
            runs = {name: partial(_weighted, bench, name, batch, length, backward, impl) for name in WEIGHTINGS}
            compared = _compared(bench.race(runs), ANGLES, FACTORS)
            bench.result.add(
                "weightings", WeightingRow(length=length, batch=batch, passes=PASSES[backward], **compared)
            )


def _weighted(bench: Bench, name: str, batch: int, length: int, backward: bool, impl: Any) -> Callable[[], object]:
    """One call of plain numerators with one angle a head (as factors, or itself), causal unless the decay is
    two-sided."""
    inputs = Inputs(backward, bench.device, torch.bfloat16)
    size = batch, length, HEADS, WIDTH
    q, k, v = (inputs.leaf(*size) for _ in range(3))
    angles = [inputs.proportion(batch, length, HEADS).detach().cumsum(1)[..., None] for _ in "qk"]
    leaves = [q, k, v, *(t.requires_grad_(backward) for t in angles)]
    keywords: dict[str, Any] = {"visible": "causal", "normalize": False, "impl": impl}
    if name in (DECAY, TWO_SIDED):
        decay = -inputs.proportion(batch, length, HEADS).detach() / 10
        leaves.append(decay.requires_grad_(backward))
        keywords |= {"log_decay": decay, "visible": "all" if name == TWO_SIDED else "causal"}

    def attend() -> Tensor:
        if name == FACTORS:
            factors = [torch.cat([t.cos(), t.sin()], dim=-1) for t in angles]
            return linear_attention(q, k, v, *factors, **keywords).output
        return linear_attention(q, k, v, q_angles=angles[0], k_angles=angles[1], **keywords).output

    return inputs.call(attend, leaves, size)


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionRow(Compared):
    """One race of one shape; `passes` is one of PASSES."""

    visible: str
    dtype: str
    length: int
    batch: int
    passes: str = field(metadata={KEY: "pass"})


def measure_attention(
    bench: Bench, lengths: Sequence[int] = LENGTHS, impls: Sequence[str] = ("triton", "torch")
) -> None:
    """Causal and bidirectional, in both dtypes, by length."""
    for dtype in DTYPES:
        for visible in ("causal", "all"):
            for length in lengths:
                batch = max(1, TOKENS // length)
                shape = Shape(visible, batch=batch, heads=HEADS, width=WIDTH, visible=visible, hidden=HIDDEN)
                for backward in (False, True):
                    bench.result.add("attention", _attention_row(bench, shape, length, dtype, backward, impls))


def _attention_row(
    bench: Bench, shape: Shape, length: int, dtype: str, backward: bool, impls: Sequence[str]
) -> AttentionRow:
    names = [impls[0] + LEAP, *impls, SDPA]
    if shape.visible == "causal" and importlib.util.find_spec("fla"):
        names.append(FLA)
    keywords = {"backward": backward, "device": bench.device, "dtype": DTYPES[dtype]}
    outcome = bench.race({name: partial(contender(name).call, shape, length, **keywords) for name in names})
    return AttentionRow(
        visible=shape.visible,
        dtype=dtype,
        length=length,
        batch=shape.batch,
        passes=PASSES[backward],
        **_compared(outcome, SDPA, FLA),
    )


# ---- decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecodingRow(Compared):
    """One race of a token after so many tokens of context."""

    dtype: str
    batch: int
    context: int


def measure_decoding(
    bench: Bench, contexts: Sequence[int] = CONTEXTS, impls: Sequence[str] = ("triton", "torch")
) -> None:
    """One token of one layer's attention with its LeaP modules, by the length of what came before it.

    The first implementation runs twice, the second time with its state updated in place.
    """
    for dtype in DTYPES:
        for batch in (1, 16):
            for context in contexts:
                runs: dict[str, Callable[[], Callable[[], object]]] = {
                    name: partial(_our_step, bench, batch, dtype, name) for name in (*impls, impls[0] + IN_PLACE)
                }
                runs[CACHED] = partial(_cached_step, bench, batch, dtype, context)
                compared = _compared(bench.race(runs), CACHED, impls[-1])
                bench.result.add("decoding", DecodingRow(dtype=dtype, batch=batch, context=context, **compared))


def _one_token(bench: Bench, batch: int, dtype: str) -> list[Tensor]:
    shape = (3, batch, 1, HEADS, WIDTH)
    return list(torch.randn(shape, device=bench.device).to(DTYPES[dtype]).unbind())


def _our_step(bench: Bench, batch: int, dtype: str, name: str) -> Callable[[], object]:
    """The state is as large after any context, so its numbers do not matter."""
    q, k, v = _one_token(bench, batch, dtype)
    state = LinearState.zeros(batch, HEADS, 2, WIDTH, WIDTH, device=torch.device(bench.device))
    sizes = ((1, HIDDEN, WIDTH), (1, HIDDEN), (1, HIDDEN), (1,))
    weights = [LeapWeights(*(torch.randn(size, device=bench.device) / 8 for size in sizes)) for _ in "qk"]
    keywords: dict[str, Any] = {"visible": "causal", "initial_state": state, "return_state": True}
    keywords |= {"impl": name.removesuffix(IN_PLACE), "update_state": name.endswith(IN_PLACE)}

    def step() -> object:
        with torch.no_grad():
            return leap_attention(q, k, v, *weights, **keywords)

    return step


def _cached_step(bench: Bench, batch: int, dtype: str, context: int) -> Callable[[], object]:
    """The new key and value go into the last place of a cache that is there already, so nothing is copied."""
    keys, values = torch.randn(2, batch, HEADS, context, WIDTH, device=bench.device, dtype=DTYPES[dtype])
    query, key, value = (x.transpose(1, 2) for x in _one_token(bench, batch, dtype))

    def step() -> object:
        with torch.no_grad():
            keys[:, :, -1:], values[:, :, -1:] = key, value
            return F.scaled_dot_product_attention(query, keys, values)

    return step


# ---- training --------------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """The recipe's model out of the package's layers, without the library around them, which a GPU machine may lack."""

    def __init__(self, config: Mapping[str, Any], kind: Any, impl: Any) -> None:
        super().__init__()
        adaptive = _adaptive()
        sizes = {"cutoffs": config["adaptive_cutoffs"]}
        vocabulary, width = config["vocab_size"], config["hidden_size"]
        self.embedding = adaptive.AdaptiveEmbedding(vocabulary, width, factor=config["adaptive_factor"], **sizes)
        self.positions = SinusoidalPositions(width)
        self.dropout = nn.Dropout(config["hidden_dropout"])
        self.blocks = nn.ModuleList(self._block(config, kind, impl) for _ in range(config["num_hidden_layers"]))
        self.softmax = adaptive.AdaptiveSoftmax(vocabulary, width, dropout=config["adaptive_dropout"], **sizes)

    def _block(self, config: Mapping[str, Any], kind: Any, impl: Any) -> DecoderBlock:
        attention = build_attention(
            kind,
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            impl=impl,
            leap_hidden=config["leap_hidden"],
            dropout=config["attention_dropout"],
            max_positions=config["max_position_embeddings"],
        )
        return DecoderBlock(
            attention,
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            activation="relu",
            dropout=config["hidden_dropout"],
            activation_dropout=config["activation_dropout"],
        )

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss of the next tokens of ids [B, N]."""
        positions = torch.arange(ids.shape[1] - 1, device=ids.device)[None]
        hidden = self.embedding(ids[:, :-1]) / 0.02
        hidden = self.dropout(hidden + self.positions(positions).to(hidden.dtype))
        for block in self.blocks:
            hidden, _ = block(hidden)
        losses = self.softmax.token_losses(hidden.flatten(0, 1), ids[:, 1:].flatten(), self.embedding.weights())
        return losses.mean()


def _adaptive() -> Any:
    """The module leapformer.models.adaptive, even where there is no transformers, which the package around it needs."""
    if importlib.util.find_spec("transformers") is None and "leapformer.models" not in sys.modules:
        package = types.ModuleType("leapformer.models")
        package.__path__ = [str(Path(leapformer.__file__).parent / "models")]
        sys.modules["leapformer.models"] = package
    return importlib.import_module("leapformer.models.adaptive")


@dataclass(frozen=True, kw_only=True)
class TrainingRow(Compared):
    """One race of train steps of a recipe's model."""

    recipe: str
    tokens: int
    batch: int


def measure_training(bench: Bench, config: Mapping[str, Any] = WIKITEXT103, models: Mapping[str, Any] = MODELS) -> None:
    """One step, as the recipe takes it: bfloat16 autocast, gradients, clip, Nesterov's momentum."""
    ids = torch.randint(
        config["vocab_size"], (BATCH, min(BLOCK, config["max_position_embeddings"])), device=bench.device
    )

    def make(kind: str, impl: str) -> Callable[[], object]:
        with torch.device(bench.device):
            model = LanguageModel(config, kind, impl)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-7, momentum=0.99, nesterov=True)

        def step() -> object:
            with torch.autocast(bench.device, torch.bfloat16):
                loss = model(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    runs = {name: partial(make, *which) for name, which in models.items()}
    compared = _compared(bench.race(runs), next(iter(models)))
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    bench.result.add("training", TrainingRow(recipe="lm/wikitext103", tokens=tokens, batch=BATCH, **compared))


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(content: Mapping[str, Any]) -> list[Table]:
    """What a run says, ratios first."""
    gpu = content["machine"]["gpu"] or content["machine"]["processor"]
    found = [_check_table(content, gpu)]
    weightings = rows_of(content, "weightings", WeightingRow)
    for passes in dict.fromkeys(r.passes for r in weightings):
        rows = {f"{r.length:,} x {r.batch}": r for r in weightings if r.passes == passes}
        found.append(_race_table(f"{gpu}: angles and decays, {passes}, bfloat16", "tokens", rows, ANGLES))
    attention = rows_of(content, "attention", AttentionRow)
    for kind in dict.fromkeys((r.dtype, r.visible, r.passes) for r in attention):
        rows = {f"{r.length:,} x {r.batch}": r for r in attention if (r.dtype, r.visible, r.passes) == kind}
        dtype, visible, passes = kind
        title = f"{gpu}: {'causal' if visible == 'causal' else 'bidirectional'}, {passes}, {dtype}"
        found.append(_race_table(title, "tokens", rows, SDPA))
    decoding = rows_of(content, "decoding", DecodingRow)
    for dtype, batch in dict.fromkeys((r.dtype, r.batch) for r in decoding):
        rows = {f"{r.context:,}": r for r in decoding if (r.dtype, r.batch) == (dtype, batch)}
        found.append(_race_table(f"{gpu}: one token, batch {batch}, {dtype}", "context", rows, CACHED))
    for row in rows_of(content, "training", TrainingRow):
        title = f"{gpu}: one training step of {row.recipe}, {row.tokens:,} tokens"
        found.append(_race_table(title, "batch", {str(row.batch): row}, next(iter(row.speed_over))))
    return [table for table in found if table.rows]


def _check_table(content: Mapping[str, Any], gpu: str) -> Table:
    rows = rows_of(content, "checks", CheckRow)
    lines = [[r.case, r.dtype, r.worst, f"{r.error:.1e}", f"{r.allowed:.1e}"] for r in rows]
    columns = ["case", "dtype", "nearest to its limit", "error", "allowed"]
    return Table(f"{gpu}: errors against float64", columns, lines)


def _race_table(title: str, first: str, rows: Mapping[str, Compared], against: str) -> Table:
    """Times as fast as ``against``, and milliseconds."""
    names = names_of(rows.values())
    lines = []
    for label, row in rows.items():
        cells = []
        for name in names:
            if name not in row.contenders:
                cells.append("not run")
                continue
            milliseconds = short(row.contenders[name].wall_ms.median)
            cells.append(f"{ratio_text(row.speed(name, over=against))}, {milliseconds} ms")
        lines.append([label, *cells])
    reasons = dict.fromkeys(f"Not run: {name} ({why})." for row in rows.values() for name, why in row.not_run.items())
    return Table(f"{title}; times as fast as {against}", [first, *names], lines, tuple(reasons))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
