"""Prepared examples on disk: one safetensors file for each split, written as a stream and read through a memory map.

N: examples, D: documents (N, or fewer where examples share documents), n: tokens of all documents.

tokens    uint8 [n]      all documents, one after another
offsets   int64 [D + 1]  document d is tokens[offsets[d] : offsets[d + 1]]
labels    uint8 [N]
pairs     int32 [N, 2]   only with two documents to an example: which ones
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.files.reading import parse_json
from leapformer.files.showing import cut, shown
from leapformer.files.writing import staged_file

_HEADER_BYTES = 1024  # kept free at the start of a file, as the sizes are known only at its end
_LONGEST_HEADER = 1 << 20
# Of each array: types that can be read, and dimensions.
_LAYOUT = {
    "tokens": (("U8",), 1),
    "offsets": (("I64", "I32", "U8"), 1),
    "labels": (("U8",), 1),
    "pairs": (("I32", "I64"), 2),
}
_DTYPES = {"uint8": "U8", "int32": "I32", "int64": "I64"}
_NUMPY = {name: np.dtype(kind).newbyteorder("<") for kind, name in _DTYPES.items()}


class SplitWriter:
    """Writes the examples of one split to `path`, under a temporary name up to `close`.

    As a context manager it closes the file, or removes it where an error ends the block.
    """

    def __init__(self, path: Path, *, two_documents: bool = False) -> None:
        self.path = path
        self.labels: list[int] = []
        self.lengths: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self._two_documents = two_documents
        self._stack = ExitStack()
        self._file = self._stack.enter_context(staged_file(path))
        self._file.write(bytes(_HEADER_BYTES))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def add_document(self, tokens: bytes) -> int:
        """Append a document and return its number."""
        self._file.write(tokens)
        self.lengths.append(len(tokens))
        return len(self.lengths) - 1

    def add(self, tokens: bytes, label: int) -> None:
        """Append an example of one document."""
        self.add_document(tokens)
        self.labels.append(label)

    def add_pair(self, first: int, second: int, label: int) -> None:
        """Append an example of two documents, by their numbers."""
        self.pairs.append((first, second))
        self.labels.append(label)

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> None:
        """Append examples of one document each: uint8 [n], integers [N], integers [N]."""
        self._file.write(np.ascontiguousarray(tokens, dtype=np.uint8).data)
        self.lengths.extend(lengths.tolist())
        self.labels.extend(labels.tolist())

    def close(self) -> None:
        """Write what is left and give the file its name."""
        self.__exit__(None, None, None)

    def _finish(self) -> None:
        arrays = {
            "offsets": np.concatenate([[0], np.cumsum(np.array(self.lengths, dtype=np.int64))]).astype(np.int64),
            "labels": np.array(self.labels, dtype=np.uint8),
        }
        if self._two_documents:
            arrays["pairs"] = np.array(self.pairs, dtype=np.int32).reshape(-1, 2)
        tokens = self._file.tell() - _HEADER_BYTES
        entries = {"tokens": ("uint8", (tokens,))}
        for name, array in arrays.items():
            self._file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
            entries[name] = (array.dtype.name, array.shape)
        self._file.seek(0)
        self._file.write(_header(entries))


def _header(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The start of a safetensors file, filled up with spaces to the size that was kept free."""
    described, end = {}, 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        described[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    return struct.pack("<Q", _HEADER_BYTES - 8) + text.ljust(_HEADER_BYTES - 8)


def write_examples(path: Path, documents: Iterable[bytes], labels: Iterable[int]) -> None:
    """Write examples of one document each."""
    with SplitWriter(path) as writer:
        for document, label in zip(documents, labels, strict=True):
            writer.add(document, label)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; `tokens` is a read-only memory map, the small ones are in memory.

    Raises:
        LeapformerError: the file is missing, cut off or not of this layout, or its arrays do not fit each other.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if not 0 < length <= min(size, _LONGEST_HEADER):
                raise ValueError("its header is too long")
            text = file.read(length).decode("utf-8")
        entries = parse_json(text, where="its header")
        if not isinstance(entries, dict):
            raise ValueError(f"a header that is {shown(entries)}")
        entries.pop("__metadata__", None)
        arrays = {name: _map(path, name, entry, 8 + length, size) for name, entry in entries.items() if name in _LAYOUT}
        for name in sorted({"tokens", "offsets", "labels"} - arrays.keys()):
            raise LeapformerError(f"{path}: expected the arrays tokens, offsets and labels, found no {name}")
        _check_arrays(arrays)
    except FileNotFoundError:
        raise LeapformerError(f"{path}: expected prepared data, found no such file") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise LeapformerError(f"{path}: expected whole prepared data (safetensors), found {cut(error, 160)}") from None
    except LeapformerError as error:
        if str(error).startswith(str(path)):
            raise
        raise LeapformerError(f"{path}: expected whole prepared data (safetensors): {error}") from None
    return arrays


def _map(path: Path, name: str, entry: Any, start: int, size: int) -> np.ndarray:
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    kinds, dimensions = _LAYOUT[name]
    if kind not in kinds or len(shape) != dimensions:
        raise ValueError(f"{name} of the type {shown(kind)} with {len(shape)} dimensions")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} of the shape {shown(list(shape))} at {shown([begin, end])}")
    if start + end > size:
        raise ValueError(f"{size:,} of at least {start + end:,} bytes")
    dtype = _NUMPY[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin:,} bytes for the shape {shown(list(shape))}")
    if begin == end:  # nothing to map
        return np.zeros(shape, dtype)
    array = np.memmap(path, dtype=dtype, mode="r", offset=start + begin, shape=shape)
    return array if name in ("tokens", "labels") else np.array(array, dtype=np.int64)


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    offsets, tokens, labels, pairs = (arrays.get(name) for name in ("offsets", "tokens", "labels", "pairs"))
    assert offsets is not None and tokens is not None and labels is not None
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
        raise LeapformerError(f"offsets: expected them to end at {len(tokens)} tokens, rising from 0, found others")
    documents = len(offsets) - 1
    if pairs is None and len(labels) != documents:
        raise LeapformerError(f"labels: expected {documents:,}, one a document, found {len(labels):,}")
    if pairs is not None and (pairs.shape != (len(labels), 2) or not ((pairs >= 0) & (pairs < documents)).all()):
        raise LeapformerError(f"pairs: expected [{len(labels):,}, 2] numbers of {documents:,} documents, found others")
