"""Triton's interpreter, made right where we need it. Importing this changes Triton in the running process only.

Triton 3.6 with NumPy 2.4: a one-element array no longer becomes an integer by itself, a conversion to bfloat16 cuts
bits off where the GPU rounds, and every call of a device function wraps all of Triton's functions once more, each time
slower.
"""

from __future__ import annotations

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor
_convert = interpreter._convert_float
_scopes: list = []
_patched: set[str] = set()


class _Scope:
    """What a launch restores at its end: everything that was wrapped during it."""

    def restore(self) -> None:
        while _scopes:
            _scopes.pop().restore()
        _patched.clear()


def _patch_once(function):
    modules = {m.__name__ for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)}
    if not modules <= _patched:
        _patched.update(modules)
        _scopes.append(_patch_lang(function))
    return _Scope()


def _patch_index(tensor, scope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert_rounded(data, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        bits = data.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return _convert(data, source, target, rounding)


interpreter._patch_lang = _patch_once
interpreter._patch_lang_tensor = _patch_index
interpreter._convert_float = _convert_rounded
