"""What is asked for and can't be: ranges of options, outputs that are no files, pipes, terminals, a full memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import leapformer.cli as cli
from leapformer.cli import main
from leapformer.cli.printing import print_table
from leapformer.cli.train import default_name
from tests.analysis.builders import write_run, write_translation_run


@pytest.fixture
def run(tmp_path) -> str:
    return str(write_run(tmp_path, "leap"))


def refusal(capsys, *arguments: str) -> str:
    """The one line of a call that must end with 2."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("leapformer: ") and error.count("\n") == 1 and len(error) <= 1000
    return error


LARGE = str(10**18)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["generate", "RUN", "x", "--temperature", "1e-40"], "from 0.001 to 1,000"),
        (["generate", "RUN", "x", "--temperature", "nan"], "from 0.001 to 1,000"),
        (["generate", "RUN", "x", "--temperature", "-1"], "from 0.001 to 1,000"),
        (["generate", "RUN", "x", "--top-p", "nan"], "'--top-p'"),
        (["generate", "RUN", "x", "--seed", str(10**30)], "'--seed'"),
        (["generate", "RUN", "x", "--seed", "-1"], "'--seed'"),
        (["generate", "RUN", "x", "--tokens", LARGE], "'--tokens'"),
        (["generate", "RUN", "x", "--tokens", "9" * 5000], "'--tokens'"),
        (["generate", "RUN", "x", "--threads", "1000000000"], "'--threads'"),
        (["evaluate", "RUN", "--limit", LARGE], "'--limit'"),
        (["evaluate", "RUN", "--context-window", LARGE], "'--context-window'"),
        (["translate", "RUN", "x", "--k", LARGE], "--k: expected an integer from 0 on, up to 9,999,999"),
        (
            ["translate", "RUN", "x", "--policy", "local-agreement", "--agreement", LARGE],
            "--agreement: expected an integer",
        ),
        (["translate", "RUN", "x", "--policy", "align-att", "--frames", LARGE], "--frames: expected an integer"),
        (["plot", "latency", "RUN", "--draws", LARGE], "'--draws'"),
        (["data", "prepare", "lra-listops", "--output", "x", "--count", str(10**15)], "'--count'"),
        (["data", "prepare", "lra-listops", "--output", "x", "--seed", str(10**30)], "'--seed'"),
        (["data", "prepare", "lra-listops", "--output", "x", "--workers", LARGE], "'--workers'"),
        (["data", "prepare", "lra-listops", "--output", "x", "--max-length", LARGE], "'--max-length'"),
        (["lra", "--seeds", LARGE], "'--seeds'"),
        (["lra", "--budget", LARGE], "'--budget'"),
        (["bench", "attention", "--repeats", LARGE], "'--repeats'"),
        (["bench", "attention", "--limit", "nan"], "--limit"),
        (["bench", "attention", "--lengths", LARGE], "--lengths: expected whole numbers up to 999,999,999"),
        (["bench", "attention", "--lengths", "9" * 5000], "--lengths"),
        (["bench", "x" * 5000], "bench: expected all"),
        (["train", "x" * 5000], "unknown recipe"),
        (["train", "lm/pydocs-tiny", "x" * 5000], "expected key=value"),
        (["train", "lm/pydocs-tiny", f"max_steps={10**30}"], "training.max_steps"),
        (["lra", "--tasks", "x" * 5000], "--tasks"),
        (["lra", "--size", "x" * 5000], "--size"),
        (["data", "prepare", "x" * 5000, "--output", "x"], "data prepare: expected one of"),
    ],
)
def test_no_option_asks_for_more_than_can_be(capsys, monkeypatch, tmp_path, run, arguments, found):
    monkeypatch.chdir(tmp_path)
    assert found in refusal(capsys, *(run if each == "RUN" else each for each in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["leap"]


@pytest.mark.parametrize("value", ["", "a\0b", "x" * 5000, "/dev/full", "FILE", "FILE/x", "PIPE"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "lm/pydocs-tiny", "--output"],
        ["lra", "--only-table", "--output"],
        ["bench", "attention", "--quick", "--output"],
        ["demo", "--output"],
        ["data", "prepare", "lra-listops", "--count", "1", "--output"],
        ["plot", "latency", "RUN", "--output"],
        ["plot", "proportions", "RUN", "--output"],
    ],
)
def test_a_folder_that_cannot_be_made(capsys, monkeypatch, tmp_path, run, arguments, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    value = value.replace("FILE", str(tmp_path / "file")).replace("PIPE", str(tmp_path / "pipe"))
    line = refusal(capsys, *(run if each == "RUN" else each for each in arguments), value)
    assert "--output" in line or "zero bytes" in line
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "leap", "pipe"]


@pytest.mark.parametrize("value", ["", "a\0b", "x" * 5000, "/dev/full", "/", "FOLDER", "PIPE", "RUN/results.json/x"])
def test_a_page_that_cannot_be_written(capsys, tmp_path, run, value):
    os.mkfifo(tmp_path / "pipe")
    before = os.stat("/dev/full").st_rdev
    value = value.replace("FOLDER", str(tmp_path)).replace("PIPE", str(tmp_path / "pipe")).replace("RUN", run)
    refusal(capsys, "compare", run, "--output", value)
    assert os.stat("/dev/full").st_rdev == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leap", "pipe"]


@pytest.mark.parametrize("folder", ["", "a\0b", "x" * 5000, "/dev/full", "/etc/passwd", "/etc/passwd/x", "/"])
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate"],
        ["compare"],
        ["generate", "TEXT"],
        ["translate", "TEXT"],
        ["plot", "latency"],
        ["plot", "proportions"],
    ],
)
def test_what_is_no_run(capsys, command, folder):
    words = [each for each in command if each != "TEXT"]
    refusal(capsys, *words, folder, *(["text"] if "TEXT" in command else []))


def test_a_name_that_is_too_long_for_a_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a line\n" * 100)
    overrides = [f"data.path={'./' * 150}text.txt", "data.source=text"]
    assert len(default_name("lm/pydocs-tiny", overrides)) > 255
    assert "File name too long" in refusal(capsys, "train", "lm/pydocs-tiny", *overrides)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_names_are_no_markup_and_move_no_cursor(capsys, tmp_path):
    print_table(
        ["model [/]"],
        [
            [
                "[/b]a[red]",
            ],
            ["$x$ :smile:"],
        ],
    )
    output = capsys.readouterr().out
    assert "model [/]" in output and "[/b]a[red]" in output and ":smile:" in output
    assert "\\x1b[31m" in refusal(capsys, "evaluate", "\x1b[31mred\nline")
    odd = write_translation_run(tmp_path, "a [/x] $\\bad$ _b", "$\\frac$")
    assert main(["compare", str(odd), "--output", str(tmp_path / "page.html")]) == 0


def test_an_output_that_nobody_reads():
    program = "import sys; from leapformer.cli import main; sys.exit(main(['recipes']))"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_terminal_that_has_ascii_alone(tmp_path):
    runs = [str(write_run(tmp_path / str(seed), "leap", seed=seed)) for seed in (0, 1)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    program = "import sys; from leapformer.cli import main; sys.exit(main(sys.argv[1:]) or main(['compare', 'é']) - 2)"
    command = [sys.executable, "-c", program, "compare", *runs]
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 0 and b"1.6000" in ended.stdout and rb"\xe9: expected" in ended.stderr


def test_a_path_that_is_no_utf8(capsys, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(folder)
    refusal(capsys, "evaluate", folder)
    assert "expected text in UTF-8" in refusal(capsys, "generate", str(tmp_path), "\udcff")
    assert "expected text, found" in refusal(capsys, "train", "lm/pydocs-tiny", "data.path=\udcff", "source=text")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "the memory of this machine does not suffice"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "suffice",
        ),
        (OSError(5, "Input/output error", "runs/a"), "runs/a: Input/output error"),
        (OSError(24, "Too many open files"), "Too many open files"),
    ],
)
def test_faults_of_the_machine_are_one_line(capsys, monkeypatch, error, line):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert line in refusal(capsys, "recipes")


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault"), ValueError("x"), RecursionError("x"), UnicodeDecodeError("x", b"", 0, 1, "y")]
)
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, error):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(type(error)):
        main(["recipes"])


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_launcher_that_counts_wrongly(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "x" * 500)
    assert f"{name}: expected a number" in refusal(capsys, "lra", "--output", str(tmp_path / "out"))
