"""What a command imports: little to start with, and everything that it names is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import leapformer.cli
from leapformer.cli.data_sets import DATA_SETS
from leapformer.cli.late import load
from leapformer.errors import MissingExtra

FILES = sorted(Path(leapformer.cli.__file__).parent.glob("*.py"))
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "datasets", "tqdm"}


@pytest.mark.parametrize("command", ["--help", "recipes", "train --help", "data prepare lra-text --help"])
def test_the_command_is_quick_to_start(command):
    program = (
        "import sys, io; from leapformer.cli import main; out, sys.stdout = sys.stdout, io.StringIO(); "
        "code = main(sys.argv[1:]); print(*{name.split('.')[0] for name in sys.modules}, file=out); sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", program, *command.split()], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "leapformer" in loaded and loaded & HEAVY == set()


def named_modules() -> set[str]:
    """The modules that the commands name as texts, for the decorator `needs` and the function `load`."""
    texts = (
        node.value
        for file in FILES
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("needs", "load")
        for node in call.args[1:]
        if isinstance(node, ast.Constant)
    )
    return {text for text in texts if isinstance(text, str)}


def test_the_modules_that_commands_name_are_there():
    names = named_modules()
    assert {"rich.table", "leapformer.training.train", "leapformer.tasks.registry"} <= names
    for name in names:
        import_module(name)


def test_the_work_of_every_data_set_is_there():
    for entry in DATA_SETS.values():
        module, _, function = entry.work.partition(":")
        assert callable(getattr(import_module(module), function))


def test_a_missing_package_is_told_by_its_extra_and_a_missing_part_of_leapformer_is_a_fault(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingExtra, match="'tqdm'.*leapformer\\[lra\\]"):
        load("lra", "json", "tqdm")
    with pytest.raises(ModuleNotFoundError, match="leapformer.nowhere"):
        load("lm", "leapformer.nowhere")
