"""`task: lra-denoise`: pre-training on the inputs of a Long-Range Arena task alone, by filling in what was masked.

The largest gain that the literature knows on these tasks comes from this (Amos et al., arXiv 2310.02980): half of the
pixels of an image, 15 % of the bytes of a text or 10 % of the symbols of an expression are hidden, and the encoder says
what they were. `pretrain=denoise` in a recipe of `task: lra` runs it first, in the run's folder `pretraining`, and goes
on from its encoder.

Letters: B sequences, T tokens, M masked tokens, V symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from leapformer.models import LeapformerForMaskedLM
from leapformer.models.loss import IGNORE_INDEX
from leapformer.tasks.lra.data import SET_BY_DATA, LraData, LraRecipe
from leapformer.tasks.lra.dataset import LraDataset, PadCollator
from leapformer.tasks.lra.denoise.results import RESULTS
from leapformer.tasks.model_section import config_of, model_fields
from leapformer.training.draws import generator_for
from leapformer.training.task import ProgressOf, Task, untold

MASK_SHARES = {"listops": 0.10, "text": 0.15, "retrieval": 0.15, "image": 0.5, "pathfinder": 0.5}
COUNTED = 1000  # documents that the commonest symbol is counted on


class Documents(Dataset):
    """All documents of a split, both of each pair: items are {"input_ids": [T], "label": 0, "index": its number}."""

    def __init__(self, dataset: LraDataset) -> None:
        self.dataset = dataset
        self.names = ("input_ids", "input_ids_1") if dataset.two_documents else ("input_ids",)

    def __len__(self) -> int:
        return len(self.dataset) * len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, which = divmod(index, len(self.names))
        return {"input_ids": self.dataset[row][self.names[which]], "label": 0, "index": index}


class MaskCollator:
    """Pads a batch and hides a share of its real tokens behind `mask_id`; labels are those tokens, -100 elsewhere.

    What is hidden depends on the seed and on which documents are in the batch, and on nothing else that draws random
    numbers: it is the same in a run that was interrupted, and another in every pass over the data, whose batches are
    others.
    """

    def __init__(self, pad: PadCollator, *, share: float, mask_id: int, seed: int) -> None:
        self.pad, self.share, self.mask_id, self.seed = pad, share, mask_id, seed

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.pad(items)
        ids = batch["input_ids"]
        drawn = torch.rand(ids.shape, generator=generator_for(self.seed, [item["index"] for item in items]))
        hidden = drawn < self.share
        if "attention_mask" in batch:
            hidden &= batch["attention_mask"].bool()
        batch["labels"] = ids.masked_fill(~hidden, IGNORE_INDEX)
        batch["input_ids"] = ids.masked_fill(hidden, self.mask_id)
        return batch


class DenoiseRecipe(LraRecipe):
    """A recipe with `task: lra-denoise`; its keys are those of `task: lra`."""


class DenoiseData(LraData):
    """The documents of one recipe with masks, and its model."""

    unit = RESULTS.unit

    def __init__(self, recipe: DenoiseRecipe) -> None:
        super().__init__(recipe)
        train = self.split("train")
        share = recipe.denoise.mask_share or MASK_SHARES[recipe.data.dataset]
        # The mask is a symbol of its own behind the task's.
        self.collator = MaskCollator(
            PadCollator(train.pad_id), share=share, mask_id=train.vocab_size, seed=recipe.training.seed
        )
        self.train_dataset = Documents(train)

    def config(self) -> Any:
        return config_of(self.recipe, vocab_size=self.split("train").vocab_size + 1)

    def build_model(self) -> LeapformerForMaskedLM:
        return LeapformerForMaskedLM(self.config())

    def count_targets(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def baselines(self, split: str) -> dict[str, float]:
        """Accuracy of always saying the commonest symbol, over all tokens."""
        counts = [self._count(name) for name in ("train", split)]
        return {"majority_accuracy": float(counts[1][counts[0].argmax()] / counts[1].sum())}

    def _count(self, split: str) -> np.ndarray:
        documents = Documents(self.split(split))
        chosen = range(0, len(documents), -(-len(documents) // COUNTED))
        tokens = np.concatenate([documents[index]["input_ids"] for index in chosen])
        return np.bincount(tokens.astype(np.int64), minlength=self.split(split).vocab_size)

    @torch.no_grad()
    def metrics(self, model: Any, dataset: LraDataset, indices: Iterable[int], *, told: str = "") -> dict[str, float]:
        """Mean loss in nats and accuracy on the masked tokens, and its standard error."""
        was_training = model.training
        model.eval()
        documents, nats, right, count = Documents(dataset), 0.0, 0, 0
        size = max(1, self.recipe.training.eval_batch_tokens // dataset.max_length)
        indices = list(indices)
        starts = range(0, len(indices), size)
        for start in self.progress(starts, told) if told else starts:
            batch = self.collator([documents[index] for index in indices[start : start + size]])
            found = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            targets = batch["labels"][batch["labels"] != IGNORE_INDEX].to(model.device)
            nats += float(found.loss) * len(targets)
            right += int((found.logits.argmax(-1) == targets).sum())
            count += len(targets)
        model.train(was_training)
        accuracy = right / max(count, 1)
        error = math.sqrt(accuracy * (1 - accuracy) / max(count, 1))
        return {"loss": nats / max(count, 1), "accuracy": accuracy, "accuracy_error": error, "examples": len(indices)}


class DenoiseTask(Task):
    """`task: lra-denoise`."""

    name = "lra-denoise"
    recipe_type = DenoiseRecipe
    results = RESULTS
    model_classes = (LeapformerForMaskedLM,)
    model_fields = model_fields(*SET_BY_DATA)

    def prepare(
        self, recipe: DenoiseRecipe, *, cache: Path, tokenizer: Any = None, progress: ProgressOf = untold
    ) -> DenoiseData:
        """Open the prepared data; nothing is cached."""
        data = DenoiseData(recipe)
        data.progress = progress
        return data


def pretraining_recipe(recipe: LraRecipe) -> DenoiseRecipe:
    """The recipe whose encoder a run with `pretrain: denoise` starts from."""
    content, section = recipe.to_dict(), recipe.denoise
    steps = section.pretrain_steps or recipe.training.max_steps
    content["training"] |= {
        "max_steps": steps,
        "learning_rate": section.pretrain_learning_rate or recipe.training.learning_rate,
        "warmup_steps": min(recipe.training.warmup_steps, steps // 10),
    }
    return DenoiseRecipe.model_validate(content | {"task": DenoiseTask.name, "pretrain": "none"})


TASK = DenoiseTask()
