"""From documents to blocks: one flat array of token ids, cut without losing a tail.

L: block length, n: number of tokens, N: number of sequences in a packed batch, B: batch.

Consecutive blocks share one token: block b holds tokens b (L - 1) to b (L - 1) + L - 1. As the models shift labels by
one inside, every token but the first of the array is predicted exactly once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from leapformer.errors import LeapformerError
from leapformer.files.checksums import is_sound, write_sum
from leapformer.files.writing import make_folder, staged_file
from leapformer.tasks.lm.corpora import count_bytes, count_words
from leapformer.tasks.lm.tokenizers import lines_of

_LOG = logging.getLogger(__name__)
IGNORED_LABEL = -100
_LINES_AT_ONCE = 4096


@dataclass(frozen=True)
class EncodedSplit:
    """A split as one flat array.

    Arguments:
        tokens: int32 [n], the ids of all documents in order.
        document_starts: int64 [number of documents], where each document begins in `tokens`.
        words: word-level tokens of the text, as `corpora.count_words` counts them.
        bytes: UTF-8 bytes of the text.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    words: int
    bytes: int


def encode_split(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    separate_documents: bool = True,
    cache_dir: str | Path | None = None,
) -> EncodedSplit:
    """Encodes documents into one flat array.

    Arguments:
        documents: the texts; those without a token (empty) add nothing.
        tokenizer: gives ids and, with `separate_documents`, the token that ends each document.
        separate_documents: end each document with `tokenizer.eos_token_id`, unless its last id already is that
            (pass `Corpus.separate_documents`).
        cache_dir: folder in which the arrays are kept, under a name made from the content; None keeps nothing.

    Raises LeapformerError when there is nothing to encode, or the tokenizer has no end token and one is needed.
    """
    if separate_documents and tokenizer.eos_token_id is None:
        raise LeapformerError("tokenizer: documents are to be separated, but the tokenizer has no eos_token")
    if cache_dir is None:
        return _encode(documents, tokenizer, separate_documents)
    file = Path(cache_dir) / f"tokens-{_content_key(documents, tokenizer, separate_documents)}.npz"
    split = _stored(file, len(tokenizer))
    if split is None:
        split = _encode(documents, tokenizer, separate_documents)
        _store(split, file)
    return split


def _stored(file: Path, vocab_size: int) -> EncodedSplit | None:
    """What `_store` wrote; None: there is nothing, or it is damaged, and made again."""
    if not file.is_file():
        return None
    if is_sound(file):
        try:
            with zipfile.ZipFile(file) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("a member is compressed")
            with np.load(file, allow_pickle=False) as stored:
                words, size = (int(number) for number in stored["counts"])
                split = EncodedSplit(stored["tokens"], stored["document_starts"], words, size)
            if _fits(split, vocab_size):
                return split
        except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile):
            pass
    _LOG.warning("%s is damaged, or was cut off: the text is encoded again", file)
    return None


def _fits(split: EncodedSplit, vocab_size: int) -> bool:
    tokens, starts = split.tokens, split.document_starts
    if tokens.dtype != np.int32 or starts.dtype != np.int64 or tokens.ndim != 1 or starts.ndim != 1:
        return False
    if not tokens.size or not starts.size or tokens.min() < 0 or tokens.max() >= vocab_size:
        return False
    return starts[0] == 0 and starts[-1] < len(tokens) and bool((np.diff(starts) > 0).all())


def _encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, separate_documents: bool) -> EncodedSplit:
    eos = np.array([tokenizer.eos_token_id if separate_documents else 0], dtype=np.int32)
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    length = 0
    for document in documents:
        ids = _encode_document(document, tokenizer)
        if not ids.size:
            continue
        if separate_documents and ids[-1] != eos[0]:
            ids = np.concatenate([ids, eos])
        starts.append(length)
        pieces.append(ids)
        length += ids.size
    if not pieces:
        raise LeapformerError("data: expected text to encode, found none")
    return EncodedSplit(
        np.concatenate(pieces), np.array(starts, dtype=np.int64), count_words(documents), count_bytes(documents)
    )


def _encode_document(document: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Int32 [length]; line by line, which the tokenizers of this package make the same as at once."""
    backend = tokenizer.backend_tokenizer
    lines = lines_of([document])
    pieces = [np.zeros(0, dtype=np.int32)]
    while batch := list(islice(lines, _LINES_AT_ONCE)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            pieces.append(np.array(encoding.ids, dtype=np.int32))
    return np.concatenate(pieces)


def _content_key(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, separate_documents: bool) -> str:
    digest = hashlib.sha256()
    settings = [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, separate_documents]
    digest.update(json.dumps(settings).encode())
    for document in documents:
        text = document.encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()[:32]


def _store(split: EncodedSplit, file: Path) -> None:
    """The arrays, and their checksum beside them."""
    counts = np.array([split.words, split.bytes], dtype=np.int64)
    try:
        make_folder(file.parent)
        with staged_file(file, shared=True) as stream:
            np.savez(stream, tokens=split.tokens, document_starts=split.document_starts, counts=counts)
        write_sum(file, shared=True)
    except LeapformerError as error:
        raise LeapformerError(f"data: cannot write the token cache: {error}") from None


class PackedDataset(Dataset):
    """Blocks of one flat array of ids; every token but the first is a label exactly once.

    Arguments:
        tokens: integer [n], n >= 2.
        block_size: L >= 2, tokens in a block, so L - 1 predictions.
        document_starts: ascending indices into `tokens`; needed when attention stays within documents.
        across_documents: True: a block is one sequence, whatever documents it holds. False: `document_starts` [N] int64
            is added to each block, for `PackedCollator` to make `cu_seqlens` from. The first token of a document is
            still predicted, from the last state of the document before it.
        context: tokens that a block repeats of the one before it, 0 to L - 2, without predicting them again. Every
            prediction then sees at least `context` + 1 tokens, where the array has so many: L - 2 slides token by
            token.

    Each item is a dictionary of int64 [L]: `input_ids`, `labels` (equal to `input_ids`, as the models shift inside;
    -100 where padded) and `attention_mask` (0 where padded). Only the last block is padded, with `pad_id` (default 0).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        block_size: int,
        document_starts: np.ndarray | None = None,
        across_documents: bool = True,
        pad_id: int = 0,
        context: int = 0,
    ) -> None:
        if block_size < 2:
            raise LeapformerError(f"data.block_size: expected 2 or more, found {block_size}")
        check_context(context, block_size)
        if len(tokens) < 2:
            raise LeapformerError(f"data: expected at least 2 tokens, found {len(tokens)}")
        if not across_documents and document_starts is None:
            raise LeapformerError("data.across_documents: false needs document_starts, found none")
        self.tokens = np.asarray(tokens)
        self.block_size = block_size
        self.document_starts = None if across_documents else np.asarray(document_starts, dtype=np.int64)
        self.pad_id = pad_id
        self.context = context
        self.step = block_size - 1 - context

    def __len__(self) -> int:
        return max(1, -(-(len(self.tokens) - 1 - self.context) // self.step))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = (index % len(self)) * self.step
        ids = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))
        padding = (0, self.block_size - len(ids))
        item = {
            "input_ids": torch.nn.functional.pad(ids, padding, value=self.pad_id),
            "labels": torch.nn.functional.pad(ids, padding, value=IGNORED_LABEL),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), padding),
        }
        if start and self.context:
            item["labels"][: self.context + 1] = IGNORED_LABEL
        if self.document_starts is not None:
            first, last = np.searchsorted(self.document_starts, [start + 1, start + len(ids)])
            item["document_starts"] = torch.from_numpy(np.append(0, self.document_starts[first:last] - start))
        return item


def check_context(context: int, block_size: int) -> None:
    """Raises LeapformerError unless blocks of this size can repeat so many tokens and still predict one."""
    if not 0 <= context <= block_size - 2:
        raise LeapformerError(f"data.context_window: expected 0 to {block_size - 2} (block_size - 2), found {context}")


class PackedCollator:
    """Makes a batch of `PackedDataset` items.

    Across documents: `input_ids`, `labels` [B, L]; `attention_mask` [B, L] only when a block is padded.

    Within documents: one row without padding, `input_ids`, `labels`, `position_ids` [1, total] and `cu_seqlens` int32
    [N + 1]; positions begin at 0 in each document of each block. A block's first label is -100: what stands before it
    in the row is another block.
    """

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if "document_starts" in items[0]:
            return self._packed(items)
        names = ["input_ids", "labels"]
        if any(not item["attention_mask"].all() for item in items):
            names.append("attention_mask")
        return {name: torch.stack([item[name] for item in items]) for name in names}

    def _packed(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids, labels, edges = [], [], [torch.zeros(1, dtype=torch.int64)]
        total = 0
        for item in items:
            length = int(item["attention_mask"].sum())
            block_labels = item["labels"][:length].clone()
            block_labels[0] = IGNORED_LABEL
            ids.append(item["input_ids"][:length])
            labels.append(block_labels)
            edges.append(torch.cat([item["document_starts"][1:], torch.tensor([length])]) + total)
            total += length
        cu_seqlens = torch.cat(edges)
        lengths = cu_seqlens.diff()
        position_ids = torch.arange(total) - cu_seqlens[:-1].repeat_interleave(lengths)
        return {
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": position_ids[None],
            "cu_seqlens": cu_seqlens.to(torch.int32),
        }


def iterate_batches(dataset: PackedDataset, *, batch_size: int) -> Iterator[dict[str, Any]]:
    """The blocks in order, `batch_size` at a time, the last batch as short as it comes (for evaluation)."""
    collate = PackedCollator()
    for start in range(0, len(dataset), batch_size):
        yield collate([dataset[index] for index in range(start, min(start + batch_size, len(dataset)))])
