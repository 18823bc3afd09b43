"""Large results on large pages: the same tensors as `new_empty` makes, and fewer page faults where Linux has such
pages.
"""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from leapformer.ops import memory

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("shape", ((), (0, 3), (3, 5), (1024, 1025)))
@pytest.mark.parametrize("dtype", (None, torch.float64))
def test_is_new_empty(shape, dtype):
    like = torch.ones(2, dtype=torch.bfloat16)
    found, expected = memory.new_empty(like, shape, dtype), like.new_empty(shape, dtype=dtype or like.dtype)
    assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert found.fill_(3).eq(3).all()


def test_fake_tensors_stay_fake():
    with FakeTensorMode():
        assert memory.new_empty(torch.ones(2), (2**12, 2**12)).shape == (2**12, 2**12)


@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="this machine lends no large pages")
def test_a_large_result_asks_for_large_pages():
    tensor = memory.new_empty(torch.ones(1), (64 * 2**20,))
    address = tensor.data_ptr() + 2**21  # the first bytes may share a mapping with a neighbour
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif line.startswith("VmFlags:") and inside:
            flags = line.split()[1:]
    assert flags is not None and "hg" in flags
