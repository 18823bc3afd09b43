"""Tokenizers of the language models: bytes, BPE trained on the data, and whole words.

All three are `PreTrainedTokenizerFast`, so they are saved beside the model and `AutoTokenizer` loads them. Text is cut
at line ends before anything else, so a document may be encoded line by line with the same result. A token's name inside
the text, such as "<eos>", is text: only packing adds the real one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from leapformer.errors import LeapformerError
from leapformer.tasks.lm.corpora import word_tokens

KINDS = ("bytes", "bpe", "word")
EOS = "<eos>"
UNK = "<unk>"


def build_tokenizer(
    kind: str, *, vocab_size: int | None = None, documents: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Builds a tokenizer; the same arguments give the same tokenizer.

    Arguments:
        kind: "bytes" (ids 0 to 255 are the bytes, 256 is `<eos>`), "bpe" (byte-level byte-pair encoding) or "word"
            (what whitespace separates, and `<eos>` for a line end; ids by falling frequency, as adaptive softmax
            needs them).
        vocab_size: number of ids, `<eos>` included. "bytes": 257 or None. "bpe": at least 257, by default 2,048; a
            text that offers fewer pairs gives fewer ids, so a model takes `len(tokenizer)`.
            "word": at least 2; by default every word.
        documents: the training text, for "bpe" and "word".

    Returns a tokenizer with `<eos>`, which pads too, and pads on the left as generation needs.
    "bytes" and "bpe" give back every text exactly. Raises LeapformerError for an unknown kind or size, or without text.
    """
    if kind not in KINDS:
        raise LeapformerError(f"tokenizer.kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    if kind == "bytes":
        return _finish(_byte_level(vocab_size), unk=None)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise LeapformerError(f"tokenizer: kind {kind!r} is trained on text, found none")
    if kind == "bpe":
        return _finish(_trained_bpe(documents, 2048 if vocab_size is None else vocab_size), unk=None)
    return _finish(_word_level(documents, vocab_size), unk=UNK)


def lines_of(documents: Iterable[str]) -> Iterator[str]:
    """The lines of the documents, each with its line end."""
    for document in documents:
        start = 0
        while (end := document.find("\n", start) + 1) > 0:
            yield document[start:end]
            start = end
        if start < len(document):
            yield document[start:]


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes inside byte-level tokens (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in set(printable) else chr(next(others)) for byte in range(256)]


def _byte_level(vocab_size: int | None) -> Tokenizer:
    if vocab_size not in (None, 257):
        raise LeapformerError(f"tokenizer.vocab_size: kind 'bytes' has 257 tokens, found {vocab_size}")
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())} | {EOS: 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = _line_wise(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trained_bpe(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    if vocab_size < 257:
        raise LeapformerError(f"tokenizer.vocab_size: kind 'bpe' needs 257 tokens or more, found {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _line_wise(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _word_level(documents: Sequence[str], vocab_size: int | None) -> Tokenizer:
    if vocab_size is not None and vocab_size < 2:
        raise LeapformerError(f"tokenizer.vocab_size: kind 'word' needs 2 tokens or more, found {vocab_size}")
    counts = Counter(word_tokens(documents, eos=EOS))
    counts.setdefault(UNK, 0)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    if vocab_size is not None and vocab_size < len(words):
        needed = {EOS, UNK}
        kept = [word for word in words if word not in needed][: vocab_size - len(needed)]
        words = [word for word in words if word in needed.union(kept)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Replace(Regex("\n"), f" {EOS} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _line_wise(inner: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split("\n", behavior="merged_with_previous"), inner])


def _finish(tokenizer: Tokenizer, *, unk: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=unk,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
