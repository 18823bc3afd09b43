"""Prepared data as a dataset: `load` is the public door, `PadCollator` makes batches of what it gives.

B: batch, T: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from leapformer.errors import LeapformerError
from leapformer.tasks.card import CARD, SPLITS, read_card
from leapformer.tasks.lra import TASKS
from leapformer.tasks.lra.storage import read_arrays

_NO_BRACKETS = 1  # ListOps: symbols less in the vocabulary without the closing bracket, which is the last one


class LraDataset(Dataset):
    """The examples of one split, read through a memory map. Make it with `load`.

    Each item is a dictionary: `input_ids` (uint8 or int16 [T]), with two documents also `input_ids_1`, and `label`
    (int).

    Attributes:
        task, split: what it holds.
        card: what the preparation said of the data.
        vocab_size: ids are 0 to vocab_size - 1, the padding's included; a CLS symbol is not among them.
        pad_id: 0 where documents are padded, None where all have one length and every id is data (images).
        num_classes: labels are 0 to num_classes - 1.
        max_length: the most tokens that a document may have here.
        two_documents: whether an example has two of them.
        labels: uint8 [N].
    """

    def __init__(
        self, folder: Path, card: dict[str, Any], split: str, *, max_length: int | None, brackets: bool
    ) -> None:
        self.task: str = card["task"]
        self.split = split
        self.card = card
        self.folder = folder
        self.brackets = brackets
        self.vocab_size: int = card["vocab_size"] - (0 if brackets else _NO_BRACKETS)
        self.num_classes: int = card["num_classes"]
        self.pad_id: int | None = card["pad_id"]
        self.two_documents: bool = card["two_documents"]
        self.max_length: int = min(max_length or card["max_length"], card["max_length"])
        self._shift: int = card["shift"]
        self._open()

    def _open(self) -> None:
        arrays = read_arrays(self.folder / f"{self.split}.safetensors")
        expected = self.card["splits"][self.split]["examples"]
        if len(arrays["labels"]) != expected:
            raise LeapformerError(
                f"{self.folder / self.split}.safetensors: expected {expected} examples as in {CARD}, "
                f"found {len(arrays['labels'])}"
            )
        self._check_values(arrays)
        self.labels = np.asarray(arrays["labels"])
        self._tokens, self._offsets, self._pairs = arrays["tokens"], arrays["offsets"], arrays.get("pairs")

    def _check_values(self, arrays: dict[str, np.ndarray]) -> None:
        """Against what the card says, as a model is built by it."""
        path = self.folder / f"{self.split}.safetensors"
        if ("pairs" in arrays) != self.two_documents:
            found = "pairs" if "pairs" in arrays else "none"
            raise LeapformerError(f"{path}: expected two_documents {self.two_documents} as in {CARD}, found {found}")
        highest = {"tokens": self.card["vocab_size"] - self._shift, "labels": self.num_classes}
        for name, most in highest.items():
            if most <= 255 and len(arrays[name]) and int(arrays[name].max()) >= most:
                raise LeapformerError(
                    f"{path}: {name}: expected values below {most} by {CARD}, found {int(arrays[name].max())}"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        if self._pairs is None:
            return {"input_ids": self._document(index), "label": int(self.labels[index])}
        first, second = self._pairs[index]
        return {
            "input_ids": self._document(first),
            "input_ids_1": self._document(second),
            "label": int(self.labels[index]),
        }

    def _document(self, number: int) -> np.ndarray:
        tokens = np.asarray(self._tokens[self._offsets[number] : self._offsets[number + 1]])
        if not self.brackets:
            tokens = tokens[tokens != self.vocab_size]
        tokens = tokens[: self.max_length]
        return tokens + np.int16(self._shift) if self._shift else tokens

    # A worker process of a DataLoader maps the file again instead of getting a copy of it.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"_tokens", "_offsets", "_pairs"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def load(
    task: str, path: str | Path, split: str, *, max_length: int | None = None, brackets: bool = True
) -> LraDataset:
    """One split of data that `leapformer data prepare lra-TASK` made.

    Arguments:
        task: "listops", "text", "retrieval", "image" or "pathfinder".
        path: the folder with card.json.
        split: "train", "validation" or "test".
        max_length: cut documents to so many tokens; default: as prepared. Only for text and retrieval: what is cut
            off an expression or a picture decides its label.
        brackets: False leaves out the closing brackets of ListOps, as the older research harness did: a task of 14
            symbols, in which the tree is lost. Only to compare with its figures.

    Raises:
        LeapformerError: the folder does not hold such data, or an option does not fit the task.
    """
    folder = Path(path)
    if task not in TASKS:
        raise LeapformerError(f"lra: expected one of {', '.join(TASKS)}, found {task!r}")
    if split not in SPLITS:
        raise LeapformerError(f"lra: expected the split {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, found {split!r}")
    card = read_card(folder)
    if card["task"] != task:
        raise LeapformerError(f"{folder / CARD}: expected the task {task}, found {card['task']}")
    if not card["splits"].get(split, {}).get("examples"):
        raise LeapformerError(f"{folder}: has no {split} split")
    if max_length is not None and (task not in ("text", "retrieval") or max_length < 1):
        raise LeapformerError(f"max_length: expected none, or 1 or more for text and retrieval, found {max_length}")
    if not brackets and not (task == "listops" and card["symbols"]):
        raise LeapformerError(f"brackets: false is for ListOps with our own symbols alone, found {folder}")
    return LraDataset(folder, card, split, max_length=max_length, brackets=brackets)


class PadCollator:
    """Makes a batch: `input_ids` int64 [B, T], `labels` int64 [B], and `attention_mask` int64 [B, T], 1 = real.

    Two documents add `input_ids_1` and `attention_mask_1`. Without padding (`pad_id` None) there is no mask, as every
    id is data: a black pixel is not padding.

    Arguments:
        pad_id: fills up on the right; None where all documents have one length.
        length: T, for a fixed shape; None: the longest document of the batch.
        multiple_of: round T up, where `length` is None.
    """

    def __init__(self, pad_id: int | None, *, length: int | None = None, multiple_of: int = 1) -> None:
        self.pad_id = pad_id
        self.length = length
        self.multiple_of = multiple_of

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {"labels": torch.tensor([item["label"] for item in items])}
        for name, mask in (("input_ids", "attention_mask"), ("input_ids_1", "attention_mask_1")):
            if name in items[0]:
                batch[name], real = self._pad([item[name] for item in items])
                if self.pad_id is not None:
                    batch[mask] = real
        return batch

    def _pad(self, documents: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(document) for document in documents)
        width = self.length or -(-longest // self.multiple_of) * self.multiple_of
        if longest > width:
            raise LeapformerError(f"lra: expected documents of at most {width} tokens, found {longest}")
        if self.pad_id is None and any(len(document) != width for document in documents):
            raise LeapformerError(f"lra: expected {width} tokens in every document without padding, found another")
        ids = np.full((len(documents), width), self.pad_id or 0, dtype=np.int64)
        real = np.zeros_like(ids)
        for row, document in enumerate(documents):
            ids[row, : len(document)] = document
            real[row, : len(document)] = 1
        return torch.from_numpy(ids), torch.from_numpy(real)
