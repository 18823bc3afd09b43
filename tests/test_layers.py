"""The layers of the package: each imports only from its left, and the base install needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import leapformer

PACKAGE = Path(leapformer.__file__).parent
LAYERS = ["ops", "nn", "models", "training", "tasks", "cli"]
MAY_IMPORT = {layer: set(LAYERS[: place + 1]) for place, layer in enumerate(LAYERS)}
MAY_IMPORT["analysis"] = {*LAYERS[:-1], "analysis"}
MAY_IMPORT["bench"] = {*LAYERS[:-1], "analysis", "bench"}
MAY_IMPORT["cli"] |= {"analysis", "bench"}
MAY_IMPORT["errors"] = set()
for layer in MAY_IMPORT:  # reading and writing files, which needs no other part
    MAY_IMPORT[layer] |= {"files"}
MAY_IMPORT["files"] = {"files"}
MAY_IMPORT["__main__"] = {"cli"}
# `leapformer` itself hands out the public names of these, and only these.
MAY_IMPORT["__init__"] = {"ops", "nn", "models"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer a source file belongs to: its first folder, or its own name at the top level."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Each module that a source file imports anywhere, type checking included, as (line, absolute dotted name)."""
    package = ["leapformer", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from leapformer import nn` names the layer only after the import.
            for alias in node.names if module == "leapformer" else []:
                yield node.lineno, f"leapformer.{alias.name}"
            yield node.lineno, module


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    """Each layer of leapformer that a source file imports."""
    for line, module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "leapformer" and len(parts) > 1 and parts[1] in MAY_IMPORT and parts[1] != "errors":
            yield line, parts[1]


def test_every_source_file_belongs_to_a_layer():
    assert {layer_of(path) for path in SOURCES} <= set(MAY_IMPORT)


def test_each_layer_imports_only_from_its_left():
    back_edges = [
        f"{path.relative_to(PACKAGE)}:{line}: {layer_of(path)} imports {layer}"
        for path in SOURCES
        for line, layer in imported_layers(path)
        if layer not in MAY_IMPORT[layer_of(path)]
    ]
    assert back_edges == []


def imports_within(path: Path, names: set[str]) -> set[str]:
    """The modules of the package that a source file imports, within functions too: a late import is still one."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["leapformer", *package][: len(package) + 2 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= (inner & names) or {module}
    return found & names


def circles(sources: Sequence[Path]) -> list[list[str]]:
    """Modules that import each other, directly or by way of others: groups of them, sorted."""
    modules = {
        ".".join(["leapformer", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sources
    }
    graph = {name: imports_within(path, {*modules}) - {name} for name, path in modules.items()}

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    after = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in after[name] if name in after[other])) for name in graph}
    return [list(group) for group in sorted(groups) if group]


def test_no_modules_import_each_other():
    assert circles(SOURCES) == []


def test_a_circle_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    texts = {"one.py": "from leapformer import two", "two.py": "def f():\n    from .three import g", "four.py": ""}
    for name, text in {**texts, "three.py": "import leapformer.one\nimport leapformer.four"}.items():
        (tmp_path / name).write_text(text + "\n")
    names = ["leapformer.one", "leapformer.three", "leapformer.two"]
    assert circles(sorted(tmp_path.glob("*.py"))) == [names]


# The GPU kernels are written in Triton, which PyTorch for GPUs brings; nothing imports them before they are to run.
USES = {"ops/triton": {"triton"}}


def test_base_install_layers_import_torch_and_the_standard_library_only():
    allowed = {"torch", "leapformer", *sys.stdlib_module_names}
    foreign = [
        f"{path.relative_to(PACKAGE)}:{line}: {module}"
        for path in SOURCES
        if layer_of(path) in {"ops", "nn", "errors", "__init__"}
        for line, module in imported_modules(path)
        if module.split(".")[0] not in allowed | USES.get(path.parent.relative_to(PACKAGE).as_posix(), set())
    ]
    assert foreign == []


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    """The checks above read what they should: a relative import of another layer counts as one of it."""
    source = tmp_path / "ops" / "sub" / "module.py"
    source.parent.mkdir(parents=True)
    source.write_text("from ...nn import blocks\nfrom ..api import door\nfrom leapformer import models\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert [layer for _, layer in imported_layers(source)] == ["nn", "ops", "models"]


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in memory after a statement in a fresh interpreter."""
    program = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"accelerate", "datasets", "matplotlib", "pandas", "pydantic", "rich", "tensorboard", "transformers", "triton"}


def test_import_leapformer_loads_nothing_heavy():
    assert loaded_after("import leapformer") & (HEAVY | {"torch"}) == set()


def test_ops_and_nn_load_no_extra():
    assert loaded_after("import leapformer.ops, leapformer.nn") & HEAVY == set()


def test_the_command_starts_without_torch_and_transformers():
    assert loaded_after("import leapformer.cli") & {"torch", "transformers", "matplotlib", "datasets"} == set()


@pytest.mark.parametrize("name", leapformer.__all__)
def test_public_names_are_fetched_on_first_use(name):
    assert getattr(leapformer, name) is not None
    assert name in dir(leapformer)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        leapformer.no_such_name  # noqa: B018
