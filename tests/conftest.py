"""What every test shares: tests that need a tool of the machine, and the list at the end of what was skipped."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

MISSING_TOOL = "missing tool: "


def has_cpp_compiler() -> bool:
    """What the default backend of torch.compile needs on the CPU: a C++ compiler and Python's own headers."""
    compiler = os.environ.get("CXX", "g++")
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def has_native_library() -> bool:
    """The kernels of impl="native", which the install builds where it finds a C++ compiler."""
    from leapformer.ops import available_impls

    return not available_impls()["native"]


TOOLS: dict[str, Callable[[], bool]] = {
    "c++ compiler": has_cpp_compiler,
    "native library": has_native_library,
    "cmake": lambda: shutil.which("cmake") is not None,
    "triton": lambda: find_spec("triton") is not None,
    "scikit-build-core": lambda: find_spec("scikit_build_core") is not None,
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `requires_tool(name)` where the tool is missing."""
    for marker in item.iter_markers("requires_tool"):
        (tool,) = marker.args
        if tool not in TOOLS:
            raise pytest.UsageError(f"{item.nodeid}: requires_tool({tool!r}): expected one of {sorted(TOOLS)}")
        if not TOOLS[tool]():
            pytest.skip(MISSING_TOOL + tool)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skipped report, without pytest's "Skipped: "."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every skipped test with its reason; `.ci/run` reads these lines."""
    skipped = terminalreporter.getreports("skipped")
    if not skipped:
        return
    terminalreporter.section("skipped, by name")
    for report in sorted(skipped, key=lambda report: report.nodeid):
        terminalreporter.line(f"SKIPPED {report.nodeid}: {skip_reason(report)}")
