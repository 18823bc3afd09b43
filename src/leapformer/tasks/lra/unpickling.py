"""Pickles of others, read without running anything that they name.

A pickle may ask for any function to be called. Here it may ask for numpy arrays and numbers alone, and even those are
put together by the code below from their shape, dtype and bytes; numpy's own functions are never reached.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from leapformer.errors import LeapformerError

_KINDS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"b1", "f4", "f8"}


def read_pickle(path: Path) -> Any:
    """What a pickle holds: numbers, text, bytes, lists, tuples, dictionaries and numpy arrays.

    Raises:
        LeapformerError: the file is missing, cut off, damaged, or asks for anything else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LeapformerError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except _Refused as error:
        raise LeapformerError(f"{path}: expected a pickle of numbers, text and arrays, found {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise LeapformerError(f"{path}: expected a whole pickle, found {reason}") from None


class _Refused(Exception):
    """The pickle names something that is not allowed."""


class _Kind:
    """Stands in for numpy.dtype: an integer or float of a known size."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name
        if self.name not in _KINDS:
            raise _Refused(f"the dtype {str(self.name)[:20]!r}")
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise _Refused(f"the byte order {str(order)[:20]!r}")
        self.order = order

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.name)


class _Array:
    """Stands in for numpy.ndarray."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        data = data.encode("latin-1") if isinstance(data, str) else data
        if not isinstance(kind, _Kind) or not isinstance(data, bytes):
            raise _Refused("an array of objects")
        self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _ArrayType:
    """What the name numpy.ndarray becomes; only `_reconstruct` takes it."""


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _ArrayType:
        raise _Refused("an array of another type")
    return _Array()


def _from_buffer(buffer: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", bytes(buffer)))
    return array


def _scalar(kind: Any, data: Any) -> Any:
    data = data.encode("latin-1") if isinstance(data, str) else data
    if not isinstance(kind, _Kind) or not isinstance(data, bytes):
        raise _Refused("a number of another type")
    (value,) = np.frombuffer(data, kind.dtype).tolist()
    return value


def _encode(text: str, encoding: Any) -> bytes:
    """Python 3 writes bytes in old protocols as text and a call of this name."""
    if encoding not in ("latin1", b"latin1"):
        raise _Refused(f"the encoding {str(encoding)[:20]!r}")
    return text.encode("latin-1")


def _no_bytes(*arguments: Any) -> bytes:
    """And empty bytes as a call without arguments."""
    if arguments:
        raise _Refused("bytes of another kind")
    return b""


_ALLOWED = {
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _ArrayType,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"the name {module}.{name}"[:80])
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent id")


def _plain(value: Any) -> Any:
    """The arrays instead of what stood in for them, inside lists and dictionaries."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {_key(key): _plain(entry) for key, entry in value.items()}
    return value


def _key(key: Any) -> Any:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else key
