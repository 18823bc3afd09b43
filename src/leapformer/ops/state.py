"""The state of linear attention: everything the past can say to the future.

Letters: B batch (or packed sequences), G state heads, H query heads, R rank of the re-weighting, K key width, V value
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LinearState(NamedTuple):
    """Sums over the keys seen so far, numerator and normaliser together (a pytree of tensors, at least float32).

    ``kv`` [B, G, R, K, V] is ``sum_j decay_j g_r(P_j) k_j v_j^T`` and ``z`` [B, G, R, K] is ``sum_j decay_j g_r(P_j)
    k_j``. ``log_decay`` [B, H] is the total log decay of the absorbed stretch, or None where there is no decay. With a
    decay every query head has a state of its own, so G = H.
    """

    kv: Tensor
    z: Tensor
    log_decay: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        rank: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        decay_heads: int | None = None,
    ) -> LinearState:
        """The state of an empty past; ``decay_heads`` = H for attention with a decay."""
        kv = torch.zeros(batch, heads, rank, key_dim, value_dim, dtype=dtype, device=device)
        z = torch.zeros(batch, heads, rank, key_dim, dtype=dtype, device=device)
        decay = None if decay_heads is None else torch.zeros(batch, decay_heads, dtype=dtype, device=device)
        return cls(kv, z, decay)

    def merge(self, later: LinearState) -> LinearState:
        """The state of this stretch followed by ``later``, which was computed from an empty past."""
        if later.log_decay is None:
            return LinearState(self.kv + later.kv, self.z + later.z, self.log_decay)
        keep = later.log_decay.exp()
        own = torch.zeros_like(later.log_decay) if self.log_decay is None else self.log_decay
        kv = self.kv * keep[:, :, None, None, None] + later.kv
        z = self.z * keep[:, :, None, None] + later.z
        return LinearState(kv, z, own + later.log_decay)

    def select(self, index: int | slice | Tensor) -> LinearState:
        """The rows ``index`` of the batch; an int keeps the batch axis (of length 1)."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return self._map(lambda field: field[index])

    def reorder(self, index: Tensor) -> LinearState:
        """Row b of the result is row ``index[b]`` of this state (beam search); ``index`` is int64 [B]."""
        return self._map(lambda field: field.index_select(0, index))

    def clone(self) -> LinearState:
        """An independent copy."""
        return self._map(Tensor.clone)

    def _map(self, change: Callable[[Tensor], Tensor]) -> LinearState:
        decay = None if self.log_decay is None else change(self.log_decay)
        return LinearState(change(self.kv), change(self.z), decay)

    def copy_(self, other: LinearState) -> LinearState:
        """Overwrite this state in place (addresses stay) with ``other`` and return it."""
        if (self.log_decay is None) != (other.log_decay is None):
            raise ValueError("LinearState.copy_: one state has log_decay and the other has none")
        for own, new in zip(self, other, strict=True):
            if own is not None and new is not None:
                if own.shape != new.shape:
                    raise ValueError(f"LinearState.copy_: expected shape {tuple(own.shape)}, got {tuple(new.shape)}")
                own.copy_(new)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors of this state."""
        return sum(field.numel() * field.element_size() for field in self if field is not None)
