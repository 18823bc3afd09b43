"""The acceptance table: what is met, what is missed, and what was not measured and why."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import acceptance
from benchmarks.acceptance import Promise, acceptance_table, main
from leapformer.bench.attention import LongRow, MemoryRow, TimeRow
from leapformer.bench.decoding import StepRow
from leapformer.bench.lra import SpeedRow
from leapformer.bench.rows import Spread, Times, to_json
from tests.test_layers import SOURCES, imported_modules

ROOT = Path(__file__).parents[2]


def around(value):
    return Spread(value, value, value)


NO_TIMES = Times(around(1.0), around(1.0))


def race_row(length, *, sdpa=True, not_run=None, **speeds):
    row = TimeRow(
        shape="causal",
        length=length,
        passes="forward + backward",
        contenders=dict.fromkeys([*speeds, *(["SDPA"] if sdpa else [])], NO_TIMES),
        not_run=not_run or {},
        speed_over={"SDPA": {name: around(speed) for name, speed in speeds.items()}} if sdpa else {},
        share_of_peak={name: around(0.1 * speed) for name, speed in speeds.items()},
        product_gflops=around(100.0),
    )
    return to_json(row)


def by_work(table):
    return {row[0]: row for row in table.rows}


def test_met_missed_and_stretch():
    time = [race_row(512, torch=1.1, native=1.5), race_row(1024, torch=2.0, native=6.0)]
    time[1]["not_run"] = {"research code": "too slow"}
    rows = by_work(acceptance_table({"attention": {"time": time}}))
    work = "{}, causal, forward + backward, {} tokens".format
    assert rows[work("torch", "512")][2:] == ["1.10 x", "1.00 x", "1.20 x", "yes"]
    assert rows[work("torch", "1,024")][-1] == "yes, stretch"
    assert rows[work("native", "512")][-1] == "no"
    assert rows[work("torch", "2,048")][-1] == "not measured: not among the lengths"
    assert rows["native, causal, forward + backward, lowest at 512 tokens"][2:] == ["0.15", "0.54", "0.65", "no"]


def test_a_missing_contender_is_the_reason():
    row = race_row(512, sdpa=False, not_run={"SDPA": "too slow"}, torch=1.1)
    rows = by_work(acceptance_table({"attention": {"time": [row]}}))
    assert rows["torch, causal, forward + backward, 512 tokens"][-1] == "not measured: SDPA: too slow"
    assert "no native" in rows["native, causal, forward + backward, 512 tokens"][-1]


def test_memory_is_the_worst_length_and_smaller_is_better():
    memory = [
        to_json(MemoryRow(shape="causal", length=n, memory_mib={}, over_sdpa={"torch": r}))
        for n, r in ((512, 1.6), (1024, 1.8))
    ]
    rows = by_work(acceptance_table({"attention": {"memory": memory}}))
    assert rows["torch, memory, causal, highest at 1,024 tokens"][2:] == ["1.80 x", "at most 1.70 x", "-", "no"]


def test_the_long_sequence_counts_only_with_its_last_length():
    def measured(length, beyond, fresh, kept):
        paces = {"microseconds_a_token": around(fresh), "microseconds_a_token_kept": around(kept)}
        return to_json(LongRow(impl="native", length=length, tensor_gib=0.1, beyond_gib=beyond, **paces))

    long = [measured(16384, 0.01, 10.0, 10.0), measured(1048576, 0.2, 14.0, 10.5)]
    rows = [row for row in acceptance_table({"attention": {"long": long}}).rows if "one sequence" in row[0]]
    assert [row[-1] for row in rows] == ["yes", "yes", "no"]
    assert [row[2] for row in rows[1:]] == ["1.05 x", "1.40 x"]
    long[1] = to_json(LongRow(impl="native", length=1048576, tensor_gib=0.1, not_run="not enough memory"))
    rows = [row for row in acceptance_table({"attention": {"long": long}}).rows if "one sequence" in row[0]]
    assert {row[-1] for row in rows} == {"not measured: not enough memory"}


def test_decoding_steps():
    def step(context, native):
        speed = {"torch": {"native": around(100 / native)}}
        times = {"native": Times(cpu_ms=around(native / 1000), wall_ms=around(1.0))}
        return to_json(
            StepRow(context=context, contenders=times, speed_over=speed, state_kib=1.0, cache_kib=float(context))
        )

    content = {"settings": {"clock": "cpu"}, "steps": [step(1024, 22.0), step(65536, 25.0)]}
    rows = acceptance_table({"decoding": content}).rows
    assert [row[-1] for row in rows] == ["yes", "yes", "stretch not reached"]
    assert rows[0][0].endswith("lowest at 65,536 tokens of context") and rows[0][2] == "4.00 x"


def test_a_row_without_a_reason():
    assert Promise("a", "b", None, 1.0).met == "not measured"


def test_training_of_the_small_model_over_cosformer_and_softmax():
    def row(length, cosformer, softmax):
        ratios = {"cosFormer": cosformer, "softmax": softmax, "softmax, no dropout": 2.0}
        row = SpeedRow(
            kind="training",
            length=length,
            examples=4,
            impl="native",
            contenders=dict.fromkeys(ratios, NO_TIMES),
            speed_over={name: {"LeaPformer": around(ratio)} for name, ratio in ratios.items()},
            examples_per_second={},
            parameters={},
        )
        return to_json(row)

    content = {"speed": [row(1024, 0.85, 1.5), row(4096, 0.95, 9.0)]}
    rows = {(line[0], line[1]): line[2:] for line in acceptance_table({"lra": content}).rows}
    assert rows["LeaPformer (native), training, 1,024 tokens", "cosFormer"] == ["0.85 x", "0.90 x", "-", "no"]
    assert rows["LeaPformer (native), training, 4,096 tokens", "cosFormer"][-1] == "yes"
    assert rows["LeaPformer, training, 4,096 tokens", "softmax"] == ["9.00 x", "3.00 x", "-", "yes"]
    assert rows["LeaPformer, training, 4,096 tokens", "softmax, no dropout"][-1] == "no"
    (missing, *_) = acceptance_table({"lra": {"speed": []}}).rows
    assert missing[-1] == "not measured: not among the lengths"


def test_what_is_in_a_folder_is_judged(tmp_path, capsys):
    name = "decoding-cpu-epyc-avx512.json"
    (tmp_path / "decoding.json").write_bytes((ROOT / "benchmarks" / "results" / name).read_bytes())
    assert main(["--only-table", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "native, one decoding step, lowest at 1,024 tokens of context" in printed and "6.04 x" in printed
    assert "decoding: AMD EPYC" in printed
    assert "| native, slowest decoding step | - | 57.4 us | - |" in (tmp_path / "acceptance.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected one of attention.json, decoding.json, lra.json, streaming.json, found none"),
        ({"format": 2}, "decoding.json: expected format 1, found 2"),
        ({"format": 1, "settings": {"clock": "cpu"}, "steps": [{}]}, "steps, row 0: expected a StepRow, found {}"),
    ],
)
def test_a_folder_that_cannot_be_judged_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "decoding.json").write_text(json.dumps(content))
    assert main(["--only-table", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.acceptance: ") and message in line


def test_what_is_not_judged_is_not_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["overhead"]) == 2
    assert "expected attention, decoding, lra, streaming, found 'overhead'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_package_knows_nothing_of_what_is_owed():
    """A wheel holds the package alone."""
    modules = [(path, module) for path in SOURCES for _, module in imported_modules(path)]
    assert not [(path.name, module) for path, module in modules if module.partition(".")[0] == "benchmarks"]


def test_it_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["acceptance", "--help"])
    monkeypatch.delitem(sys.modules, "benchmarks.acceptance")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("benchmarks.acceptance", run_name="__main__")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--only-table" in printed and all(name in printed for name in acceptance.JUDGED)
