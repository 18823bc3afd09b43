"""The compiled library: where it lies, whether it fits, and whose threads it uses."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import torch

from leapformer.ops.arguments import Arguments

NAME = "libleapformer_native.so"
ELSEWHERE = "LEAPFORMER_NATIVE"  # environment variable: a library that was built otherwise, as for the sanitizers
INTERFACE_VERSION = 4

# What csrc/interface.h calls Problem, in its order: 19 integers, eps, and addresses and strides.
PROBLEM = struct.Struct("19qd79q")

# torch's OpenMP runtime may be any of these.
OPENMP = ("libgomp", "libomp", "libiomp5")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    path = Path(os.environ.get(ELSEWHERE) or Path(__file__).parent / NAME)
    if not path.exists():
        return None, "leapformer was installed without its native library (no C++ compiler was found)"
    try:
        library = ctypes.CDLL(str(path))
        library.leapformer_problem_size.restype = ctypes.c_int64
        library.leapformer_instruction_set.restype = ctypes.c_char_p
        found = library.leapformer_interface_version(), library.leapformer_problem_size()
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded: {error}"
    if found != (INTERFACE_VERSION, PROBLEM.size):
        return None, f"the native library {path} is of another version; install leapformer again"
    for name in ("forward", "backward", "step"):
        getattr(library, f"leapformer_{name}").argtypes = [ctypes.c_char_p]
        getattr(library, f"leapformer_{name}").restype = ctypes.c_int
    library.leapformer_limit_memory.argtypes = [ctypes.c_int64]
    _share_threads(library)
    return library, ""


def openmp_runtimes() -> list[Path]:
    """The OpenMP runtimes that this process has mapped."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if line.count("/")}
        return sorted(Path(p) for p in paths if Path(p).name.startswith(OPENMP))
    return sorted(p for p in (Path(torch.__file__).parent / "lib").glob("lib*omp*.dylib") if p.name.startswith(OPENMP))


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the kernels run on the threads that torch already has: a second pool beside it would halve both."""
    for path in openmp_runtimes():
        runtime = ctypes.CDLL(str(path))
        names = ("GOMP_parallel", "__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")
        addresses = [ctypes.cast(getattr(runtime, n), ctypes.c_void_p) if hasattr(runtime, n) else None for n in names]
        if addresses[0] or all(addresses[1:]):
            library.leapformer_use_threads.argtypes = [ctypes.c_void_p] * 4
            library.leapformer_use_threads(*addresses)
            return


LIBRARY, MISSING = _load()

_forked = False


def _after_fork() -> None:
    # The threads of an OpenMP pool do not survive a fork, and the pool does not notice: entering it would wait for
    # ever.
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads a call may use."""
    return 1 if _forked else torch.get_num_threads()


def reasons(x: Arguments | None = None) -> list[str]:
    """Why the kernels can't run here, or for a call; empty where they can."""
    found = [MISSING] if LIBRARY is None else []
    if x is not None:
        q = x.q
        if q.device.type != "cpu":
            found.append(f"expected tensors on the CPU, got {q.device}")
        if q.dtype not in (torch.float32, torch.bfloat16):
            found.append(f"expected dtype torch.float32 or torch.bfloat16, got {q.dtype}")
    return found


def instruction_set() -> str:
    """Which kernels this machine runs: "avx512", "avx2" or "baseline"; "" without the library."""
    return "" if LIBRARY is None else LIBRARY.leapformer_instruction_set().decode()


def use_instruction_set(name: str) -> None:
    """Run another instruction set's kernels from now on (for tests); ValueError where this machine can't."""
    if LIBRARY is None or not LIBRARY.leapformer_use_instruction_set(name.encode()):
        raise ValueError(f"instruction set: expected one that this machine has, got {name!r}")


def limit_memory(size: int) -> None:
    """Let the kernels' allocations of more than ``size`` bytes fail from now on, or none where it is 0 (for tests)."""
    if LIBRARY is not None:
        LIBRARY.leapformer_limit_memory(size)
