"""`benchmarks/gpu.sh`: its logic, on the CPU; the kernels themselves are tested in tests/ops."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.contenders import FLA
from leapformer.bench.contenders import LEAP, SDPA
from leapformer.bench.result import Result, Settings
from leapformer.bench.rows import rows_of
from leapformer.bench.timing import timer
from leapformer.models import LeapformerConfig, LeapformerForCausalLM
from leapformer.tasks.registry import load_recipe

ROOT = Path(__file__).parents[2]
SMALL = gpu.WIKITEXT103 | {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "adaptive_cutoffs": [10, 20],
    "max_position_embeddings": 9,
}


@pytest.fixture
def bench(tmp_path):
    return gpu.Bench(Result("gpu-test", Settings(output=tmp_path)), "cpu", timer, until=time.monotonic() + 600)


def test_without_a_gpu_it_says_so_and_exits_with_2():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    run = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert run.stdout == "" and line.startswith("benchmarks/gpu.sh: expected a GPU") and "no GPU" in line


def test_without_pytorch_it_says_so_and_exits_with_2(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    run = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "PyTorch" in run.stderr


ALONE = """
import sys
for name in {forbidden}:
    sys.modules[name] = None
import torch
from benchmarks import gpu
model = gpu.LanguageModel({config}, "leap", "torch")
assert model(torch.randint(40, (2, 9))).isfinite()
"""


def test_it_needs_pytorch_alone():
    forbidden = [
        "transformers",
        "accelerate",
        "psutil",
        "matplotlib",
        "yaml",
        "pydantic",
        "typer",
        "safetensors",
        "numpy",
    ]
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE.format(forbidden=forbidden, config=SMALL)], check=True)


def test_the_model_is_the_recipes():
    recipe = load_recipe("lm/wikitext103", ["data.path=nowhere"])[0]
    fields = dict(recipe.model)
    assert {n: fields[n] for n in gpu.WIKITEXT103 if n != "vocab_size"} == {
        n: value for n, value in gpu.WIKITEXT103.items() if n != "vocab_size"
    }
    assert (gpu.BATCH, gpu.BLOCK) == (recipe.training.batch_size, recipe.data.block_size)
    with torch.device("meta"):
        theirs = LeapformerForCausalLM(LeapformerConfig(**fields, vocab_size=gpu.WIKITEXT103["vocab_size"]))
        ours = gpu.LanguageModel(gpu.WIKITEXT103, "leap", "torch")
    assert Counter(p.shape for p in ours.parameters()) == Counter(p.shape for p in theirs.parameters())


def test_what_agrees_with_the_reference_is_not_wrong(bench):
    assert gpu.check(bench, impl="torch", tokens=30) == []
    rows = rows_of(bench.result.content, "checks", gpu.CheckRow)
    assert len(rows) == 2 * len(gpu.CHECKS) - 3  # three are for bfloat16 alone
    assert all(row.error <= row.allowed for row in rows)


def test_a_kernel_that_fails_is_wrong(bench, monkeypatch):
    right = gpu._results

    def results(case, impl, dtype):
        if impl == "ours":
            raise RuntimeError("Triton Error [CUDA]: illegal address\nmore")
        return right(case, impl, dtype)

    monkeypatch.setattr(gpu, "_results", results)
    monkeypatch.setattr(gpu, "CHECKS", {"causal": gpu.Form()})
    wrong = gpu.check(bench, impl="ours", tokens=30)
    assert wrong == [f"causal, {d}: RuntimeError: Triton Error [CUDA]: illegal address" for d in gpu.DTYPES]


@pytest.mark.parametrize("harm", (100.0, float("nan")))
def test_what_does_not_is_named(bench, monkeypatch, harm):
    right = gpu._results

    def results(case, impl, dtype):
        found = right(case, "torch" if impl == "ours" else impl, dtype)
        return found | ({"gradient of k": found["gradient of k"] + harm} if impl == "ours" else {})

    monkeypatch.setattr(gpu, "_results", results)
    monkeypatch.setattr(gpu, "CHECKS", {"causal": gpu.Form()})
    wrong = gpu.check(bench, impl="ours", tokens=30)
    assert [line.split(": ")[:2] for line in wrong] == [[f"causal, {d}", "gradient of k"] for d in gpu.DTYPES]


def test_a_run_and_its_tables(bench, monkeypatch):
    monkeypatch.setattr(gpu, "TOKENS", 32)
    gpu.measure_weightings(bench, lengths=(16,), impl="torch")
    gpu.measure_attention(bench, lengths=(16,), impls=("torch",))
    gpu.measure_decoding(bench, contexts=(16,), impls=("torch",))
    gpu.measure_training(bench, SMALL, {"softmax": ("softmax", "auto"), "LeaPformer": ("leap", "torch")})
    content = bench.result.content
    row = next(r for r in content["attention"] if r["visible"] == "causal")
    assert row["batch"] == 2 and set(row["contenders"]) == {"torch", "torch" + LEAP, SDPA}
    assert all(set(r["contenders"]) == set(gpu.WEIGHTINGS) for r in content["weightings"])
    assert "torch, in place" in content["decoding"][0]["contenders"]
    titles = [table.title for table in gpu.tables(content)]
    assert len(titles) == 2 + 2 * 2 * 2 + 2 * 2 + 1
    assert all("times as fast as" in title for title in titles)


def raises(error):
    def make():
        raise error

    return make


def test_what_cannot_run_is_named_and_ours_is_a_fault(bench):
    runs = {
        "works": lambda: lambda: None,
        "large": raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")),
        FLA: raises(TypeError("unexpected keyword 'normalize'")),
        "triton": raises(ValueError("no such tile")),
    }
    outcome = bench.race(runs, repeats=3)
    assert outcome.not_run == {
        "large": "OutOfMemoryError: CUDA out of memory. Tried to allocate",
        FLA: "TypeError: unexpected keyword 'normalize'",
        "triton": "ValueError: no such tile",
    }
    assert bench.failed == ["triton: ValueError: no such tile"]
    late = replace(bench, until=0.0).race({"works": lambda: lambda: None})
    assert late.not_run == {"works": "the time is up"} and late.samples == {}
