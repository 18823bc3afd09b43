"""Random draws that depend on a seed and on what is drawn for, and on nothing else that draws random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def generator_for(seed: int, indices: Sequence[int]) -> torch.Generator:
    """A generator for the batch with these examples: the same in a run that was interrupted.

    In another pass over the data the batches are others, and so are the draws.
    """
    digest = hashlib.sha256(np.array([seed, *indices], dtype="<i8").tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
