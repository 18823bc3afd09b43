"""What several project files say must be said the same everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import leapformer

ROOT = Path(__file__).parent.parent


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    name = re.sub(r"[-_.]+", "-", package).lower()
    match = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match, f"constraints.txt does not pin {package}"
    return match[1]


def test_pre_commit_runs_the_pinned_ruff():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"rev: v(\S+)", config) == [pinned("ruff")]


def test_torch_is_pinned_without_a_build_suffix():
    assert pinned("torch") == "2.13.0"


def test_direct_dependencies_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [requirement for name in extras if name != "all" for requirement in extras[name]]
    requirements = [r for r in [*project["dependencies"], *requirements] if not r.startswith("leapformer[")]
    for requirement in requirements:
        assert pinned(re.split(r"[\[<>=]", requirement)[0])


def test_version_is_cited_and_logged():
    version = leapformer.__version__
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "dev" in version and "## [Unreleased]" in changelog or f"## [{version}]" in changelog
