"""What several tests of the Long-Range Arena share."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapformer.errors import LeapformerError
from leapformer.tasks.lra.preparation import prepare


def fails(match: str, *arguments, **keywords) -> None:
    """`prepare` must say so in one line, and leave nothing that looks whole."""
    with pytest.raises(LeapformerError, match=match) as caught:
        prepare(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    assert not (Path(arguments[1]) / "card.json").exists()


def spread(share: float, n: int, *, measured_on: float = float("inf"), deviations: float = 4.0) -> float:
    """How far a share of n examples may lie from one that was itself measured on so many examples."""
    return deviations * (share * (1 - share) * (1 / n + 1 / measured_on)) ** 0.5
