"""Commands that are killed at a random moment, or inside a rename or a write, and then given again.

A training, an evaluation and a preparation of data each run in a fork of a process that has loaded everything, is
killed there by SIGKILL, SIGTERM or SIGINT once or twice, and run once more. They must then end, with what they write
equal, to the bit, to what they write undisturbed. Whatever has its own name in between must be whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.harness import Wrong

SECONDS = 400
CASES = {"short": 8, "full": 150}
LONGEST = 120  # seconds of a child, on a machine that has other work
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# How an interrupted command may end: by the signal, by a stop that saves, or before it came.
CODES = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, 143, 0}
MEASURED = {"seconds", "tokens_per_second", "peak_memory_mib", "machine", "versions", "git"}  # what differs in any case


@dataclass(frozen=True)
class Kill:
    """When a child is killed: by its parent after `moment` seconds, or by itself at the n-th rename or write.

    Arguments:
        event: "rename", "write" (opening a file to write into), or "moment".
        number: of the event, counted from 1.
        after: a rename: when it is done instead of before.
    """

    event: str
    signal: int
    number: int = 0
    after: bool = False
    moment: float = 0.0


@dataclass(frozen=True)
class Child:
    """How a command ended in a child: its exit code, negative for a signal, its seconds, its events and its output."""

    code: int
    seconds: float
    events: dict[str, int]
    output: str


@dataclass(frozen=True)
class Command:
    """What is run.

    Attributes:
        arguments: of the command leapformer, in a folder.
        folder: below that one: what it writes.
        needs: the command whose result it needs, undisturbed.
        outcome: everything that has to be equal, read from the folder and from the output.
    """

    arguments: Callable[[Path], Sequence[str]]
    folder: str
    outcome: Callable[[Path, str], dict[str, Any]]
    needs: str | None = None


def case(seed: int, number: int, folder: Path) -> str:
    draw = random.Random(f"kills {seed} {number}")
    name = draw.choice(["train", "train", "train", "evaluate", "prepare"])
    command, (expected, undisturbed) = COMMANDS[name], _undisturbed(name, folder)
    _set_up(folder)
    if command.needs is not None:
        _finish(COMMANDS[command.needs], folder)
    ends = []
    for _ in range(draw.choice([1, 1, 2])):
        kill = _draw_kill(draw, undisturbed)
        ended = _run(command, folder, kill)
        if ended.code not in CODES:
            raise Wrong(f"{name}: {kill}: ended with {ended.code}: {_last(ended.output)}")
        _check_names(folder)
        ends.append(_state(name, folder, expected))
        if ends[-1] == "ended all the same":
            break
    if ends[-1] != "ended all the same" or name != "train":
        output = _finish(command, folder)
    else:
        output = ""
    found = command.outcome(folder, output)
    differing = [key for key in expected if found.get(key) != expected[key]] + [
        key for key in found if key not in expected
    ]
    if differing:
        raise Wrong(f"{name}: after {' and '.join(ends)}: {differing[0]} is not that of an undisturbed command")
    return f"{name}: {ends[-1]}, equal"


def _undisturbed(name: str, folder: Path) -> tuple[dict[str, Any], Child]:
    """The outcome of a command that nobody kills, and how it ran; once in a process, in the same folder as all
    cases.
    """
    if name not in _known:
        command = COMMANDS[name]
        _set_up(folder)
        if command.needs is not None:
            _finish(COMMANDS[command.needs], folder)
        ended = _run(command, folder, None)
        if ended.code != 0:
            raise Wrong(f"{name}: undisturbed, it ended with {ended.code}: {_last(ended.output)}")
        _known[name] = command.outcome(folder, ended.output), ended
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return _known[name]


_known: dict[str, tuple[dict[str, Any], Child]] = {}


def _draw_kill(draw: random.Random, undisturbed: Child) -> Kill:
    event, number = draw.choice(["rename", "write", "moment"]), draw.choice(SIGNALS)
    if event == "moment" or not undisturbed.events[event]:
        return Kill("moment", number, moment=draw.uniform(0, undisturbed.seconds))
    return Kill(event, number, number=draw.randint(1, undisturbed.events[event]), after=draw.random() < 0.5)


def _finish(command: Command, folder: Path) -> str:
    """Run a command to its end; its output."""
    ended = _run(command, folder, None)
    if ended.code != 0:
        raise Wrong(f"{command.folder}: given again, it ended with {ended.code}: {_last(ended.output)}")
    return ended.output


def _check_names(folder: Path) -> None:
    """What has its own name is whole: JSON can be read, and files are those that their checksums are of."""
    from leapformer.files.checksums import check_sums
    from leapformer.files.reading import read_json

    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".json":
            read_json(path)
        if path.is_dir():
            check_sums(path)


def _state(name: str, folder: Path, expected: dict[str, Any]) -> str:
    """What a killed command has left."""
    if name == "train":
        if (folder / "run" / "results.json").is_file():
            return "ended all the same"
        return "resumed" if list((folder / "run" / "checkpoints").glob("checkpoint-*")) else "began anew"
    if name == "prepare" and (folder / "data" / "card.json").is_file():
        return "ended all the same"
    return "went on" if (folder / "data").exists() else "given again"


# ---- the commands


def _set_up(folder: Path) -> None:
    """The recipe and its text."""
    from tests.training.builders import tiny_content

    content = tiny_content(folder)
    content["model"] |= {"hidden_size": 8, "num_hidden_layers": 2}
    content["training"] |= {"max_steps": 10, "log_every": 3, "eval_every": 4, "save_every": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def _of_run(folder: Path, output: str) -> dict[str, Any]:
    """Losses, weights and results of a run, and that nothing else is left in its folder."""
    from leapformer.files.locking import LOCK
    from leapformer.training.run import Run

    run = Run(folder / "run")
    results = {key: value for key, value in run.results().items() if key not in MEASURED}
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in run.metrics()]
    # A stop that saves leaves a checkpoint which an undisturbed run has not; the last one is the same.
    places = [run.checkpoints()[-1], run.model_path]
    files = [path for place in places for path in place.iterdir() if path.suffix in (".safetensors", ".pt", ".pth")]
    return {
        "results.json": results,
        "metrics.jsonl": rows,
        # Of a kill behind the last write the lock's file is left, which holds nothing and is in nobody's way.
        "leftovers": sorted(path.name for path in run.path.rglob(".*") if path.name != LOCK),
        **{str(path.relative_to(folder)): path.read_bytes() for path in files},
    }


def _of_evaluation(folder: Path, output: str) -> dict[str, Any]:
    figures = [line for line in output.splitlines() if line.split(" ")[0] in ("loss", "perplexity", "bits_per_byte")]
    return {"figures": figures, **_of_run(folder, output)}


def _of_data(folder: Path, output: str) -> dict[str, Any]:
    data = folder / "data"
    return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}


COMMANDS = {
    "train": Command(lambda at: ["train", str(at / "tiny.yaml"), "--output", str(at / "run")], "run", _of_run),
    "evaluate": Command(lambda at: ["evaluate", str(at / "run"), "--split", "train"], "run", _of_evaluation, "train"),
    "prepare": Command(
        lambda at: [
            *("data", "prepare", "lra-listops", "--output", str(at / "data"), "--count", "40", "--workers", "1"),
            *("--min-length", "20", "--max-length", "60"),
        ],
        "data",
        _of_data,
    ),
}


# ---- children


@cache
def _load() -> None:
    """Load all that a command needs, before the first fork. Nothing is computed here: no thread may have started."""

    import leapformer.cli.app
    import leapformer.tasks.lm.task
    import leapformer.tasks.lra.preparation
    import leapformer.training.train  # noqa: F401


def _run(command: Command, folder: Path, kill: Kill | None) -> Child:
    """Run a command in a fork of this process."""
    _load()
    told, tell = os.pipe()
    log = folder.with_name("output.txt")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(told)
            code = _in_child(command.arguments(folder), folder, log, kill, tell)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(tell)
    if kill is not None and kill.event == "moment":
        time.sleep(kill.moment)
        os.kill(child, kill.signal)  # it can't have been waited for yet
    with os.fdopen(told, "rb") as pipe:
        events = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counts = json.loads(events) if events else {}
    return Child(code, time.monotonic() - began, counts, log.read_text(encoding="utf-8", errors="replace"))


def _in_child(arguments: Sequence[str], folder: Path, log: Path, kill: Kill | None, tell: int) -> int:
    import torch

    from leapformer.cli import main

    signal.alarm(LONGEST)  # whatever happens to the parent
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if stream == 1 else os.O_APPEND)), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    events = {"rename": 0, "write": 0}
    _watch(events, folder, kill)
    code = main(arguments)
    os.write(tell, json.dumps(events).encode())
    return code


def _watch(events: dict[str, int], folder: Path, kill: Kill | None) -> None:
    """Count the renames and writes below a folder, and end this process at the one that `kill` names."""

    def count(event: str) -> bool:
        events[event] += 1
        return kill is not None and kill.event == event and kill.number == events[event]

    def end() -> None:
        assert kill is not None
        os.kill(os.getpid(), kill.signal)

    def renaming(original: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **rest: Any) -> None:
            now = str(target).startswith(str(folder)) and count("rename")
            if now and kill is not None and not kill.after:
                end()
            original(source, target, **rest)
            if now and kill is not None and kill.after:
                end()

        return rename

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(folder)):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR) and count("write"):
                end()

    os.rename, os.replace = renaming(os.rename), renaming(os.replace)
    sys.addaudithook(hook)


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
