"""``impl="native"``: kernels in C++ for the CPU, loaded through ctypes. See docs/ops.md."""

from leapformer.ops.native import leap_operators, operators
from leapformer.ops.native.leap_operators import attend_leap
from leapformer.ops.native.library import reasons
from leapformer.ops.native.operators import attend

CUSTOM_OPS = (operators.CUSTOM_OPS, leap_operators.CUSTOM_OPS)

__all__ = ["CUSTOM_OPS", "attend", "attend_leap", "reasons"]
