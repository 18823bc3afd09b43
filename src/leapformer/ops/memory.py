"""Memory for large results on large pages.

A result of 32 MiB is 8,192 pages of 4 KiB, each of them a page fault when it is first written and many misses of the
address cache afterwards: a tenth of the time of attention over 16k tokens. Linux lends pages of 2 MiB to whom asks for
them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGE = 4 * 2**20  # bytes; smaller results stay in the allocator's own memory, which has been written before


def _find_madvise() -> Callable[..., int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


_madvise = _find_madvise()


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``, on large pages where it is large and the machine has them."""
    result = like.new_empty(shape, dtype=like.dtype if dtype is None else dtype)
    size = result.numel() * result.element_size()
    # A fake tensor, as compilers use, has no memory.
    if _madvise is not None and size >= LARGE and type(result) is Tensor and result.device.type == "cpu":
        start = result.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice: where it is refused, nothing is lost. Pages shared with a neighbour at either end may have it too.
        _madvise(start, result.data_ptr() + size - start, mmap.MADV_HUGEPAGE)
    return result
