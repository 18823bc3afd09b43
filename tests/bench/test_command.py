"""`leapformer bench` as a user calls it, in tiny sizes; never how long anything took."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch

from benchmarks import acceptance
from leapformer.bench import attention, benchmark, decoding, lra, overhead, training
from leapformer.bench.lra import MemoryRow
from leapformer.bench.timing import timed
from leapformer.cli import main
from leapformer.models import LeapformerConfig
from leapformer.training.recipes import TrainingSection
from tests.training.builders import write_recipe

PNG = b"\x89PNG"


class HereWorker:
    """A worker without its process, which takes seconds to start; the real one has tests of its own."""

    def __init__(self, contender, shape, length, *, backward, threads, environment=None):
        self.run = contender.call(shape, length, backward=backward)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def time(self, calls):
        return timed(self.run, calls)

    def memory_mib(self):
        return 2.0


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(attention, "Worker", HereWorker)
    monkeypatch.setattr(attention, "PRODUCT_SIZE", 32)
    monkeypatch.setattr(attention, "ALIGNED", (attention.CAUSAL, 16))
    monkeypatch.setattr(attention, "RAGGED", {name: (shape, 15) for name, (shape, _) in attention.RAGGED.items()})
    monkeypatch.setattr("leapformer.bench.timing.SHORTEST", 0.0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_line(capsys, *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("leapformer: ")
    return captured.err


def test_attention_leaves_json_tables_and_pictures(tmp_path, capsys):
    """As a user has it, and with the research code beside, as this repository owes it."""
    options = ["attention", "--lengths", "32,16", "--repeats", "2", "--output"]
    for called, judged in ((lambda *argv: main(["bench", *argv]), False), (lambda *argv: acceptance.main(argv), True)):
        output = tmp_path / str(judged)
        assert called(*options, str(output)) == 0
        check_attention(output, capsys.readouterr().out, judged=judged)


def check_attention(output, printed, *, judged):
    content = json.loads((output / "attention.json").read_text())
    assert content["format"] == 1 and content["benchmark"] == "attention" and content["finished"] is True
    assert {"machine", "versions", "git", "date", "settings"} <= set(content)
    assert content["settings"]["lengths"] == [16, 32] and content["settings"]["clock"] == "cpu"
    assert [(row["shape"], row["length"], row["pass"]) for row in content["time"]] == [
        (shape, length, name)
        for shape in ("causal", "LRA")
        for length in (16, 32)
        for name in ("forward", "forward + backward")
    ]
    row = content["time"][1]
    assert {"torch", "torch + LeaP", "SDPA", "matrix product"} <= set(row["contenders"])
    assert ("research code" in row["contenders"]) == judged
    assert set(row["contenders"]["torch"]["cpu_ms"]) == {"median", "p20", "p80", "n"}
    assert row["contenders"]["torch"]["wall_ms"]["n"] == 2
    assert "torch" in row["speed_over"]["SDPA"] and "torch" in row["share_of_peak"] and row["not_run"] == {}
    assert ("research code, memory kept" in content["time"][-1]["contenders"]) == judged
    assert content["memory"][0]["over_sdpa"]["torch"] == 1.0
    assert set(content["odd"][0]["rate_over_aligned"]) == set(attention.RAGGED)
    forms = {row["impl"]: row for row in content["forms"]}
    assert set(forms["torch"]["time_over_plain"]) == {"factors", "angles", "decay", "decay, later keys too"}
    for row in forms.values():  # who does not take an argument says so
        assert set(row["contenders"]) | set(row["not_run"]) == set(attention.FORMS)
        assert all("it does not take" in reason for reason in row["not_run"].values())
    for text in ("how many times as fast as SDPA", "Fitted exponent", "thread"):
        assert text in printed
    for text in ("Acceptance", "more rows were not measured"):
        assert (text in printed) == judged
    assert "| tokens | pass | torch |" in (output / "attention.md").read_text()
    assert (output / "acceptance.md").exists() == judged
    if judged:
        table = (output / "acceptance.md").read_text()
        assert "| work | against |" in table and "not measured: not among the lengths" in table
    pictures = sorted(path.name for path in output.glob("*.png"))
    assert pictures == [f"attention-{shape}-{what}.png" for shape in ("causal", "lra") for what in ("memory", "time")]
    assert all((output / name).read_bytes().startswith(PNG) for name in pictures)


def test_decoding_grows_a_state_and_a_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoding, "PIECE", 10)
    assert main(["bench", "decoding", "--lengths", "16,24", "--repeats", "2", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "decoding.json").read_text())
    assert [row["context"] for row in content["steps"]] == [16, 24]
    first, last = content["steps"]
    assert set(first["contenders"]) >= {"torch", "SDPA with a cache"}
    assert first["state_kib"] == last["state_kib"] and first["cache_kib"] < last["cache_kib"]
    assert "context" in capsys.readouterr().out
    assert (tmp_path / "decoding.png").read_bytes().startswith(PNG)


def test_slow_contenders_are_listed_as_not_run(tmp_path, capsys):
    arguments = ["bench", "decoding", "--lengths", "16", "--repeats", "1", "--limit", "1e-9"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Not run at 16: SDPA with a cache" in printed and "over the limit of 1e-09 s" in printed
    assert json.loads((tmp_path / "decoding.json").read_text())["steps"][0]["contenders"] == {}


def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    real, calls = benchmark.race, []

    def interrupted(*arguments, **keywords):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(benchmark, "race", interrupted)
    assert main(["bench", "--lengths", "16,32", "--repeats", "1", "--output", str(tmp_path)]) == 130
    content = json.loads((tmp_path / "attention.json").read_text())
    assert content["finished"] is False and len(content["time"]) == 3
    assert f"Interrupted; what was measured is in {tmp_path / 'attention.json'}" in capsys.readouterr().out
    assert "Interrupted: not everything was measured." in (tmp_path / "attention.md").read_text()
    assert not (tmp_path / "decoding.json").exists()


def test_more_threads_count_wall_time(tmp_path, threads):
    arguments = ["bench", "decoding", "--lengths", "16", "--repeats", "1", "--threads", "2"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "decoding.json").read_text())
    assert content["settings"]["clock"] == "wall" and content["machine"]["threads"] == 2
    assert "2 threads, wall time" in (tmp_path / "decoding.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attenton"], "bench: expected all, attention, decoding, training, overhead, processes, lra, streaming"),
        (["--lengths", "512,x"], "--lengths: expected whole numbers above 0 such as 512,4096, found '512,x'"),
        (["--lengths", "0"], "--lengths: expected whole numbers above 0"),
        (["--lengths", ""], "--lengths: expected whole numbers above 0"),
        (["--limit", "0"], "--limit: expected seconds above 0, found 0"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
    ],
)
def test_wrong_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in one_line(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "leapformer.bench.decoding")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = one_line(capsys, "decoding", "--output", str(tmp_path / "out"))
    assert "this command needs the package 'matplotlib.figure'" in error and "pip install 'leapformer[plots]'" in error
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "expected a folder, found a file" in one_line(capsys, "--output", str(tmp_path / "file"))


@pytest.fixture
def tiny_recipe(tmp_path):
    return str(write_recipe(tmp_path))


def test_training_and_generation_of_a_recipe_without_its_data(tmp_path, capsys, tiny_recipe):
    output = tmp_path / "out"
    arguments = ["bench", "training", "--recipe", tiny_recipe, "--repeats", "2", "--lengths", "16,32"]
    assert main([*arguments, "--output", str(output)]) == 0
    content = json.loads((output / "training.json").read_text())
    assert [(row["kind"], row["length"]) for row in content["steps"]] == [
        (kind, length) for length in (16, 32) for kind in ("training", "generation")
    ]
    train = content["steps"][0]
    names = {"softmax", "cosFormer", "LeaPformer", "LeaPformer (gated)"}
    assert set(train["tokens_per_second"]) == set(train["parameters"]) == names
    assert train["speed_over"]["softmax"]["softmax"]["median"] == 1.0
    assert train["tokens"] == content["steps"][2]["tokens"]  # equal tokens a step at every length
    assert len(content["profiles"]) == 8 and content["profiles"][0]["operators"][0]["ms"] > 0
    assert "times as fast as softmax" in capsys.readouterr().out
    assert (output / "training.png").read_bytes().startswith(PNG)


def test_a_train_step_moves_the_weights():
    generator = torch.random.get_rng_state()
    model = training.fresh_model(LeapformerConfig(hidden_size=16, num_hidden_layers=1))
    assert torch.equal(torch.random.get_rng_state(), generator)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = training.train_step(model, training.random_ids(2, 8, vocab_size=256), TrainingSection(warmup_steps=0))
    step()
    assert all((new != old).any() for new, old in zip(model.parameters(), before, strict=True) if old.dim() > 1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generation_goes_on_past_what_cosformer_takes():
    config = LeapformerConfig(hidden_size=16, num_hidden_layers=1, attention="cosformer", max_position_embeddings=12)
    step = training.generation_step(training.fresh_model(config), training.random_ids(1, 8, vocab_size=256))
    for _ in range(10):
        step()


def test_overhead_is_a_share_of_a_step_a_block_and_a_decoding_step(tmp_path, capsys, monkeypatch):
    tiny = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(overhead, "SIZES", {"tiny": tiny, "huge": tiny})
    step_or_block = overhead._step_or_block

    def of_size(models, length, limit, free):
        return step_or_block(models, length, limit, free if length < 32 else 10_000)

    monkeypatch.setattr(overhead, "_step_or_block", of_size)
    arguments = ["bench", "overhead", "--lengths", "8,16,32", "--repeats", "2", "--output", str(tmp_path)]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "overhead.json").read_text())["shares"]
    assert [(row["size"], row["length"]) for row in rows] == [
        (s, n) for s in ("tiny", "huge") for n in (8, 16, 32, None)
    ]
    assert [row["what"] for row in rows[:2]] == ["train step"] * 2 and rows[3]["what"] == "decoding step"
    assert "GiB a block" in rows[2]["not_run"]["a step or a block"]
    assert all(row["modules_alone"]["median"] > 0 and "difference" in row for row in (*rows[:2], rows[3]))
    assert all(overhead.RUNNING in row["contenders"] and row["running"]["median"] > -1 for row in (*rows[:2], rows[3]))
    printed = capsys.readouterr().out
    assert "modules alone" in printed and "Not run: tiny parameters at 32 tokens" in printed
    assert (tmp_path / "overhead.png").read_bytes().startswith(PNG)


def test_processes_against_threads(tmp_path, capsys, threads):
    """Three forms of one step: their losses are compared in tests/training/test_processes.py."""
    arguments = ["bench", "processes", "--quick", "--repeats", "1", "--limit", "60", "--output", str(tmp_path)]
    before = torch.get_num_threads()
    assert main(arguments) == 0
    content = json.loads((tmp_path / "processes.json").read_text())
    assert (content["settings"]["clock"], content["settings"]["threads"]) == ("wall", 2)
    assert [row["recipe"] for row in content["steps"]] == ["simulst/demo-transcription", "simulst/demo"]
    for row in content["steps"]:
        assert list(row["steps_per_second"]) == ["1 thread", "2 threads", "2 processes"]
        assert row["speed_over"]["1 thread"]["1 thread"]["median"] == 1.0 and row["not_run"] == {}
    assert "2 processes" in capsys.readouterr().out and torch.get_num_threads() in (1, before)


def test_every_mechanism_of_the_long_range_arena(tmp_path, capsys, monkeypatch):
    def memory_apart(name, lengths, threads):
        if name == "Reformer":
            return MemoryRow(contender=name, not_run="a reason")
        return MemoryRow(contender=name, mib={"training": {str(n): 3.0 for n in lengths}})

    monkeypatch.setattr(lra, "memory_apart", memory_apart)
    arguments = ["bench", "lra", "--lengths", "8,16", "--repeats", "2", "--output", str(tmp_path)]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "lra.json").read_text())
    assert [(row["kind"], row["length"]) for row in content["speed"]] == [
        (kind, length) for length in (8, 16) for kind in ("training", "inference")
    ]
    row = content["speed"][0]
    assert list(row["examples_per_second"]) == list(lra.CONTENDERS) and len(lra.CONTENDERS) == 13
    assert row["speed_over"]["cosFormer"]["cosFormer"]["median"] == 1.0
    assert row["parameters"]["LeaPformer"] - row["parameters"]["cosFormer"] == 4 * (34 * 8 + 1)
    assert [row["contender"] for row in content["memory"]] == list(lra.CONTENDERS)
    printed = capsys.readouterr().out
    assert (
        "LeaPformer's training, times as fast as others" in printed
        and "Peak memory, train step of 4 examples" in printed
        and "Not run: Reformer (a reason)." in printed
    )
    for name in ("lra-training.png", "lra-inference.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_memory_of_a_mechanism_in_a_process_of_its_own(capsys, monkeypatch, threads):
    """The process's own end, here; of a process that dies it is told how."""
    monkeypatch.setattr("leapformer.bench.worker.end_me_first", lambda: None)
    monkeypatch.setattr("sys.argv", ["lra", json.dumps({"name": "LeaPformer", "lengths": [256], "threads": 1})])
    monkeypatch.delitem(sys.modules, "leapformer.bench.lra")
    runpy.run_module("leapformer.bench.lra", run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"training", "inference"} and found["training"]["256"] > 0
    found = lra.memory_apart("no such mechanism", [256], 1)
    reason = "the measuring process ended with code 1: KeyError: 'no such mechanism'"
    assert found == MemoryRow(contender="no such mechanism", mib={}, not_run=reason)


def test_a_step_over_the_limit_becomes_a_block():
    tiny = LeapformerConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    models = {name: training.fresh_model(tiny) for name in (overhead.LEAP, overhead.COSFORMER)}
    parameters = models[overhead.LEAP].num_parameters()
    what, runs = overhead._step_or_block(models, 8, 0.9 * 6 * parameters * 8 / overhead.RATE, 2**33)
    assert what == "one block"
    for run in runs.values():
        run()
    assert len(overhead.leap_modules(models[overhead.LEAP])) == 4


def test_a_recipe_that_cannot_be_measured(tmp_path, capsys, tiny_recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--recipe: only training has one" in one_line(capsys, "decoding", "--recipe", tiny_recipe)
    assert "did you mean lm/wikitext2-small" in one_line(capsys, "training", "--recipe", "lm/wikitext2-smal")
    error = one_line(capsys, "training", "--recipe", "lm/wikitext103")
    assert "its vocabulary is every word of its text" in error
    assert not (tmp_path / "runs").exists()
