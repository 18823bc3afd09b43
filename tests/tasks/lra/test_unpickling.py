"""Pickles are read without running what they name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from leapformer.errors import LeapformerError
from leapformer.tasks.lra.dataset import load
from leapformer.tasks.lra.preparation import prepare
from leapformer.tasks.lra.unpickling import _check_operations, read_pickle
from tests.tasks.lra.builders import fails


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_text_and_arrays_come_back(tmp_path, protocol):
    content = {
        "text": "x",
        "number": 3,
        "bytes": b"\x00\xff",
        "none": None,
        "list": [1, 2.5],
        "bytes array": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "long": np.arange(3),
        "scalar": np.int64(7),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_pickle(path)
    assert found.keys() == content.keys()
    for name, value in content.items():
        assert np.array_equal(found[name], value)
        assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None) or name == "scalar"


def test_a_pickle_of_python_2(tmp_path):
    """As CIFAR-10's own: text is bytes, and numpy's modules have their old names. Written out by hand."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(K\x02K\x03t" + kind + b"\x89T\x06\x00\x00\x00abc\x00\xffftb"
    path = tmp_path / "x.pickle"
    path.write_bytes(b"\x80\x02}(U\x04data" + array + state + b"U\x06labels](K\x01K\x02eu.")
    found = read_pickle(path)
    assert found["data"].tolist() == [[97, 98, 99], [0, 255, 102]] and found["data"].dtype == np.uint8
    assert found["labels"] == [1, 2]


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Names:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(content)
    with pytest.raises(LeapformerError, match=message) as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value) and "x.pickle" in str(caught.value)


def test_nothing_is_run(tmp_path):
    refused(tmp_path, pickle.dumps(Runs(tmp_path / "run")), r"found the name pathlib")
    assert not (tmp_path / "run").exists()
    refused(tmp_path, pickle.dumps(Names(eval, "1")), "found the name builtins.eval")
    refused(tmp_path, pickle.dumps(np.random.default_rng(0)), "found the name numpy.random")
    refused(tmp_path, pickle.dumps(np.array([print], dtype=object)), "found the dtype 'O8'")
    refused(tmp_path, pickle.dumps(Names(bytes, 1 << 40)), "found bytes of another kind")
    refused(tmp_path, pickle.dumps(np.array(["a"])), "found the dtype 'U1'")


def test_damaged_pickles(tmp_path):
    whole = pickle.dumps([1, 2, 3, np.arange(100)])
    refused(tmp_path, whole[:-50], "expected a whole pickle")
    refused(tmp_path, b"", "expected a whole pickle")
    refused(tmp_path, b"not a pickle", "expected a whole pickle")
    with pytest.raises(LeapformerError, match="cannot be read"):
        read_pickle(tmp_path / "none.pickle")


# ---- the research harnesses' files


def write_harness(folder: Path, task: str, rows: list) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "dev", "test"):
        (folder / f"lra-{task}.{split}.pickle").write_bytes(pickle.dumps(rows))
    return folder


def padded(ids: list[int], length: int = 8) -> np.ndarray:
    return np.array(ids + [0] * (length - len(ids)), dtype=np.int32)


def test_text_and_its_padding(tmp_path):
    rows = [{"input_ids_0": padded([98, 99, 256]), "label": 1}, {"input_ids_0": padded([1]), "label": np.int64(0)}]
    prepare("text", tmp_path / "x", source=write_harness(tmp_path / "old", "text", rows))
    dataset = load("text", tmp_path / "x", "validation")
    assert dataset[0]["input_ids"].tolist() == [98, 99, 256] and dataset[1]["input_ids"].tolist() == [1]
    assert dataset.labels.tolist() == [1, 0] and dataset.vocab_size == 257


def test_two_documents(tmp_path):
    rows = [{"input_ids_0": padded([5, 6]), "input_ids_1": padded([7]), "label": 1}]
    prepare("retrieval", tmp_path / "x", source=write_harness(tmp_path / "old", "retrieval", rows))
    item = load("retrieval", tmp_path / "x", "train")[0]
    assert item["input_ids"].tolist() == [5, 6] and item["input_ids_1"].tolist() == [7]


def test_listops_keeps_the_numbers_of_the_harness(tmp_path):
    rows = [{"input_ids_0": padded([14, 3, 9]).tolist(), "label": 9}]
    prepare("listops", tmp_path / "x", source=write_harness(tmp_path / "old", "listops", rows))
    dataset = load("listops", tmp_path / "x", "train")
    assert dataset.vocab_size == 15 and dataset[0]["input_ids"].tolist() == [14, 3, 9] and dataset.max_length == 3
    with pytest.raises(LeapformerError, match="own symbols"):
        load("listops", tmp_path / "x", "train", brackets=False)


@pytest.mark.parametrize(("task", "name"), [("image", "image"), ("pathfinder", "pathfinder32-curv_contour_length_14")])
def test_pictures_keep_their_black_pixels(tmp_path, task, name):
    rows = [{"input_ids_0": padded([0, 255], 1024), "label": 1}]
    prepare(task, tmp_path / "x", source=write_harness(tmp_path / "old", name, rows))
    dataset = load(task, tmp_path / "x", "train")
    assert dataset[0]["input_ids"].tolist() == [0, 255] + [0] * 1022 and dataset.pad_id is None


BAD = [
    ("x", "expected input_ids_0 and label, found str"),
    ({"input_ids_0": [1]}, "found input_ids_0"),
    ({"input_ids_0": [1], "label": 2}, "expected a label 0 to 1, found '2'"),
    ({"input_ids_0": [257], "label": 1}, "expected ids 0 to 256, found 257 to 257"),
    ({"input_ids_0": ["a"], "label": 1}, "expected a list of whole numbers"),
    ({"input_ids_0": [0, 1], "label": 1}, "expected zeros as padding at the end alone"),
    ({"input_ids_0": [0, 0], "label": 1}, "found padding alone"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_examples(tmp_path, row, message):
    source = write_harness(tmp_path / "old", "text", [{"input_ids_0": [1], "label": 0}, row])
    fails(rf"lra-text\.train\.pickle:1: .*{message}", "text", tmp_path / "x", source=source)
    card = prepare("text", tmp_path / "y", source=source, skip_bad=True)
    assert len(card["bad_rows"]) == 3 and card["splits"]["train"]["examples"] == 1


def test_files_of_another_kind(tmp_path):
    source = write_harness(tmp_path / "old", "text", [{"input_ids_0": [1], "label": 0}])
    (source / "lra-text.dev.pickle").write_bytes(pickle.dumps({}))
    fails("dev.pickle: expected a list of examples, found dict", "text", tmp_path / "x", source=source)
    (source / "lra-text.dev.pickle").unlink()
    fails("expected lra-text.dev.pickle, found none", "text", tmp_path / "x", source=source)


# ---- bombs


def test_shared_lists_are_not_copied(tmp_path):
    """2^60 places in 500 bytes."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    (tmp_path / "a").write_bytes(pickle.dumps(value))
    found = read_pickle(tmp_path / "a")
    assert found[0] is found[1]
    row = {"input_ids_0": value, "label": value, **{str(n): value for n in range(2000)}}
    for rows in ([row], [{"a": value}], [{**row, "label": 1}], [{"input_ids_0": [1], "label": value}]):
        for split in ("train", "dev", "test"):
            (tmp_path / f"lra-listops.{split}.pickle").write_bytes(pickle.dumps(rows))
        with pytest.raises(LeapformerError) as caught:
            prepare("listops", tmp_path / "x", source=tmp_path)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "an operation that asks for 2,147,483,647 bytes or values of 9"),
        (b"Np99999999999\n.", "an operation that asks for 99,999,999,999"),
        (b"\x80\x04\x8e" + (10**12).to_bytes(8, "little") + b".", "an operation that asks for 1,000,000,000,000"),
        (b"\x80\x02}" + b")" + 60_000 * b"\x85" + b"K\x01s.", "a tuple as a key"),
        (b"\x80\x02}()" + 60_000 * b"\x85" + b"K\x01u.", "a tuple as a key"),
        (b"\x80\x04\x8f()" + 60_000 * b"\x85" + b"\x90.", "a set"),
        (60_000 * b"]" + 59_999 * b"a" + b".", "maximum recursion"),
        (b"cnumpy.core.numeric\n_frombuffer\n(J\xff\xff\xff\x7fNNNtR.", "an array of something else than bytes"),
        (b"c_codecs\nencode\n(N}X\x01\x00\x00\x00aK\x01stb.", "a change of a function"),
        (b"\x80\x02K\x01", "data was truncated"),
    ],
)
def test_operations_that_take_the_memory_or_the_process(content, found, tmp_path):
    refused(tmp_path, content, found)


def test_many_tuples_are_read_with_care_and_the_same(tmp_path):
    rows = [{"input_ids_0": np.arange(5), "pair": (1, (2, "x")), 3: b"y"} for _ in range(8_000)]
    (tmp_path / "a").write_bytes(pickle.dumps(rows))
    found = read_pickle(tmp_path / "a")
    assert (
        len(found) == 8_000
        and found[-1]["pair"] == [1, [2, "x"]]
        and found[0]["input_ids_0"].tolist() == [0, 1, 2, 3, 4]
    )


@pytest.mark.parametrize("protocol", range(6))
def test_every_operation_is_known(protocol, tmp_path):
    value = [
        0,
        1,
        255,
        256,
        70_000,
        -1,
        2**40,
        2**300,
        2**3000,
        1.5,
        None,
        True,
        False,
        "t" * 300,
        b"r" * 300,
        bytearray(b"p"),
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        [[]],
        {},
        {"a": {"b": [1]}},
    ]
    value += [value[13], list(range(600)), {str(n): n for n in range(600)}, np.ones((2, 3)), np.int16(4)]
    content = pickle.dumps(value, protocol)
    if protocol < 5:
        content = pickle.dumps([each for each in value if not isinstance(each, bytearray)], protocol)
    assert _check_operations(content) < 100
    (tmp_path / "a").write_bytes(content)
    if protocol < 5:
        assert read_pickle(tmp_path / "a")[-1] == 4
