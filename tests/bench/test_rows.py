"""Rows of measurements and their form in files; every result in benchmarks/results still loads, prints and draws."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from leapformer.bench.attention import LongRow, TimeRow
from leapformer.bench.benchmark import NAMES, load_benchmark
from leapformer.bench.lra import MemoryRow
from leapformer.bench.rows import KEY, Compared, Spread, Times, rows_of, to_json
from leapformer.errors import LeapformerError

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
ONE = Spread(1.0, 0.5, 2.0, 3)


@dataclass(frozen=True, kw_only=True)
class Row(Compared):
    label: str
    passes: str = field(metadata={KEY: "pass"})
    parts: list[Times] = field(default_factory=list)
    maybe: Spread | None = None
    length: int | None


def test_a_row_comes_back_as_it_was():
    times = Times(ONE, ONE.times(2.0))
    raced = {"contenders": {"x": times}, "not_run": {"y": "too slow"}, "speed_over": {"x": {"x": ONE}}}
    row = Row(label="a", passes="forward", parts=[times], length=None, **raced)
    written = json.loads(json.dumps(to_json(row)))
    assert list(written) == ["label", "pass", "parts", "length", "contenders", "not_run", "speed_over"]
    assert written["speed_over"]["x"]["x"] == {"median": 1.0, "p20": 0.5, "p80": 2.0, "n": 3}
    assert written["contenders"]["x"]["wall_ms"]["median"] == 2.0 and written["length"] is None
    assert rows_of({"rows": [written]}, "rows", Row) == [row]
    assert row.speed("x", over="x") == ONE and row.speed("y", over="x") is None and row.speed("x", over="y") is None


def test_what_a_file_of_an_earlier_version_lacks_has_its_default():
    (row,) = rows_of({"long": [{"impl": "torch", "length": 5, "tensor_gib": 0.1, "old": 1}]}, "long", LongRow)
    assert row == LongRow(impl="torch", length=5, tensor_gib=0.1)
    (row,) = rows_of({"memory": [{"contender": "a", "mib": {}, "not_run": None}]}, "memory", MemoryRow)
    assert row == MemoryRow(contender="a")
    assert rows_of({}, "long", LongRow) == []


@pytest.mark.parametrize("row", [{}, None, 3, "text", {"shape": "causal", "length": 1}, {"contenders": []}])
def test_another_row_is_refused_in_one_line(row):
    with pytest.raises(LeapformerError, match="^time, row 0: expected a TimeRow, found .*$"):
        rows_of({"time": [row]}, "time", TimeRow)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_of_this_repository_print_and_draw(path):
    content = json.loads(path.read_text())
    assert content["benchmark"] in NAMES
    benchmark = load_benchmark(content["benchmark"])
    tables = benchmark.tables(content)
    assert any(table.rows for table in tables) and all(len(row) == len(t.columns) for t in tables for row in t.rows)
    names = [name for name, _ in benchmark.pictures(content)]
    assert all(name.startswith(content["benchmark"]) for name in names)
