"""The package's own build: with a compiler its wheel carries the native library, without one it does all the same."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = "leapformer/ops/native/libleapformer_native.so"

pytestmark = pytest.mark.requires_tool("scikit-build-core")


def build_wheel(folder: Path, *options: str, **environment: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder]
    subprocess.run([*command, *options, ROOT], env=os.environ | environment, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_without_a_compiler(tmp_path):
    wheel = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    names = wheel.namelist()
    assert LIBRARY not in names
    for name in (
        "py.typed",
        "ops/native/library.py",
        "recipes/lm/wikitext2-small.yaml",
        "analysis/report.html.j2",
        "tasks/simulst/grammar/lexicon.yaml",
    ):
        assert f"leapformer/{name}" in names
    assert any("leapformer = leapformer.cli:main" in wheel.read(n).decode() for n in names if "entry_points" in n)


@pytest.mark.requires_tool("c++ compiler")
@pytest.mark.requires_tool("cmake")
def test_with_a_compiler(tmp_path):
    wheel = build_wheel(tmp_path, "-C", "cmake.define.LEAPFORMER_BASELINE_ONLY=ON")
    assert not any("csrc" in name for name in wheel.namelist())
    library = ctypes.CDLL(wheel.extract(LIBRARY, tmp_path))
    library.leapformer_instruction_set.restype = ctypes.c_char_p
    assert library.leapformer_instruction_set() == b"baseline"
