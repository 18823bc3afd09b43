"""What a training sees: items, batches with and without padding, and one line for what does not fit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from leapformer.errors import LeapformerError
from leapformer.tasks.lra.baselines import majority_baseline
from leapformer.tasks.lra.dataset import PadCollator, load
from leapformer.tasks.lra.preparation import prepare

TEXTS = {"train": [("abc", 1)] * 18 + [("\U0001f600 long", 0)] * 2, "test": [("x", 0), ("yz", 1), ("zz", 1)]}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for split, rows in TEXTS.items():
        lines = [json.dumps({"text": document, "label": label}) for document, label in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    prepare("text", folder / "x", source=folder)
    return folder / "x"


def test_items_are_small_arrays_and_ids_are_shifted(text):
    test = load("text", text, "test")
    assert (test.vocab_size, test.num_classes, test.max_length, test.pad_id) == (257, 2, 4000, 0)
    assert test[1]["input_ids"].tolist() == [ord("y") + 1, ord("z") + 1] and test[1]["input_ids"].dtype == np.int16
    assert test[1]["label"] == 1 and test.labels.tolist() == [0, 1, 1] and not test.two_documents
    with pytest.raises(IndexError, match="example 3 of 3"):
        test[3]


def test_documents_can_be_cut_further(text):
    shorter = load("text", text, "train", max_length=2)
    assert shorter.max_length == 2 and {len(item["input_ids"]) for item in shorter} == {2}


def test_batches_are_padded_and_masked(text):
    test = load("text", text, "test")
    batch = PadCollator(test.pad_id)([test[0], test[1]])
    assert batch["input_ids"].tolist() == [[121, 0], [122, 123]] and batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]] and batch["labels"].tolist() == [0, 1]
    assert PadCollator(0, multiple_of=8)([test[0], test[1]])["input_ids"].shape == (2, 8)
    assert PadCollator(0, length=5)([test[0]])["input_ids"].shape == (1, 5)
    with pytest.raises(LeapformerError, match="at most 1 tokens, found 2"):
        PadCollator(0, length=1)([test[1]])


def test_two_documents_are_padded_each(text):
    items = [
        {"input_ids": np.array([1], np.uint8), "input_ids_1": np.array([1, 2], np.uint8), "label": 0},
        {"input_ids": np.array([3], np.uint8), "input_ids_1": np.array([3], np.uint8), "label": 1},
    ]
    batch = PadCollator(0)(items)
    assert batch["input_ids"].tolist() == [[1], [3]] and batch["input_ids_1"].tolist() == [[1, 2], [3, 0]]
    assert batch["attention_mask_1"].tolist() == [[1, 1], [1, 0]]


def test_pictures_have_no_padding_and_no_mask():
    items = [{"input_ids": np.array([0, 7], np.uint8), "label": 0}] * 2
    assert PadCollator(None)(items).keys() == {"input_ids", "labels"}
    with pytest.raises(LeapformerError, match="without padding"):
        PadCollator(None)([*items, {"input_ids": np.array([1], np.uint8), "label": 0}])


def test_worker_processes_map_the_file_themselves(text):
    train = load("text", text, "train")
    assert len(pickle.dumps(train)) < 10_000
    copied = pickle.loads(pickle.dumps(train))
    for one, other in zip(DataLoader(copied, collate_fn=PadCollator(0)), train, strict=True):
        assert one["input_ids"][0].tolist() == other["input_ids"].tolist()


def test_the_commonest_label(text):
    assert majority_baseline(load("text", text, "train"), load("text", text, "test")) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("texts", "test"), {}, "expected one of listops, text"),
        (("text", "dev"), {}, "expected the split train, validation or test, found 'dev'"),
        (("image", "test"), {}, "expected the task image, found text"),
        (("text", "test"), {"max_length": 0}, "max_length: expected none, or 1 or more"),
        (("text", "test"), {"brackets": False}, "brackets: false is for ListOps"),
    ],
)
def test_wrong_arguments(text, arguments, options, message):
    with pytest.raises(LeapformerError, match=message):
        load(arguments[0], text, arguments[1], **options)


def test_folders_that_are_not_prepared_data(text, tmp_path):
    def says(message):
        with pytest.raises(LeapformerError, match=message) as caught:
            load("text", tmp_path, "test")
        assert "\n" not in str(caught.value)

    says("found no card.json")
    (tmp_path / "card.json").write_text("{")
    says("expected JSON")
    (tmp_path / "card.json").write_text('{"format": 0}')
    says("expected format 1; prepare the data again")
    card = json.loads((text / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(card))
    says("test.safetensors: expected prepared data, found no such file")
    (tmp_path / "test.safetensors").write_bytes((text / "train.safetensors").read_bytes())
    says("expected 3 examples as in card.json, found 18")
    del card["splits"]["test"]
    (tmp_path / "card.json").write_text(json.dumps(card))
    says("has no test split")


def test_a_generator_s_processes_start_without_torch():
    program = "import sys, leapformer.tasks.lra.listops, leapformer.tasks.lra.pathfinder; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
