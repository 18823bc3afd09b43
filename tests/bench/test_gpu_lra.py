"""`benchmarks/gpu_lra.sh`: which runs it starts, with a Python in its place that only writes down what it was asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_lra.sh"
STAND_IN = """#!/bin/bash
if [ "$1" = -c ]; then exit {has_gpu}; fi
echo "$@" >> {log}
"""


def run(tmp_path, *, has_gpu: bool, tasks=("text", "image"), **environment):
    python, data = tmp_path / "python", tmp_path / "data"
    python.write_text(STAND_IN.format(has_gpu=0 if has_gpu else 1, log=tmp_path / "log"))
    python.chmod(0o755)
    for task in tasks:
        (data / f"lra-{task}").mkdir(parents=True)
        (data / f"lra-{task}" / "card.json").write_text("{}")
    environment = {"PYTHON": str(python), **environment}
    command = [SCRIPT, data, tmp_path / "runs"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_every_task_with_data_and_every_mechanism_then_the_table(tmp_path):
    done = run(tmp_path, has_gpu=True, MECHANISMS="leap softmax", AT_ONCE="1")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    asked = [(line[line.index("--tasks") + 1], line[line.index("--attention") + 1]) for line in lines]
    assert asked == [*((t, m) for t in ("text", "image") for m in ("leap", "softmax")), ("text,image", "leap,softmax")]
    assert [line[-1] == "--only-table" for line in lines] == [False] * 4 + [True]
    assert {line[line.index("--output") + 1] for line in lines} == {str(tmp_path / "runs")}
    assert f"{tmp_path / 'data'}/lra-listops: not there, left out" in done.stderr


def test_nothing_is_started_when_the_time_is_over(tmp_path):
    done = run(tmp_path, has_gpu=True, MINUTES="1")
    assert done.returncode == 0 and (tmp_path / "log").read_text().count("leapformer lra") == 1  # the table


def test_without_a_gpu_or_data_it_says_so_and_exits_with_2(tmp_path):
    done = run(tmp_path, has_gpu=False)
    assert done.returncode == 2 and "expected a Python with PyTorch and a GPU" in done.stderr
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / "empty", has_gpu=True, tasks=())
    assert done.returncode == 2 and "expected prepared data" in done.stderr
