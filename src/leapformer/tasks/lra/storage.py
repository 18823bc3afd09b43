"""Prepared examples on disk: one safetensors file for each split, written as a stream and read through a memory map.

N: examples, D: documents (N, or fewer where examples share documents), n: tokens of all documents.

tokens    uint8 [n]      all documents, one after another
offsets   int64 [D + 1]  document d is tokens[offsets[d] : offsets[d + 1]]
labels    uint8 [N]
pairs     int32 [N, 2]   only with two documents to an example: which ones
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from leapformer.errors import LeapformerError

TEMPORARY_PREFIX = ".writing-"

_HEADER_BYTES = 1024  # kept free at the start of a file, as the sizes are known only at its end
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
        self._temporary = path.with_name(TEMPORARY_PREFIX + path.name)
        self._file = self._temporary.open("wb")
        self._file.write(bytes(_HEADER_BYTES))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

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
        self._file.close()
        os.replace(self._temporary, self.path)


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
        LeapformerError: the file is missing, cut off or not of this layout.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if not 0 < length <= min(size, 1 << 20):
                raise ValueError("its header is too long")
            entries = json.loads(file.read(length))
            start = 8 + length
            arrays = {name: _map(path, entry, start, size) for name, entry in entries.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise LeapformerError(f"{path}: expected prepared data, found no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LeapformerError(f"{path}: expected whole prepared data (safetensors), found {error}") from None
    missing = {"tokens", "offsets", "labels"} - arrays.keys()
    if missing:
        raise LeapformerError(f"{path}: expected the arrays tokens, offsets and labels, found no {min(missing)}")
    offsets = arrays["offsets"]
    if offsets.shape == (0,) or offsets[-1] != arrays["tokens"].shape[0]:
        raise LeapformerError(f"{path}: offsets: expected them to end at {len(arrays['tokens'])} tokens")
    return arrays


def _map(path: Path, entry: Mapping[str, object], start: int, size: int) -> np.ndarray:
    dtype, shape = _NUMPY[str(entry["dtype"])], tuple(entry["shape"])  # type: ignore[arg-type]
    begin, end = entry["data_offsets"]  # type: ignore[misc]
    if start + end > size:
        raise ValueError(f"{size:,} of at least {start + end:,} bytes")
    if end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError(f"{end - begin:,} bytes for the shape {list(shape)}")
    if begin == end:  # nothing to map
        return np.zeros(shape, dtype)
    array = np.memmap(path, dtype=dtype, mode="r", offset=start + begin, shape=shape)
    return array if dtype.itemsize == 1 else np.array(array)
