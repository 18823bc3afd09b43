"""Pickles of others, read without running anything that they name.

A pickle may ask for any function to be called. Here it may ask for numpy arrays and numbers alone, and even those are
put together by the code below from their shape, dtype and bytes; numpy's own functions are never reached.

A pickle is looked through before it is read, as three of its operations can take any amount of memory, or the process
with
it: a place in its table of values that is far beyond the file, the length of bytes, and keys that are tuples of tuples.
What stands at several places is one value, as in the pickle; nothing is copied for each.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.files.expanding import largest_file
from leapformer.files.reading import read_bytes
from leapformer.files.showing import cut

_KINDS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"b1", "f4", "f8"}


def read_pickle(path: Path) -> Any:
    """What a pickle holds: numbers, text, bytes, lists, tuples, dictionaries and numpy arrays.

    Raises:
        LeapformerError: the file is missing, cut off, damaged, or asks for anything else.
    """
    content = read_bytes(path, largest=largest_file())
    try:
        tuples = _check_operations(content)
        kind = _Unpickler if tuples <= _MOST_TUPLES else _careful_unpickler()
        return _plain(kind(io.BytesIO(content), encoding="bytes").load(), {})
    except _Refused as error:
        raise LeapformerError(f"{path}: expected a pickle of numbers, text and arrays, found {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = cut(error, 100) or type(error).__name__
        raise LeapformerError(f"{path}: expected a whole pickle, found {reason}") from None


# ---- the operations of a pickle, without carrying them out

_MOST_TUPLES = 10_000  # in a file: so many inside one another still have a hash within any stack
# As many operations of a fixed length as there are, but those that the loop below looks at itself.
_FIXED = re.compile(
    rb"(?:[" + re.escape(b"()012}]NQRabdelosu") + rb"\x81\x88\x89\x8f-\x94\x97\x98]"
    rb"|[Khq\x80\x82].|[M\x83]..|[Jj\x84]....|[G\x95].{8})*+",
    re.DOTALL,
)
_TUPLES = b"t\x85\x86\x87"
_LENGTHS = {  # bytes of the length that follows, of operations with content of any length
    ord("U"): 1,
    ord("C"): 1,
    0x8C: 1,
    0x8A: 1,
    ord("T"): 4,
    ord("B"): 4,
    ord("X"): 4,
    0x8B: 4,
    0x8D: 8,
    0x8E: 8,
    0x96: 8,
}
_LINES = {ord(each): 1 for each in "FILSVPgp"} | {ord(each): 2 for each in "ci"}  # lines that follow


def _check_operations(content: bytes) -> int:
    """Look at each operation up to the end, and count those that make tuples.

    Raises:
        _Refused: one asks for more memory than the file has bytes.
        EOFError, ValueError: it is cut off, or no pickle.
    """
    position, tuples, size = 0, 0, len(content)
    while True:
        match = _FIXED.match(content, position)
        assert match is not None
        position = match.end()
        if position >= size:
            raise EOFError("pickle data was truncated")
        operation = content[position]
        position += 1
        if operation == ord("."):
            return tuples
        if operation in _TUPLES:
            tuples += 1
        elif operation == ord("r"):
            place = int.from_bytes(content[position : position + 4], "little")
            position += 4
            _check_size(place, size)
        elif operation in _LENGTHS:
            length = int.from_bytes(content[position : position + _LENGTHS[operation]], "little")
            position += _LENGTHS[operation] + length
            _check_size(length, size)
        elif operation in _LINES:
            for _ in range(_LINES[operation]):
                end = content.find(b"\n", position)
                if end < 0:
                    raise EOFError("pickle data was truncated")
                line, position = content[position:end], end + 1
            if operation == ord("p"):
                _check_size(int(line[:20]), size)
        else:
            raise ValueError(f"invalid load key, {chr(operation)!r}.")


def _check_size(asked: int, size: int) -> None:
    if not 0 <= asked <= size:
        raise _Refused(f"an operation that asks for {asked:,} bytes or values of {size:,}")


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
        if not isinstance(kind, _Kind) or not isinstance(data, bytes | bytearray):
            raise _Refused("an array of objects")
        self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _ARRAY_TYPE:
        raise _Refused("an array of another type")
    return _Array()


def _from_buffer(buffer: Any, kind: Any, shape: Any, order: Any) -> _Array:
    if not isinstance(buffer, bytes | bytearray):
        raise _Refused("an array of something else than bytes")
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", buffer))
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


class _Call:
    """A function that a pickle may call, and whose attributes it may not set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a change of a function")


_ARRAY_TYPE = _Call(lambda: None)  # what the name numpy.ndarray becomes; only `_reconstruct` takes it
_ALLOWED = {
    ("builtins", "bytes"): _Call(_no_bytes),
    ("__builtin__", "bytes"): _Call(_no_bytes),
    ("numpy", "dtype"): _Call(_Kind),
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("_codecs", "encode"): _Call(_encode),
    **{
        (f"numpy.{core}.{module}", name): _Call(stand_in)
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


def _careful_unpickler() -> Any:
    """The same in Python: for files of so many tuples that one as a key could be deeper than the stack of C."""

    base: Any = pickle._Unpickler  # type: ignore[attr-defined]

    class Careful(base):
        find_class = _Unpickler.find_class
        persistent_load = _Unpickler.persistent_load
        dispatch = dict(base.dispatch)

        def load_setitem(self) -> None:
            _check_keys(self.stack[-2:-1])
            super().load_setitem()

        def load_setitems(self) -> None:
            _check_keys(self.stack[::2])
            super().load_setitems()

        def load_dict(self) -> None:
            _check_keys(self.stack[::2])
            super().load_dict()

        def refuse(self) -> None:
            raise _Refused("a set")

        dispatch[pickle.SETITEM[0]] = load_setitem
        dispatch[pickle.SETITEMS[0]] = load_setitems
        dispatch[pickle.DICT[0]] = load_dict
        dispatch[pickle.ADDITEMS[0]] = dispatch[pickle.FROZENSET[0]] = refuse

    return Careful


def _check_keys(keys: list[Any]) -> None:
    if any(isinstance(key, tuple) for key in keys):
        raise _Refused("a tuple as a key")


_HOLDERS = (_Array, list, tuple, dict)


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """The arrays instead of what stood in for them, inside lists and dictionaries.

    Arguments:
        done: what lists, tuples and dictionaries became, by their identity.
    """
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, list | tuple | dict):
        if id(value) not in done:
            done[id(value)] = None  # of one that holds itself
            done[id(value)] = (
                {_key(key): _plain(entry, done) for key, entry in value.items()}
                if isinstance(value, dict)
                else [_plain(entry, done) if isinstance(entry, _HOLDERS) else entry for entry in value]
            )
        return done[id(value)]
    return value


def _key(key: Any) -> Any:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else key
