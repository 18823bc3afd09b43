"""Runs numbered cases in processes of their own, counts how they end, and lists what ended wrongly.

A kind of cases is a module beside this one with

    case(seed, number, folder) -> str    one case, made from the two numbers alone; `folder` is empty and its own
    SECONDS: int                         that a case may take
    CASES: dict[str, int]                how many are run: "short" in the tests, "full" by `make fuzz`

A case returns how it ended in a few words, such as "right" or "refused in one line", which are counted. It raises
`Wrong` where a result is not what it should be. Any other exception is a fault too, and so is a process that dies,
takes longer, or takes more memory than `MEMORY_MIB` beyond what it began with.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("operators", "readers", "run_folders", "kills")
MEMORY_MIB = 2048
START_SECONDS = 120  # that a process may take until its first case begins
ROOT = Path(__file__).parents[2]


class Wrong(AssertionError):
    """A case ended in a wrong result."""


@dataclass
class Tally:
    """What came of some cases.

    Attributes:
        ends: how many ended in which way.
        faults: what ended wrongly: the number of the case, and why in one line.
    """

    kind: str
    seed: int
    ends: Counter = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.ends.total() + len(self.faults)

    def lines(self) -> list[str]:
        """The tally in words."""
        ends = ", ".join(f"{count:,} {end}" for end, count in self.ends.most_common())
        first = (
            f"{self.kind}: {self.cases:,} cases of seed {self.seed}: {ends or 'none ended'}; {len(self.faults)} faults"
        )
        again = f"python -m tests.fuzz {self.kind} --seed {self.seed} --only"
        return [first, *(f"  {why} ({again} {number})" for number, why in self.faults)]


def run(
    kind: str, *, count: int, seed: int, folder: Path, first: int = 0, jobs: int = 1,
    told: Callable[[int], None] = lambda done: None,
) -> Tally:  # fmt: skip
    """Run the cases `first` to `first + count - 1` of a kind, in `jobs` processes at a time."""
    tally, lock = Tally(kind, seed), threading.Lock()
    numbers = [list(range(first + job, first + count, jobs)) for job in range(jobs)]

    def work(own: list[int], place: Path) -> None:
        while own:
            ended = _run_some(kind, seed, own, place)
            with lock:
                for end in ended:
                    if end.fault is None:
                        tally.ends[end.outcome] += 1
                    else:
                        tally.faults.append((end.number, end.fault))
                told(tally.cases)
            del own[: len(ended)]

    threads = [
        threading.Thread(target=work, args=(own, folder / f"job-{job}")) for job, own in enumerate(numbers) if own
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.faults.sort()
    return tally


@dataclass
class _End:
    number: int
    outcome: str
    fault: str | None = None


def _run_some(kind: str, seed: int, numbers: list[int], folder: Path) -> list[_End]:
    """Cases in one process, up to 200 or to the first that it does not survive."""
    limit = importlib.import_module(f"tests.fuzz.{kind}").SECONDS
    numbers = numbers[:200]
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder / "errors.txt"
    ended: list[_End] = []
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", kind, str(seed), str(folder), *map(str, numbers)],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream, text=True,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        wait = START_SECONDS
        try:
            while len(ended) < len(numbers):
                line = lines.get(timeout=wait)
                wait = limit
                if line is None:
                    code = process.wait()
                    ended.append(_End(numbers[len(ended)], "", f"its process ended with code {code}: {_last(errors)}"))
                    break
                told = json.loads(line)
                if told.get("ready"):
                    continue
                ended.append(_End(told["number"], told["outcome"], told["fault"]))
                if told["fault"] and "MiB" in told["fault"]:
                    break  # the peak stays: a new process for the next
        except queue.Empty:
            ended.append(_End(numbers[len(ended)], "", f"it took longer than {wait} seconds"))
        finally:
            process.kill()
            process.wait()
            reader.join()
            if process.stdout is not None:
                process.stdout.close()
    return ended


def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _last(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
