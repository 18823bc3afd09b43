"""Adaptive input and adaptive softmax for large word vocabularies (Baevski and Auli, 2019, arXiv 1809.10853).

The vocabulary, ordered by falling frequency, is cut into bands; a rarer band has embeddings `factor` times smaller.
The softmax is tied: it scores words with the embeddings of the input. Its head holds the words of the first band and
one class per further band; a tail scores the words inside its band. The training loss never builds all V logits.

Letters: N tokens, V vocabulary, D hidden size, n_i words and d_i = D / factor^i dimensions of band i.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leapformer.models.loss import IGNORE_INDEX
from leapformer.nn.plain import home_of, is_plain

# The attribute of a module that names the standard deviation of its weights at the start.
START = "_start_std"


def start_with(std: float, *modules: nn.Module) -> None:
    """Let the weights of `modules` start with standard deviation `std` instead of the configuration's."""
    for module in modules:
        setattr(module, START, std)


class AdaptiveEmbedding(nn.Module):
    """Word embeddings in bands: ids [...] int64 -> [..., D].

    vocab_size V, hidden_size D, cutoffs: rising band limits below V, factor: how much smaller each further band is,
    std: standard deviation of every word's vector at the start.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, cutoffs: list[int], factor: int = 4, std: float = 0.02):
        super().__init__()
        self.limits, self.hidden_size, self.factor = [0, *cutoffs, vocab_size], hidden_size, factor
        if hidden_size // factor ** len(cutoffs) < 1:
            raise ValueError(
                f"adaptive embedding: expected hidden_size of at least factor^bands = {factor ** len(cutoffs)}, "
                f"found {hidden_size}"
            )
        self.embeddings = nn.ModuleList()
        self.projections = nn.ModuleList()
        for band, (first, end) in enumerate(zip(self.limits[:-1], self.limits[1:], strict=True)):
            size = hidden_size // factor**band
            embedding, projection = nn.Embedding(end - first, size), nn.Linear(size, hidden_size, bias=False)
            # The first band is also the output layer. Projected, all bands have the same variance.
            start_with(std, embedding)
            start_with(size**-0.5, projection)
            self.embeddings.append(embedding)
            self.projections.append(projection)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        output = torch.zeros(
            flat.shape[0], self.hidden_size, dtype=home_of(self.embeddings[0])["dtype"], device=ids.device
        )
        for band, (embedding, projection) in enumerate(zip(self.embeddings, self.projections, strict=True)):
            first, end = self.limits[band], self.limits[band + 1]
            rows = ((flat >= first) & (flat < end)).nonzero().squeeze(1)
            vectors = projection(embedding(flat[rows] - first))
            # Autocast may give another dtype than the weights'.
            output = output.to(vectors.dtype).index_copy(0, rows, vectors)
        return output.view(*ids.shape, -1)

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Per band the embeddings [n_i, d_i] and the projection [D, d_i], for a tied softmax."""
        return [
            (_table(embedding, end - first), _matrix(projection, self.hidden_size // self.factor**band))
            for band, (embedding, projection, first, end) in enumerate(
                zip(self.embeddings, self.projections, self.limits[:-1], self.limits[1:], strict=True)
            )
        ]


def _table(embedding: nn.Module, words: int) -> Tensor:
    """The vectors [words, d] that an embedding gives, read off the module where it is plain, else asked for."""
    if is_plain(embedding, nn.Embedding):
        weight: Any = embedding.weight
        return weight
    return embedding(torch.arange(words, device=home_of(embedding)["device"]))


def _matrix(projection: nn.Module, width: int) -> Tensor:
    """The matrix [D, width] that a projection without bias multiplies with, in the same way."""
    if is_plain(projection, nn.Linear):
        weight: Any = projection.weight
        return weight
    return projection(torch.eye(width, **home_of(projection))).T


class AdaptiveSoftmax(nn.Module):
    """The tied adaptive softmax; it owns nothing but the scores of the further bands.

    `bands` are `AdaptiveEmbedding.weights()`: the parameters stay where they are, so a checkpoint holds them once.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, cutoffs: list[int], dropout: float = 0.0):
        super().__init__()
        self.limits = [0, *cutoffs, vocab_size]
        self.classes = nn.Linear(hidden_size, len(cutoffs), bias=False)
        self.dropout = nn.Dropout(dropout)

    def token_losses(self, hidden: Tensor, targets: Tensor, bands: list[tuple[Tensor, Tensor]]) -> Tensor:
        """-log p(target) in nats, [N] float32 or wider, 0 where the target is -100. hidden [N, D], targets [N]
        int64.
        """
        head_target = targets
        for band in range(1, len(bands)):
            inside = self._inside(targets, band)
            head_target = torch.where(inside, self.limits[1] + band - 1, head_target)
        losses = _cross_entropy(self._head(hidden, bands), head_target)
        for band in range(1, len(bands)):
            rows = self._inside(targets, band).nonzero().squeeze(1)
            scores = self._tail(hidden[rows], band, bands)
            losses = losses.index_add(0, rows, _cross_entropy(scores, targets[rows] - self.limits[band]))
        return losses

    def log_probabilities(self, hidden: Tensor, bands: list[tuple[Tensor, Tensor]]) -> Tensor:
        """All log-probabilities: hidden [..., D] -> [..., V], at least float32."""
        head = _log_softmax(self._head(hidden, bands))
        parts = [head[..., : self.limits[1]]]
        for band in range(1, len(bands)):
            column = self.limits[1] + band - 1
            parts.append(_log_softmax(self._tail(hidden, band, bands)) + head[..., column : column + 1])
        return torch.cat(parts, dim=-1)

    def _inside(self, targets: Tensor, band: int) -> Tensor:
        return (targets >= self.limits[band]) & (targets < self.limits[band + 1])

    def _head(self, hidden: Tensor, bands: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([F.linear(hidden, bands[0][0]), self.classes(hidden)], dim=-1)

    def _tail(self, hidden: Tensor, band: int, bands: list[tuple[Tensor, Tensor]]) -> Tensor:
        embeddings, projection = bands[band]
        return F.linear(self.dropout(hidden @ projection), embeddings)


def _wide(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(_wide(scores), targets, ignore_index=IGNORE_INDEX, reduction="none")


def _log_softmax(scores: Tensor) -> Tensor:
    return F.log_softmax(_wide(scores), dim=-1)
