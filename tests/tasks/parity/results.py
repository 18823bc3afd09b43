"""What the results of parity are."""

from __future__ import annotations

from leapformer.training.results import LOSS, Metric, TaskResults

_RIGHT = Metric("right", "right", 1, factor=100.0, unit="%", better="higher", said="{} % right")

RESULTS = TaskResults(unit="examples", headline=_RIGHT, columns=(_RIGHT, LOSS), compared=(_RIGHT,))
