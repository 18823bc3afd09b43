"""Fixtures of the operator tests."""

import pytest
import torch

from tests.ops import oracle

IMPLEMENTATIONS = ("reference", "torch", pytest.param("native", marks=pytest.mark.requires_tool("native library")))


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, monkeypatch):
    if request.param == "native":
        monkeypatch.setattr(oracle, "nearest", oracle.FLOAT32)
    return request.param


@pytest.fixture(params=("reference", "torch"))
def float64_impl(request):
    """Those that gradcheck, which needs float64, can look at."""
    return request.param


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN, so that a value which was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
