"""Everything that is launched, and what it is launched with. Imported only where it is used: nothing else needs
Triton."""

from leapformer.ops.triton.leap import leap_gradients, scores
from leapformer.ops.triton.loading import ALL, CAUSAL, COUNTS, Shape, Side, Span
from leapformer.ops.triton.states import scan_states, segment_states
from leapformer.ops.triton.step import step
from leapformer.ops.triton.sweeps import (
    decay_gradients,
    diagonal_sums,
    feature_gradients,
    features_against,
    numerator_gradients,
    read,
    read_against,
)

__all__ = [
    "ALL",
    "CAUSAL",
    "COUNTS",
    "Shape",
    "Side",
    "Span",
    "decay_gradients",
    "diagonal_sums",
    "feature_gradients",
    "features_against",
    "leap_gradients",
    "numerator_gradients",
    "read",
    "read_against",
    "scan_states",
    "scores",
    "segment_states",
    "step",
]
