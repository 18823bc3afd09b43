"""A contender in a process of its own, for what one process can't show: its peak memory, and another memory allocator.

The parent writes one JSON object a line, the worker answers with one:

    {"ask": "time", "calls": n}  ->  [cpu, wall], the mean seconds of a call
    {"ask": "memory"}            ->  MiB that the process needed at its peak beyond what it held before, or null
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from leapformer.bench.contenders import Contender, Shape
from leapformer.bench.timing import Sample, timed
from leapformer.training.machine import peak_memory_mib, reset_peak_memory

# glibc keeps what was freed instead of giving it back, so that large temporaries do not fault every page anew.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": "0"}
STATUS = Path("/proc/self/status")
WARM_UP = 64  # tokens of the call that loads everything before memory is looked at


class Worker:
    """The parent's end. Use it in a `with`; it ends the process.

    Arguments:
        contender: what runs.
        shape, length, backward: as for its `call`.
        threads: of PyTorch.
        environment: added to that of this process.
    """

    def __init__(
        self,
        contender: Contender,
        shape: Shape,
        length: int,
        *,
        backward: bool,
        threads: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        who = {"name": contender.name, "home": contender.home}
        job = {**who, "shape": asdict(shape), "length": length, "backward": backward, "threads": threads}
        self.errors = tempfile.TemporaryFile("w+")  # a file never fills up, as a pipe that nobody reads does
        self.process = subprocess.Popen(
            [sys.executable, "-m", "leapformer.bench.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            # It finds what this process does, wherever that was started.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the worker
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def time(self, calls: int) -> Sample:
        """A `Timer`. Raises RuntimeError if the worker died, of too little memory for instance."""
        return Sample(*self._ask({"ask": "time", "calls": calls}))

    def memory_mib(self) -> float | None:
        """Peak memory of one call; None where the system doesn't tell. Raises RuntimeError if the worker died."""
        return self._ask({"ask": "memory"})

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(how_it_ended(code, self.errors.read()))
        return json.loads(answer)


def how_it_ended(code: int, errors: str) -> str:
    """Why a measuring process gave no answer: the signal that ended it, or its code and the last line of its errors."""
    if code < 0:
        return f"the measuring process was ended by signal {-code}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no word of why")
    return f"the measuring process ended with code {code}: {last[:200]}"


def main(job: Mapping[str, Any]) -> None:
    """The worker's end."""
    torch.set_num_threads(job["threads"])
    end_me_first()
    contender: Contender = import_module(job["home"]).contender(job["name"])
    shape, backward = Shape(**job["shape"]), job["backward"]
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["ask"] == "memory":
            contender.call(shape, min(WARM_UP, job["length"]), backward=backward)()
        if run is None:
            run = contender.call(shape, job["length"], backward=backward)
        answer = timed(run, request["calls"]) if request["ask"] == "time" else call_memory_mib(run)
        print(json.dumps(answer), flush=True)


def call_memory_mib(run: Any) -> float | None:
    """MiB by which the process grows at most during one call, results included."""
    if not STATUS.is_file():
        return None
    try:  # what earlier calls freed would hide a part of this one's need
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass
    reset_peak_memory()
    before = peak_memory_mib()
    kept = run()
    after = peak_memory_mib()
    del kept
    return round(after - before, 2)


def end_me_first() -> None:
    """Where memory runs out, this process is the one to go, not what else the machine is doing."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        return


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
