"""Commands that run beside one another, each in a process of its own, so that one that fails ends no other.

A child has a session of its own: Ctrl-C reaches the parent alone, which asks its children to stop. The pipe at a
child's standard input ends with the parent, however that ends; `stop_with_parent` in the child waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut

TAIL = 16_384  # bytes of a log in which its last line is looked for
# Of PyTorch, numpy's libraries and the tokenizers.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Work:
    """What a child does.

    Attributes:
        name: what it is called.
        command: program and arguments.
        log: the file to which its outputs are appended.
        shares: what it prepares. Until one child has prepared that, others that share something new wait.
        prepared: tells whether this child has done so.
    """

    name: str
    command: Sequence[str]
    log: Path
    shares: Hashable = None
    prepared: Callable[[], bool] = lambda: True


@dataclass
class Children:
    """Works in their order, a few at a time; `step` has to be called again and again.

    Arguments:
        works: each with another name.
        jobs: how many at a time.
        environment: of the children.

    Attributes:
        running: processes by name. done: names. failed: the last line of the log by name. stopped: names of those
            that ended because they were asked to.
    """

    works: Sequence[Work]
    jobs: int
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        self.waiting = list(self.works)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.done: list[str] = []
        self.failed: dict[str, str] = {}
        self.stopped: list[str] = []
        self._works = {work.name: work for work in self.works}
        self._shared: set[Hashable] = set()
        self._stopping = False

    def step(self) -> bool:
        """Collect those that have ended, and start what may start; whether anything is left to do.

        Raises:
            LeapformerError: a log can't be written, or no process be started.
        """
        for name, process in list(self.running.items()):
            code = process.poll()
            if code is not None:
                self._collect(name, code)
            elif self._works[name].prepared():
                self._shared.add(self._works[name].shares)
        if not self._stopping:
            self._start_more()
        return bool(self.running) or (bool(self.waiting) and not self._stopping)

    def stop(self) -> None:
        """Ask all to stop, and start no others."""
        self._stopping = True
        for process in self.running.values():
            process.terminate()

    def kill(self) -> None:
        """End what still runs at once, with all processes that it started."""
        for process in self.running.values():
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _close(process)
        self.running.clear()

    def _start_more(self) -> None:
        preparing = any(self._works[name].shares not in self._shared for name in self.running)
        for work in list(self.waiting):
            if len(self.running) >= self.jobs:
                return
            if work.shares in self._shared or not preparing:
                preparing |= work.shares not in self._shared
                self.waiting.remove(work)
                self.running[work.name] = self._start(work)

    def _start(self, work: Work) -> subprocess.Popen[bytes]:
        try:
            with work.log.open("ab") as log:
                return subprocess.Popen(
                    work.command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise LeapformerError(f"{cut(work.log, 240)}: could not be written ({error.strerror or error})") from error

    def _collect(self, name: str, code: int) -> None:
        _close(self.running.pop(name))
        if code == 0:
            self._shared.add(self._works[name].shares)
            self.done.append(name)
        elif self._stopping:
            self.stopped.append(name)
        else:
            line = last_line(self._works[name].log)
            self.failed[name] = line if code > 0 else f"ended by {_signal_name(-code)}{line and f', after: {line}'}"


def _close(process: Any) -> None:
    with suppress(OSError):
        process.stdin.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_line(path: Path) -> str:
    """The last line of a log that is not empty, without the name of the command before it; "" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return cut(lines[-1].removeprefix("leapformer: "), 400) if lines else ""


def limited_threads(threads: int | None) -> dict[str, str]:
    """The environment of a child with so many threads of its libraries; None: that of this process."""
    return dict(os.environ) if threads is None else {**os.environ, **dict.fromkeys(THREADS, str(threads))}


def stop_with_parent() -> None:
    """In a child: get SIGTERM, as of a system that shuts down, when the parent is gone."""

    def wait() -> None:
        while os.read(0, 4096):  # not through sys.stdin, whose lock a thread may not hold when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
