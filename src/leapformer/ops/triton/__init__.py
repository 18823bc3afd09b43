"""``impl="triton"``: kernels for GPUs. See docs/ops.md. Triton itself is imported at the first call."""

from leapformer.ops.triton.limits import reasons
from leapformer.ops.triton.operator import IMPLEMENTATION, OPERATOR

__all__ = ["IMPLEMENTATION", "OPERATOR", "reasons"]
