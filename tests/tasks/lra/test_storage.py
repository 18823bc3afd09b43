"""Prepared files: safetensors that other programs read, and one line about a file that is not whole."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from leapformer.errors import LeapformerError
from leapformer.tasks.lra.storage import SplitWriter, read_arrays, write_examples


def test_round_trip_and_the_safetensors_library_agree(tmp_path):
    path = tmp_path / "train.safetensors"
    write_examples(path, [b"abc", b"", b"de"], [1, 0, 7])
    arrays = read_arrays(path)
    assert bytes(arrays["tokens"]) == b"abcde"
    assert arrays["offsets"].tolist() == [0, 3, 3, 5] and arrays["labels"].tolist() == [1, 0, 7]
    assert isinstance(arrays["tokens"], np.memmap) and not arrays["tokens"].flags.writeable
    other = load_file(path)
    assert other.keys() == arrays.keys()
    assert all(np.array_equal(other[name], arrays[name]) for name in other)
    assert {name: array.dtype.name for name, array in other.items()} == {
        "tokens": "uint8", "offsets": "int64", "labels": "uint8",
    }  # fmt: skip


def test_files_of_the_safetensors_library_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"tokens": np.arange(5, dtype=np.uint8), "offsets": np.array([0, 5]), "labels": np.zeros(1, np.uint8)}
    save_file(arrays, path)
    assert all(np.array_equal(read_arrays(path)[name], array) for name, array in arrays.items())


def test_pairs_share_documents(tmp_path):
    path = tmp_path / "train.safetensors"
    with SplitWriter(path, two_documents=True) as writer:
        first, second = writer.add_document(b"x"), writer.add_document(b"yz")
        writer.add_pair(first, second, 1)
        writer.add_pair(second, first, 0)
    arrays = read_arrays(path)
    assert arrays["pairs"].tolist() == [[0, 1], [1, 0]] and arrays["labels"].tolist() == [1, 0]
    assert arrays["offsets"].tolist() == [0, 1, 3]


def test_nothing_is_left_of_a_file_that_was_broken_off(tmp_path):
    with pytest.raises(ZeroDivisionError), SplitWriter(tmp_path / "train.safetensors") as writer:
        writer.add(b"x", 1 // 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 5, 500, 1025])
def test_a_file_that_is_cut_off(tmp_path, cut):
    path = tmp_path / "train.safetensors"
    write_examples(path, [b"abc"], [1])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(LeapformerError, match="train.safetensors: expected whole prepared data"):
        read_arrays(path)


def entry(dtype: str = "U8", shape: list | None = None, offsets: list | None = None) -> dict:
    return {"dtype": dtype, "shape": shape or [1], "data_offsets": offsets or [0, 1]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"tokens": entry()}, "found no labels"),
        ({"tokens": entry(dtype="F8")}, "expected whole prepared data"),
        ({"tokens": entry(shape=[9])}, "1 bytes for the shape"),
        ({"tokens": entry(), "labels": entry(), "offsets": entry()}, "offsets: expected them to end at 1 tokens"),
        ([], "expected whole prepared data"),
    ],
)
def test_a_file_of_another_layout(tmp_path, header, message):
    text = json.dumps(header).encode()
    path = tmp_path / "train.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x05")
    with pytest.raises(LeapformerError, match=message):
        read_arrays(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(LeapformerError, match="found no such file"):
        read_arrays(tmp_path / "train.safetensors")
