"""Loss and accuracy of a translation model where the target is given: every token is told after the right ones before
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leapformer.models.loss import IGNORE_INDEX
from leapformer.tasks.simulst.examples import TranslationCollator, TranslationDataset
from leapformer.tasks.simulst.scoring.evaluation import batches_by_length
from leapformer.training.task import ProgressOf, untold


@torch.no_grad()
def given_target_metrics(
    model: Any,
    dataset: TranslationDataset,
    indices: Sequence[int],
    *,
    k: int | None,
    size: int,
    progress: ProgressOf = untold,
    told: str = "",
) -> dict[str, float]:
    """Mean loss in nats per token (no smoothing, no CTC), perplexity and accuracy, with the model in evaluation mode.

    Arguments:
        k: of wait-k; None: the whole source.
        size: frames or source tokens of a batch.
        told: to `progress`; "": nothing is.
    """
    was_training = model.training
    model.eval()
    collate = TranslationCollator()
    batches = batches_by_length(dataset, indices, size=size)
    nats, right, count = 0.0, 0, 0
    for number in progress(range(len(batches)), told) if told else range(len(batches)):
        batch = collate([dataset[index] for index in batches[number]])
        batch["k"] = k
        batch = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        found = model(**batch)
        real = batch["labels"] != IGNORE_INDEX
        tokens = int(real.sum())
        nats += float(found.nll) * tokens
        right += int((found.logits.argmax(-1) == batch["labels"])[real].sum())
        count += tokens
    model.train(was_training)
    loss = nats / count
    perplexity = float(torch.tensor(loss).exp())
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": right / count, "sentences": len(indices)}
