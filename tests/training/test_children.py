"""Children: several at a time, one failure ends no other, and none of them outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from leapformer.errors import LeapformerError
from leapformer.training.children import Children, Work, last_line, limited_threads

LIMIT = 60  # seconds that a busy machine may take


def work(folder: Path, name: str, program: str, **rest) -> Work:
    return Work(name, [sys.executable, "-c", program], folder / f"{name}.log", **rest)


def until(met: Callable[[], bool], children: Children | None = None) -> None:
    """Step until something is so."""
    deadline = time.monotonic() + LIMIT
    while not met():
        assert time.monotonic() < deadline
        if children is not None:
            children.step()
        time.sleep(0.01)


def waits_for(path: Path) -> str:
    return f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.01)"


def test_one_that_fails_ends_no_other(tmp_path):
    works = [
        work(tmp_path, "bad", "import sys; print('first'); sys.exit('leapformer: data.path: expected a file')"),
        work(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
        work(tmp_path, "good", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"),
    ]
    children = Children(works, 1, limited_threads(3))
    until(lambda: not children.step())
    assert children.done == ["good"] and not children.running and not children.waiting
    assert children.failed == {"bad": "data.path: expected a file", "killed": "ended by SIGKILL"}
    assert (tmp_path / "good.log").read_text() == "3 3\n"


def test_as_many_at_a_time_as_jobs(tmp_path):
    release = tmp_path / "release"
    children = Children([work(tmp_path, name, waits_for(release)) for name in "abc"], 2)
    children.step()  # they share what they prepare, and the first has that at once
    until(lambda: len(children.running) == 2, children)
    children.step()
    assert sorted(children.running) == ["a", "b"] and [each.name for each in children.waiting] == ["c"]
    release.touch()
    until(lambda: not children.step())
    assert sorted(children.done) == ["a", "b", "c"]


def test_what_is_shared_is_prepared_by_one(tmp_path):
    ready, release = tmp_path / "ready", tmp_path / "release"

    def shares(name: str, what: str) -> Work:
        return work(tmp_path, name, waits_for(release), shares=what, prepared=ready.exists)

    children = Children([shares("a", "text"), shares("b", "text"), shares("c", "other")], 3)
    for _ in range(3):
        children.step()
        assert list(children.running) == ["a"]  # nor does another one prepare something else beside it
    ready.touch()
    until(lambda: len(children.running) == 3, children)
    release.touch()
    until(lambda: not children.step())


def test_where_the_first_fails_the_next_one_prepares(tmp_path):
    works = [
        work(tmp_path, "a", "raise SystemExit(2)", shares="text", prepared=lambda: False),
        work(tmp_path, "b", "pass", shares="text", prepared=lambda: False),
    ]
    children = Children(works, 2)
    until(lambda: not children.step())
    assert (list(children.failed), children.done) == (["a"], ["b"])


def test_stopping_lets_them_save_and_starts_no_others(tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    children = Children([work(tmp_path, "a", program), work(tmp_path, "b", program)], 1)
    until(lambda: last_line(tmp_path / "a.log") == "ready", children)
    children.stop()
    until(lambda: not children.step())
    assert children.stopped == ["a"] and children.failed == {} and not (tmp_path / "b.log").exists()
    assert last_line(tmp_path / "a.log") == "saved"


def test_a_kill_ends_what_a_child_has_started_too(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    children = Children([work(tmp_path, "a", program)], 1)
    until(lambda: last_line(tmp_path / "a.log").isdigit(), children)
    children.kill()
    grandchild = int(last_line(tmp_path / "a.log"))
    until(lambda: not is_alive(grandchild))
    assert children.running == {}


def is_alive(process: int) -> bool:
    """Whether it is there, and no zombie that nobody has collected."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_child_stops_when_its_parent_is_killed(tmp_path):
    child = (
        "import os, signal, sys, time\n"
        "from leapformer.training.children import stop_with_parent\n"
        "stop_with_parent()\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    parent = (
        "import sys, time\nfrom pathlib import Path\n"
        "from leapformer.training.children import Children, Work\n"
        f"children = Children([Work('a', [sys.executable, '-c', {child!r}], Path({str(tmp_path / 'a.log')!r}))], 1)\n"
        "while children.step(): time.sleep(0.01)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    until(lambda: last_line(tmp_path / "a.log").isdigit())
    number = int(last_line(tmp_path / "a.log"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not is_alive(number))
    assert last_line(tmp_path / "a.log") == "saved"


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_bytes(b"x" * 40_000 + b"\n  1%|\r100%|\rleapformer: out of \xff luck\n\n")
    assert last_line(log) == "out of � luck"


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    children = Children([work(tmp_path / "nowhere", "a", "pass")], 1)
    with pytest.raises(LeapformerError, match="a.log: could not be written"):
        children.step()
