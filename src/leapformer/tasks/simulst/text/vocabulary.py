"""sentencepiece vocabularies: text to pieces and back, trained on the lines of a data set.

The first ids are fixed: padding 0, begin 1, end 2, unknown 3, as `LeapformerTranslationConfig` has them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.reading import read_bytes
from leapformer.files.writing import write_bytes

PAD, BEGIN, END, UNKNOWN = range(4)
SPECIAL = (PAD, BEGIN, END)
_RESERVED = dict.fromkeys(map(ord, "\0\u2585"), " ")
WORD_START = "\u2581"  # what sentencepiece writes in place of the space before a word


class Vocabulary:
    """The pieces of one language.

    Arguments:
        model: what sentencepiece wrote, bytes.

    Raises:
        ValueError: they are no model, or its first ids are others than the above.
        MissingExtra: sentencepiece is not installed.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = _sentencepiece().SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError(f"expected a sentencepiece model, found {len(model):,} bytes of something else") from None
        ids = tuple(getattr(self._processor, f"{name}_id")() for name in ("pad", "bos", "eos", "unk"))
        if ids != (PAD, BEGIN, END, UNKNOWN):
            raise ValueError(f"expected pad, bos, eos, unk with ids 0 to 3, found {ids}")
        self._starts = [self.piece(number).startswith(WORD_START) for number in range(len(self))]

    @classmethod
    def train(cls, lines: Iterable[str], size: int, *, kind: str = "unigram") -> Vocabulary:
        """The vocabulary of some text; the same lines give the same.

        Arguments:
            lines: sentences.
            size: of the vocabulary with the four special ids; less where the text does not have so many pieces.
            kind: "unigram", "bpe", "char" or "word", as sentencepiece has them.

        Raises:
            LeapformerError: the text is too small for the size, or the size for its characters.
        """
        output, lines = io.BytesIO(), [_trainable(line) for line in lines]
        if not lines:
            raise LeapformerError("vocabulary: expected lines of text, found none")
        try:
            _sentencepiece().SentencePieceTrainer.Train(
                sentence_iterator=iter(lines),
                model_writer=output,
                vocab_size=size,
                model_type=kind,
                pad_id=PAD,
                bos_id=BEGIN,
                eos_id=END,
                unk_id=UNKNOWN,
                character_coverage=1.0,
                hard_vocab_limit=False,
                num_threads=1,
                minloglevel=2,
                max_sentence_length=max(10, *(len(line.encode()) + 1 for line in lines)),  # no less than 10 is taken
            )
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[-200:]
            raise LeapformerError(f"vocabulary of {size:,} {kind} pieces from {len(lines):,} lines: {reason}") from None
        return cls(output.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote. Raises LeapformerError where it is missing or something else."""
        try:
            os.stat(path)
            return cls(read_bytes(path))
        except OSError as error:
            raise LeapformerError(f"{path}: expected a sentencepiece model, found {error.strerror or error}") from None
        except ValueError as error:
            raise LeapformerError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the model; it gets its name only when it is whole."""
        write_bytes(path, self._model, shared=True)

    def __len__(self) -> int:
        return self._processor.GetPieceSize()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._model == other._model

    __hash__ = None  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin and end."""
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ones are nothing."""
        return self._processor.DecodeIds([number for number in ids if number not in SPECIAL])

    def piece(self, number: int) -> str:
        """The piece with an id, a space being the sign for the start of a word."""
        return self._processor.IdToPiece(number)

    def starts_word(self, number: int) -> bool:
        """Whether the piece with an id begins a new word, so that the one before it is complete."""
        return self._starts[number]


def _trainable(line: str) -> str:
    """A line without the characters for whose sake sentencepiece's training would pass over all of it, unsaid."""
    return line.translate(_RESERVED)


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtra("speech", package="sentencepiece", purpose="the vocabularies of translation") from None
    return sentencepiece
