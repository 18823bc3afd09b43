"""Feature maps: what makes queries and keys non-negative, all but "silu". x [..., K] -> [..., K], elementwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 (arXiv 2006.16236, eq. 7)."""
    return F.elu(x) + 1


FeatureMap = Callable[[Tensor], Tensor]
FEATURE_MAPS: dict[str, FeatureMap] = {"relu": torch.relu, "elu": elu_plus_one, "silu": F.silu}
