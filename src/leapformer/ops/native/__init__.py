"""``impl="native"``: kernels in C++ for the CPU, loaded through ctypes. See docs/ops.md."""

from leapformer.ops.native.library import reasons
from leapformer.ops.native.operators import IMPLEMENTATION, OPERATOR

__all__ = ["IMPLEMENTATION", "OPERATOR", "reasons"]
