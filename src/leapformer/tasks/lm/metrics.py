"""Metrics of a language model from summed nats and counts.

The unit of everything summed is the nat. A model's tokens are only a way of writing the text: results of different
tokenizers are comparable per byte and per word, where words are those of `corpora.count_words`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from leapformer.tasks.lm.packing import IGNORED_LABEL


def word_perplexity(nats: float, words: int) -> float:
    """exp(nats / words); infinite where that is beyond a float."""
    _positive(words, "words")
    return _safe_exp(nats / words)


def bits_per_byte(nats: float, size: int) -> float:
    """nats / (ln 2 * bytes)."""
    _positive(size, "bytes")
    return nats / (math.log(2.0) * size)


def _positive(count: int, name: str) -> None:
    if count <= 0:
        raise ValueError(f"metrics: expected a positive number of {name}, got {count}")


def _safe_exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class SplitMetrics:
    """What a results file says of one split.

    Arguments:
        loss: nats per predicted token.
        bits_per_byte, word_perplexity: comparable between tokenizers.
        tokens: predicted tokens. words, bytes: of the evaluated text.
    """

    loss: float
    bits_per_byte: float
    word_perplexity: float
    tokens: int
    words: int
    bytes: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class LossByPosition:
    """Sums nats and counts by position, over batches; kept in float64 and int64 on the CPU.

    Position p is that of the token a prediction is made from: p tokens of context come before it. In a block of L
    tokens it runs from 0 to L - 2; for blocks that are packed within documents it begins again at each document.

    Arguments:
        length: number of positions, L - 1.
    """

    def __init__(self, length: int) -> None:
        _positive(length, "positions")
        self.nats = np.zeros(length, dtype=np.float64)
        self.counts = np.zeros(length, dtype=np.int64)

    def add(self, losses: torch.Tensor, labels: torch.Tensor, *, position_ids: torch.Tensor | None = None) -> None:
        """Adds a batch.

        Arguments:
            losses: [B, T - 1], nats of labels[:, 1:], floating; read only where that label is not -100.
            labels: [B, T] int64, -100 where nothing is predicted.
            position_ids: [B, T], default 0 to T - 1 in each row.
        """
        B, T = labels.shape
        if losses.shape != (B, T - 1):
            raise ValueError(f"losses: expected shape {(B, T - 1)} for labels {(B, T)}, got {tuple(losses.shape)}")
        if position_ids is None:
            position_ids = torch.arange(T, device=labels.device).expand(B, T)
        elif position_ids.shape != labels.shape:
            raise ValueError(f"position_ids: expected shape {(B, T)}, got {tuple(position_ids.shape)}")
        kept = labels[:, 1:] != IGNORED_LABEL
        positions = position_ids[:, :-1][kept].cpu().numpy()
        if positions.size and int(positions.max()) >= len(self.nats):
            raise ValueError(f"position_ids: expected less than {len(self.nats)}, got {int(positions.max())}")
        nats = losses.detach()[kept].to(device="cpu", dtype=torch.float64).numpy()
        self.nats += np.bincount(positions, weights=nats, minlength=len(self.nats))
        self.counts += np.bincount(positions, minlength=len(self.counts))

    @property
    def total_nats(self) -> float:
        return float(self.nats.sum())

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def metrics(self, *, words: int, size: int) -> SplitMetrics:
        """The metrics of a text of `words` word-level tokens and `size` bytes."""
        _positive(self.tokens, "predicted tokens")
        return SplitMetrics(
            loss=self.total_nats / self.tokens,
            bits_per_byte=bits_per_byte(self.total_nats, size),
            word_perplexity=word_perplexity(self.total_nats, words),
            tokens=self.tokens,
            words=words,
            bytes=size,
        )

    def perplexity(self, *, bins: int | None = None) -> list[dict[str, float]]:
        """Perplexity per token by position, in `bins` equal stretches (default: every position on its own).

        Each entry has `start` and `end` (end excluded), `tokens` and `perplexity`; stretches without tokens are left
        out.
        """
        length = len(self.counts)
        edges = np.unique(np.linspace(0, length, min(bins or length, length) + 1).round().astype(int))
        rows = []
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            tokens = int(self.counts[start:end].sum())
            if tokens:
                perplexity = _safe_exp(float(self.nats[start:end].sum()) / tokens)
                rows.append({"start": start, "end": end, "tokens": tokens, "perplexity": perplexity})
        return rows
