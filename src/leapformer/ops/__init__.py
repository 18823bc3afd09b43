"""Linear attention as functions on tensors: no parameters, no models. See docs/ops.md."""

from leapformer.ops.api import (
    AttentionOutput,
    LeapWeights,
    available_impls,
    cosine_factors,
    leap_attention,
    linear_attention,
    linear_state,
    proportion,
)
from leapformer.ops.channels import channel_decay_attention
from leapformer.ops.delta import delta_attention
from leapformer.ops.lowering import angle_factors
from leapformer.ops.state import LinearState
from leapformer.ops.visibility import Staircase

__all__ = [
    "AttentionOutput",
    "LeapWeights",
    "LinearState",
    "Staircase",
    "angle_factors",
    "available_impls",
    "channel_decay_attention",
    "cosine_factors",
    "delta_attention",
    "leap_attention",
    "linear_attention",
    "linear_state",
    "proportion",
]
