"""A short form of `make fuzz`, with a fixed seed: no case of any kind ends wrongly."""

from __future__ import annotations

import importlib

import pytest

from tests.fuzz.harness import KINDS, run


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_case_ends_wrongly(kind, tmp_path):
    count = importlib.import_module(f"tests.fuzz.{kind}").CASES["short"]
    tally = run(kind, count=count, seed=20261128, folder=tmp_path)
    assert tally.cases == count and not tally.faults, "\n".join(tally.lines())
    assert len(tally.ends) > 1, f"all cases ended alike: {tally.ends}"
