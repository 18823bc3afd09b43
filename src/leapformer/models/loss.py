"""The next-token loss. Labels are shifted, never the logits: a shifted copy of the logits would be the largest
tensor.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def next_token_labels(labels: Tensor) -> Tensor:
    """Move labels [B, T] one to the left, so that place t holds the token after t; the last place is ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats: logits [N, V], targets [N] -> [N], 0 where ignored. bf16 and fp16 are summed in
    float32.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


def reduce_losses(losses: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Sum over tokens, divided by `num_items` (the Trainer's count over an accumulated batch) or by the counted
    targets.
    """
    if num_items is None:
        # A batch without a single target has loss 0, not NaN.
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(losses.device)
    return losses.sum() / num_items
