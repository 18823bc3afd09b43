"""Skipped tests can't hide: the suite names them, and `.ci/run` fails on one whose tool is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SUITE = """
import pytest

@pytest.mark.requires_tool("c++ compiler")
def test_compiled():
    pass

@pytest.mark.requires_tool("c++ compliler")
def test_misspelt():
    pass
"""


def run_suite(folder: Path, *arguments: str, **environment: str) -> str:
    """The output of pytest over SUITE, with our conftest.py."""
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = requires_tool(name)\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    ).stdout


def test_a_missing_tool_is_listed_by_name(tmp_path):
    output = run_suite(tmp_path, "-k", "compiled", CXX="no-such-compiler")
    assert "SKIPPED test_suite.py::test_compiled: missing tool: c++ compiler\n" in output
    assert "1 skipped" in output


def test_a_misspelt_tool_is_an_error(tmp_path):
    output = run_suite(tmp_path, "-k", "misspelt")
    assert "requires_tool('c++ compliler'): expected one of ['c++ compiler'" in output
    assert "skipped" not in output


@pytest.fixture
def ci(tmp_path):
    """Runs a copy of `.ci/run` against a `make` that prints the given lines and exits with the given code."""

    def run(lines: list[str], *, code: int = 0, compiler: str = "bash") -> subprocess.CompletedProcess[str]:
        for folder in (".ci", "bin", ".venv/bin"):
            (tmp_path / folder).mkdir(parents=True)
        shutil.copy(TESTS.parent / ".ci" / "run", tmp_path / ".ci" / "run")
        # Any Python with its headers will do, and none has to have them: `exit 0` says that they are there.
        for name, body in {
            "bin/make": "cat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {code}",
            ".venv/bin/python": "",
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CXX": compiler}
        return subprocess.run([tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)

    return run


CLOSING = "===== 3 passed, 1 skipped in 1.23s ====="
SKIP = "SKIPPED tests/test_x.py::test_compiled: missing tool: c++ compiler"


def test_ci_ends_with_the_closing_line(ci):
    run = ci(["===== 3 passed in 1.23s ====="])
    assert run.returncode == 0
    assert run.stdout.splitlines()[-1] == "===== 3 passed in 1.23s ====="


def test_ci_accepts_a_skip_where_the_tool_is_missing(ci):
    assert ci([SKIP, CLOSING], compiler="no-such-compiler").returncode == 0


def test_ci_refuses_a_skip_where_the_tool_is_there(ci):
    run = ci([SKIP, CLOSING])
    assert run.returncode == 1
    assert "the tool 'c++ compiler' is here, and yet: " + SKIP in run.stderr


def test_ci_refuses_a_skip_for_a_tool_it_does_not_know(ci):
    run = ci([SKIP.replace("c++ compiler", "abacus"), CLOSING])
    assert run.returncode == 1
    assert "don't know how to look for the tool 'abacus'" in run.stderr


def test_ci_refuses_a_skip_of_the_kernels_where_a_compiler_is(ci):
    skip = SKIP.replace("c++ compiler", "native library")
    assert ci([skip, CLOSING]).returncode == 1


def test_ci_accepts_a_skip_of_the_kernels_without_a_compiler(ci):
    skip = SKIP.replace("c++ compiler", "native library")
    assert ci([skip, CLOSING], compiler="no-such-compiler").returncode == 0


def test_ci_hands_on_the_failure_of_make(ci):
    run = ci(["===== 1 failed in 1.23s ====="], code=2)
    assert run.returncode == 2
    assert run.stdout.splitlines()[-1] == "===== 1 failed in 1.23s ====="
