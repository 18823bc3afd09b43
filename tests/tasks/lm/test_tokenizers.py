"""Exact round trips, sizes, determinism and saving."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from leapformer.errors import LeapformerError
from leapformer.tasks.lm.tokenizers import EOS, KINDS, build_tokenizer, lines_of

TEXT = ["The cat sat .\n The cat ran , and the dog sat .\n", "Der Bär läuft .\n"] * 30
ODD = " a\r\n <eos> <unk>\n\n\n  π 😀\x00\x7f\t  tail  .  , n't <|x|> e\u0301 \u2028 x"


@pytest.fixture(scope="module")
def tokenizers():
    sizes = {"bytes": None, "bpe": 280, "word": None}
    return {kind: build_tokenizer(kind, vocab_size=sizes[kind], documents=TEXT) for kind in KINDS}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_comes_back_exactly(tokenizers, kind):
    tokenizer = tokenizers[kind]

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(codec="utf-8")))
    def check(text):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids

    check()
    assert tokenizer.decode(tokenizer(ODD)["input_ids"]) == ODD


def test_ids_of_bytes_are_the_bytes(tokenizers):
    assert tokenizers["bytes"](ODD)["input_ids"] == list(ODD.encode())
    assert len(tokenizers["bytes"]) == tokenizers["bytes"].vocab_size == 257


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_may_be_encoded_line_by_line(tokenizers, kind):
    lines = list(lines_of([ODD]))
    assert "".join(lines) == ODD
    apart = [index for ids in tokenizers[kind](lines)["input_ids"] for index in ids]
    assert apart == tokenizers[kind](ODD)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_eos_pads_on_the_left(tokenizers, kind):
    tokenizer = tokenizers[kind]
    batch = tokenizer(["a", "The cat sat"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][0] == tokenizer.eos_token_id
    assert batch["attention_mask"][0][0] == 0
    assert tokenizer.eos_token == tokenizer.pad_token == EOS


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tokenizers, kind, tmp_path):
    tokenizers[kind].save_pretrained(tmp_path)
    for loaded in (type(tokenizers[kind]).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(ODD)["input_ids"] == tokenizers[kind](ODD)["input_ids"]
        assert len(loaded) == len(tokenizers[kind])
        assert (loaded.eos_token_id, loaded.padding_side) == (tokenizers[kind].eos_token_id, "left")
        assert loaded.decode([loaded.eos_token_id, 20], skip_special_tokens=True) == loaded.decode([20])


def test_bpe_has_the_wanted_size_and_is_the_same_every_time(tokenizers):
    again = build_tokenizer("bpe", vocab_size=280, documents=TEXT)
    assert again.get_vocab() == tokenizers["bpe"].get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizers["bpe"].backend_tokenizer.to_str()
    assert tokenizers["bpe"].vocab_size == len(tokenizers["bpe"]) == 280
    assert len(again("The cat sat")["input_ids"]) < len("The cat sat")


def test_bpe_of_a_small_text_has_fewer_ids_than_wanted():
    tokenizer = build_tokenizer("bpe", vocab_size=5000, documents=["ab ab\n"])
    assert 257 < len(tokenizer) < 270


def test_words_by_falling_frequency(tokenizers):
    tokenizer = tokenizers["word"]
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert vocabulary[:2] == [".", EOS]
    assert vocabulary[-1] == "<unk>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("The bird\nsat")["input_ids"]) == ["The", "<unk>", EOS, "sat"]
    assert tokenizer.decode(tokenizer("The cat\n")["input_ids"]) == f"The cat {EOS}"


def test_words_cut_to_the_most_frequent():
    tokenizer = build_tokenizer("word", vocab_size=4, documents=TEXT)
    assert set(tokenizer.get_vocab()) == {".", EOS, "The", "<unk>"}
    assert sorted(tokenizer.get_vocab().values()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "size", "documents", "message"),
    [
        ("sentencepiece", None, TEXT, "tokenizer.kind: expected one of bytes, bpe, word, found 'sentencepiece'"),
        ("bytes", 300, TEXT, "kind 'bytes' has 257 tokens, found 300"),
        ("bpe", 256, TEXT, "kind 'bpe' needs 257 tokens or more, found 256"),
        ("word", 1, TEXT, "kind 'word' needs 2 tokens or more, found 1"),
        ("bpe", 300, [" \n"], "kind 'bpe' is trained on text, found none"),
        ("word", None, [], "kind 'word' is trained on text, found none"),
    ],
)
def test_bad_input(kind, size, documents, message):
    with pytest.raises(LeapformerError, match=message):
        build_tokenizer(kind, vocab_size=size, documents=documents)
