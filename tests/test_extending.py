"""docs/extending.md: what it says to do works, and the files that it names are there.

Mechanisms, operator arguments and tasks are followed by the tests that the page names.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import torch
import typer

from leapformer.bench import benchmark
from leapformer.bench.result import Table
from leapformer.cli import main
from leapformer.cli.app import COMMANDS
from leapformer.cli.data_sets import DATA_SETS, DataSet
from leapformer.cli.late import needs
from leapformer.files.writing import write_text
from leapformer.nn import REWEIGHTINGS, build_attention
from leapformer.tasks.simulst.streaming import policy_registry
from leapformer.tasks.simulst.streaming.policy_requests import Read, Target, Turn, Write

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def text_of(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


# ---- the page


def test_every_path_that_the_page_names_is_there():
    paths = {path for path in re.findall(r"`([\w./-]+)`", PAGE) if "/" in path or path.endswith((".py", ".md"))}
    assert {"src/leapformer/cli/app.py", "tests/tasks/parity", "CHANGELOG.md"} <= paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_every_recipe_has_a_row_and_every_row_a_recipe():
    rows = re.findall(r"^\| \[([^]]+)\]\(#([^)]+)\)", PAGE, re.MULTILINE)
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert [heading.lower() for heading in headings] == [row for row, _ in rows]
    assert [anchor for _, anchor in rows] == [row.replace(" ", "-") for row, _ in rows]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"in `([A-Z_]+)`|`([A-Z_]+)` of `src", PAGE))))
def test_the_lists_that_the_page_names_are_where_it_says(name):
    (name,) = filter(None, name)
    homes = re.findall(rf"`{name}`\s+of\s+`(src/[^`]+)`", PAGE)
    for home in homes:
        assert re.search(rf"^{name}\b.*=", (ROOT / home).read_text(encoding="utf-8"), re.MULTILINE)


# ---- a re-weighting


class Turned:
    """The cosine again, with its terms the other way about."""

    rank = 2

    def factors_q(self, p: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.sin(p * torch.pi / 2), torch.cos(p * torch.pi / 2)], dim=-1)

    factors_k = factors_q


def test_a_reweighting_is_a_class_and_a_line(monkeypatch):
    monkeypatch.setitem(REWEIGHTINGS, "turned", Turned)
    outputs = []
    for name in ("turned", "cosine"):
        torch.manual_seed(0)
        layer = build_attention("leap", hidden_size=16, num_heads=2, reweighting=name)
        outputs.append(layer(torch.randn(2, 7, 16))[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_configurations_read_the_table_of_reweightings():
    """In a process of its own, as where the line stands in the file."""
    program = (
        "from leapformer.nn import reweighting; reweighting.REWEIGHTINGS['again'] = reweighting.Cosine\n"
        "import torch; from leapformer.models import LeapformerConfig, LeapformerForCausalLM\n"
        "config = LeapformerConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,"
        " reweighting='again')\n"
        "print(tuple(LeapformerForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape))\n"
        "try: LeapformerConfig(reweighting='never')\n"
        "except Exception as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "(1, 3, 9)" in ran.stdout and "again" in ran.stdout.splitlines()[-1]


# ---- a policy


@dataclass(frozen=True)
class WriteAfter:
    """Write when so many chunks are read."""

    chunks: int

    keep_mass = False

    def turn(self, target: Target) -> Turn:
        while target.is_open:
            if target.chunks < self.chunks and not target.source_ended:
                yield Read()
            yield Write()


def test_a_policy_is_a_class_and_an_entry(monkeypatch, capsys):
    option = policy_registry.Option("after", "chunks to read first", 3, 1, argument="chunks")
    entry = policy_registry.PolicyEntry(
        "write-after", f"{__name__}:WriteAfter", (option,), writes="late", sees="all", takes="one step a token"
    )
    monkeypatch.setitem(policy_registry.POLICIES, entry.name, entry)
    for command in ("translate", "evaluate"):
        assert "write-after: chunks to read first; default 3." in " ".join(text_of(capsys, command, "--help").split())
    assert policy_registry.parse_policy("write-after", {"after": "7"}) == WriteAfter(7)
    assert "--after: expected an option of wait-k" in refusal(capsys, "translate", "run", "file", "--after", "2")
    monkeypatch.undo()
    assert "--after" not in text_of(capsys, "translate", "--help")


# ---- a data set


def prepare_letters(*, output: Path, letters: int = 2, **general: Any) -> dict[str, Any]:
    """A text of so many letters."""
    general["progress"](1, 1, "letters")
    output.mkdir(parents=True)
    write_text(output / "text.txt", "abcdefgh"[:letters])
    return {"bad_rows": [], "letters": letters}


def tell_letters(card: Any, output: Path) -> Iterator[str]:
    yield f"{card['letters']} letters in {output}"


def test_a_data_set_is_a_function_and_an_entry(monkeypatch, capsys, tmp_path):
    entry = DataSet(
        "letters",
        "The first letters.",
        f"{__name__}:prepare_letters",
        extra="lm",
        tell=tell_letters,
        options={"letters": Annotated[int | None, typer.Option(min=1, max=8, help="How many.")]},
    )
    monkeypatch.setitem(DATA_SETS, entry.name, entry)
    assert "The first letters." in text_of(capsys, "data", "prepare", "--help")
    shown = text_of(capsys, "data", "prepare", "letters", "--help")
    assert "--letters" in shown and "--output" in shown and "--min-length" not in shown
    output = tmp_path / "x"
    arguments = ["data", "prepare", "letters", "--output", str(output)]
    assert text_of(capsys, *arguments, "--letters", "3") == f"3 letters in {output}\n"
    assert (output / "text.txt").read_text() == "abc"
    assert "'--letters'" in refusal(capsys, *arguments, "--letters", "9")
    assert "letters: --size is not an option of this data set" in refusal(capsys, *arguments, "--size", "3")
    others = ["data", "prepare", "lra-text", "--output", "x", "--letters", "3"]
    assert "lra-text: --letters is not an option of this task" in refusal(capsys, *others)
    assert "letters" in refusal(capsys, "data", "prepare", "bogus", "--output", "x")


# ---- a benchmark


@dataclass(frozen=True)
class Square:
    """A row: a number and its square."""

    number: int
    square: int


def measure_squares(bench: benchmark.Bench) -> None:
    for number in bench.settings.lengths_or([1, 2, 3], [1, 2]):
        bench.say(f"{number}")
        bench.result.add("squares", Square(number, number**2))


def square_tables(content: Any) -> list[Table]:
    rows = [[str(row["number"]), str(row["square"])] for row in content["squares"]]
    return [Table("Squares", ["number", "square"], rows)]


def test_a_benchmark_is_a_module_and_a_name(monkeypatch, capsys, tmp_path):
    module: Any = ModuleType("leapformer.bench.squares")
    module.BENCHMARK = benchmark.Benchmark(measure_squares, square_tables, lambda content: iter(()))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(benchmark, "NAMES", (*benchmark.NAMES, "squares"))
    said = text_of(capsys, "bench", "squares", "--quick", "--lengths", "3,12", "--output", str(tmp_path / "x"))
    assert re.search(r"12\s+144", said)
    assert "| 12 | 144 |" in (tmp_path / "x" / "squares.md").read_text()
    assert '"square": 144' in (tmp_path / "x" / "squares.json").read_text()
    assert "squares, found 'cubes'" in refusal(capsys, "bench", "cubes")


# ---- a command


@needs("lm", "json")
def greet(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of whom.")],
    times: Annotated[int, typer.Option(min=1, max=9, help="How often.")] = 1,
) -> None:
    """Say hello."""
    typer.echo(f"Hello {name}! " * times)


@needs("plots", "no_such_package_at_all")
def lacking() -> None:
    """Something that is not installed."""


def test_a_command_is_a_function_and_a_line(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "greet", greet)
    monkeypatch.setitem(COMMANDS, "plot nothing", lacking)
    assert re.search(r"greet +Say hello\.", text_of(capsys, "--help"))
    assert "nothing" in text_of(capsys, "plot", "--help") and "nothing" not in text_of(capsys, "--help")
    assert text_of(capsys, "greet", "you", "--times", "2") == "Hello you! Hello you! \n"
    assert "'--times'" in refusal(capsys, "greet", "you", "--times", "0")
    assert "pip install 'leapformer[plots]'" in refusal(capsys, "plot", "nothing")
