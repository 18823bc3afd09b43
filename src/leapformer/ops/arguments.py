"""What one call of attention is given, checked and lowered: the form in which every implementation gets it.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank of the re-weighting, r hidden units of a
LeaP module, K key width, V value width, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class LeapWeights(NamedTuple):
    """Weights of one LeaP module: proportion = sigmoid(w2 . relu(w1 x + b1) + b2) for each head's ReLU'd vector x.

    ``w1`` [1 or H, r, K], ``b1`` [1 or H, r], ``w2`` [1 or H, r], ``b2`` [1 or H]. Without a hidden layer (r = 1 in the
    paper's count) w1 and b1 are None and w2 is [1 or H, K]. For keys the head axis is 1 or G. (arXiv 2405.13046, sec.
    3)
    """

    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor


class Arguments(NamedTuple):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], q_factors [B,T,H|1,R], k_factors [B,S,G|1,R], or in their place (R = 2 m)
    q_angles [B,T,H|1,m], k_angles [B,S,G|1,m], log_decay [B,T,H] (then G = H), later_decay [B,T,H] (``causal`` with a
    log_decay; then later keys are seen too, each multiplied by exp of the sum over t <= s < j), kv [N,G,R,K,V] and z
    [N,G,R,K] the initial state, weights of LeaP modules for queries and keys (then no factors), key_mask [B,S] (True =
    real), counts int64 [B or 1,T] of the keys each query sees (None: all, or ``causal``), cu_seqlens and cu_seqlens_k
    [N + 1] or neither; relu: features are those of relu(q) and relu(k).

    Tensors come first, and of them those that may have a gradient, in the order of ``Gradients``; then numbers. What is
    not given has its default, and only implementations that take a field are ever given another value of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factors: Tensor | None = None
    k_factors: Tensor | None = None
    q_angles: Tensor | None = None
    k_angles: Tensor | None = None
    log_decay: Tensor | None = None
    later_decay: Tensor | None = None
    kv: Tensor | None = None
    z: Tensor | None = None
    q_w1: Tensor | None = None
    q_b1: Tensor | None = None
    q_w2: Tensor | None = None
    q_b2: Tensor | None = None
    k_w1: Tensor | None = None
    k_b1: Tensor | None = None
    k_w2: Tensor | None = None
    k_b2: Tensor | None = None
    key_mask: Tensor | None = None
    counts: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    causal: bool = False
    normalize: bool = True
    eps: float = 1e-6
    relu: bool = False

    def but(self, **changes: Any) -> Arguments:
        """A copy with other values in some fields: ``_replace`` in words that torch.compile follows."""
        fields: dict[str, Any] = dict(zip(FIELDS, self, strict=True))
        fields.update(changes)
        return Arguments(**fields)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The fields that may have a gradient."""
        return self[:DIFFERENTIABLE]

    @property
    def q_leap(self) -> LeapWeights | None:
        return (
            None if self.q_w2 is None or self.q_b2 is None else LeapWeights(self.q_w1, self.q_b1, self.q_w2, self.q_b2)
        )

    @property
    def k_leap(self) -> LeapWeights | None:
        return (
            None if self.k_w2 is None or self.k_b2 is None else LeapWeights(self.k_w1, self.k_b1, self.k_w2, self.k_b2)
        )

    @property
    def hidden(self) -> int:
        """The hidden units of the larger LeaP module; 0 where there are none."""
        return max(0 if w1 is None else w1.shape[1] for w1 in (self.q_w1, self.k_w1))

    @property
    def sequences(self) -> int:
        """N, which is B where nothing is packed."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def rank(self) -> int:
        if self.q_w2 is not None:
            return 2
        if self.q_angles is not None:
            return 2 * self.q_angles.shape[-1]
        return 1 if self.q_factors is None else self.q_factors.shape[-1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which sums are taken where the inputs' own dtype is too small for them."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def is_step(self) -> bool:
        """Whether this is one token after another's state."""
        return self.q.shape[1] == self.k.shape[1] == 1 and self.counts is None and self.cu_seqlens is None


class Incoming(NamedTuple):
    """The gradients of a call's results: output [B,T,H,V], and the final kv and z, None where nothing depends on
    them."""

    output: Tensor
    kv: Tensor | None
    z: Tensor | None


class Gradients(NamedTuple):
    """The gradient of each differentiable field of ``Arguments``; None where the field has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factors: Tensor | None = None
    k_factors: Tensor | None = None
    q_angles: Tensor | None = None
    k_angles: Tensor | None = None
    log_decay: Tensor | None = None
    later_decay: Tensor | None = None
    kv: Tensor | None = None
    z: Tensor | None = None
    q_w1: Tensor | None = None
    q_b1: Tensor | None = None
    q_w2: Tensor | None = None
    q_b2: Tensor | None = None
    k_w1: Tensor | None = None
    k_b1: Tensor | None = None
    k_w2: Tensor | None = None
    k_b2: Tensor | None = None


def by_name(side: str, weights: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """w1, b1, w2 and b2 of the LeaP module of one side, "q" or "k", by the names of ``Arguments``."""
    return {f"{side}_{name}": weight for name, weight in zip(LeapWeights._fields, weights, strict=True)}


FIELDS = Arguments._fields
DIFFERENTIABLE = 19  # of the fields
TENSORS = 23  # of the fields; the others are numbers
NUMBERS = {name: kind for name, kind in get_type_hints(Arguments).items() if name in FIELDS[TENSORS:]}
FACTORS = frozenset(("q_factors", "k_factors"))
ANGLES = frozenset(("q_angles", "k_angles"))
MODULES = frozenset(f"{side}_{weight}" for side in "qk" for weight in LeapWeights._fields)
