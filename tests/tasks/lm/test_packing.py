"""No token lost, none predicted twice, no attention where none is wanted."""

import numpy as np
import pytest
import torch

from leapformer.errors import LeapformerError
from leapformer.files.checksums import write_sum
from leapformer.tasks.lm import packing
from leapformer.tasks.lm.packing import EncodedSplit, PackedCollator, PackedDataset, encode_split, iterate_batches
from leapformer.tasks.lm.tokenizers import build_tokenizer

DOCUMENTS = ["ab\n", "", "c", "dé f\n\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bytes")


def predicted(dataset: PackedDataset, batch_size: int) -> np.ndarray:
    """The labels in the order of prediction, as a model that shifts inside sees them."""
    kept = []
    for batch in iterate_batches(dataset, batch_size=batch_size):
        labels = batch["labels"][:, 1:]
        assert torch.equal(labels[labels != -100], batch["input_ids"][:, 1:][labels != -100])
        kept.append(labels[labels != -100])
    return torch.cat(kept).numpy()


def test_documents_end_with_eos(tokenizer):
    split = encode_split(DOCUMENTS, tokenizer)
    assert split.tokens.dtype == np.int32
    assert split.tokens.tolist() == [*b"ab\n", 256, *b"c", 256, *"dé f\n\n".encode(), 256]
    assert split.document_starts.tolist() == [0, 4, 6]
    assert (split.words, split.bytes) == (2 + 2 + 4, 3 + 1 + 7)


def test_documents_that_are_not_separated(tokenizer):
    split = encode_split(DOCUMENTS, tokenizer, separate_documents=False)
    assert bytes(split.tokens.tolist()).decode() == "".join(DOCUMENTS)
    assert split.document_starts.tolist() == [0, 3, 4]


def test_word_level_line_end_is_already_the_end():
    words = build_tokenizer("word", documents=["a b\n"])
    split = encode_split(["a b\n", "a"], words)
    assert words.convert_ids_to_tokens(split.tokens) == ["a", "b", "<eos>", "a", "<eos>"]
    assert len(split.tokens) == split.words


def test_long_documents_are_encoded_in_stretches(tokenizer, monkeypatch):
    whole = encode_split(DOCUMENTS, tokenizer)
    monkeypatch.setattr(packing, "_LINES_AT_ONCE", 1)
    assert np.array_equal(encode_split(DOCUMENTS, tokenizer).tokens, whole.tokens)


def test_nothing_to_encode(tokenizer):
    with pytest.raises(LeapformerError, match="expected text to encode, found none"):
        encode_split(["", ""], tokenizer)


def test_separation_needs_an_end_token():
    tokenizer = build_tokenizer("bytes")
    tokenizer.eos_token = None
    with pytest.raises(LeapformerError, match="has no eos_token"):
        encode_split(["a"], tokenizer)


def equal(a: EncodedSplit, b: EncodedSplit) -> bool:
    same = np.array_equal(a.tokens, b.tokens) and np.array_equal(a.document_starts, b.document_starts)
    return same and (a.words, a.bytes) == (b.words, b.bytes)


def test_cache_is_used_and_keyed_by_content(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    first = encode_split(DOCUMENTS, tokenizer, cache_dir=folder)
    (file,) = folder.glob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_encode", None)
        assert equal(encode_split(DOCUMENTS, tokenizer, cache_dir=folder), first)
    encode_split(["abc", *DOCUMENTS[2:]], tokenizer, cache_dir=folder)
    encode_split(DOCUMENTS, tokenizer, separate_documents=False, cache_dir=folder)
    encode_split(DOCUMENTS, build_tokenizer("word", documents=DOCUMENTS), cache_dir=folder)
    assert len(list(folder.glob("*.npz"))) == 4
    file.write_bytes(file.read_bytes()[:50])
    assert equal(encode_split(DOCUMENTS, tokenizer, cache_dir=folder), first)
    with np.load(file) as stored:
        assert np.array_equal(stored["tokens"], first.tokens)


@pytest.mark.parametrize("damage", ["flip", "cut", "no sum", "compressed", "types", "ids", "starts"])
def test_a_damaged_cache_is_made_again(tokenizer, tmp_path, damage, caplog):
    first = encode_split(DOCUMENTS, tokenizer, cache_dir=tmp_path)
    (file,) = tmp_path.glob("*.npz")
    whole, beside = file.read_bytes(), file.with_name(f"{file.name}.sha256")
    arrays = {"tokens": first.tokens, "document_starts": first.document_starts, "counts": np.array([1, 2])}
    changed = {
        "types": {"tokens": first.tokens.astype(np.float64)}, "ids": {"tokens": first.tokens + 300},
        "starts": {"document_starts": first.document_starts[::-1].copy()}, "compressed": {},
    }  # fmt: skip
    if damage in changed:  # with a checksum that is right
        with file.open("wb") as stream:
            (np.savez_compressed if damage == "compressed" else np.savez)(stream, **{**arrays, **changed[damage]})
        write_sum(file)
    elif damage == "no sum":
        beside.unlink()
    else:
        file.write_bytes(whole[:-3] if damage == "cut" else whole[:150] + bytes([whole[150] ^ 1]) + whole[151:])
    assert equal(encode_split(DOCUMENTS, tokenizer, cache_dir=tmp_path), first)
    assert file.read_bytes() == whole and "the text is encoded again" in caplog.text


def test_cache_that_cannot_be_written(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(LeapformerError, match="cannot write the token cache"):
        encode_split(DOCUMENTS, tokenizer, cache_dir=tmp_path / "file")

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.np, "savez", full)
    with pytest.raises(LeapformerError, match="No space left on device"):
        encode_split(DOCUMENTS, tokenizer, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 15, 16, 100])
@pytest.mark.parametrize("block_size", [2, 3, 8, 64])
@pytest.mark.parametrize("across", [True, False])
def test_every_token_but_the_first_is_predicted_once(length, block_size, across):
    tokens = np.arange(length, dtype=np.int32) + 1
    starts = np.arange(0, length, 5)
    dataset = PackedDataset(tokens, block_size=block_size, document_starts=starts, across_documents=across)
    assert np.array_equal(predicted(dataset, 3), tokens[1:])


@pytest.mark.parametrize("length", [2, 7, 8, 9, 30])
@pytest.mark.parametrize("context", [0, 1, 4, 6])
def test_context_is_repeated_and_never_predicted_again(length, context):
    tokens = np.arange(length, dtype=np.int32) + 1
    dataset = PackedDataset(tokens, block_size=8, context=context)
    assert np.array_equal(predicted(dataset, 3), tokens[1:])
    for item in dataset:
        for place in np.flatnonzero(item["labels"][1:] != -100) + 1:
            token = int(item["input_ids"][place])
            assert place >= min(context + 1, token - 1)  # `place` tokens of the block stand before it
            assert np.array_equal(item["input_ids"][:place], tokens[token - 1 - place : token - 1])


def test_only_the_last_block_is_padded():
    dataset = PackedDataset(np.arange(10, dtype=np.int32), block_size=8, pad_id=99)
    first, last = dataset[0], dataset[-1]
    assert len(dataset) == 2
    assert first["attention_mask"].tolist() == [1] * 8
    assert last["input_ids"].tolist() == [7, 8, 9, *[99] * 5]
    assert last["labels"].tolist() == [7, 8, 9, *[-100] * 5]
    assert last["attention_mask"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert all(value.dtype == torch.int64 for value in last.values())
    assert "attention_mask" not in PackedCollator()([first])
    assert PackedCollator()([first, last])["attention_mask"].shape == (2, 8)
    with pytest.raises(IndexError):
        dataset[2]


def test_a_loader_shuffles_blocks_without_losing_any():
    dataset = PackedDataset(np.arange(50, dtype=np.int32), block_size=6)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=PackedCollator())
    labels = torch.cat([batch["labels"][:, 1:].reshape(-1) for batch in loader])
    assert sorted(labels[labels != -100].tolist()) == list(range(1, 50))


def test_packed_batch_keeps_documents_apart():
    tokens = np.arange(14, dtype=np.int32)
    dataset = PackedDataset(tokens, block_size=8, document_starts=np.array([0, 3, 7, 12]), across_documents=False)
    batch = PackedCollator()([dataset[0], dataset[1]])
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"].tolist() == [0, 3, 7, 8, 13, 15]
    assert batch["input_ids"].tolist() == [[*range(8), *range(7, 14)]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0, 1]]
    assert batch["labels"].tolist() == [[-100, *range(1, 8), -100, *range(8, 14)]]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"block_size": 1}, "data.block_size: expected 2 or more, found 1"),
        ({"block_size": 8, "context": 7}, r"data.context_window: expected 0 to 6 \(block_size - 2\), found 7"),
        ({"block_size": 4, "across_documents": False}, "false needs document_starts"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(LeapformerError, match=message):
        PackedDataset(np.arange(9), **keywords)


def test_too_few_tokens():
    with pytest.raises(LeapformerError, match="expected at least 2 tokens, found 1"):
        PackedDataset(np.arange(1), block_size=4)
