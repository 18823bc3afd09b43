"""Parity as a task: its recipe, its data, its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.nn import functional as F
from torch.utils.data import Dataset

from leapformer.models import LeapformerForSequenceClassification
from leapformer.tasks.model_section import config_of, model_fields
from leapformer.training.recipes import Recipe, Section
from leapformer.training.task import ProgressOf, Task, TaskData, untold

from .results import RESULTS


class ParityModel(LeapformerForSequenceClassification):
    """A model class of the task's own."""


class DataSection(Section):
    """How long the sequences are."""

    length: int = Field(default=8, ge=1, le=64)


class ParityRecipe(Recipe):
    """A recipe with `task: parity`."""

    data: DataSection


class Bits(Dataset):
    """Drawn sequences."""

    def __init__(self, count: int, length: int, *, seed: int) -> None:
        self.bits = torch.randint(0, 2, (count, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.bits[index], "labels": self.bits[index].sum() % 2}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class ParityData(TaskData):
    """Drawn sequences for training and validation."""

    unit = RESULTS.unit

    def __init__(self, recipe: ParityRecipe) -> None:
        self.recipe, self.collator = recipe, collate
        self.train_dataset = Bits(64, recipe.data.length, seed=0)

    def build_model(self) -> ParityModel:
        return ParityModel(config_of(self.recipe, vocab_size=2, num_labels=2))

    def check_model(self, model: Any) -> None:
        """Any model of two symbols will do."""

    def count_targets(self, batch: dict[str, Any]) -> int:
        return len(batch["labels"])

    def quick_metrics(self, model: Any) -> dict[str, float]:
        return self.evaluate(model, split="validation")["metrics"]

    @torch.no_grad()
    def evaluate(self, model: Any, *, split: str) -> dict[str, Any]:
        batch = collate([*Bits(32, self.recipe.data.length, seed=1)])
        logits = model.eval()(input_ids=batch["input_ids"]).logits.float()
        right = (logits.argmax(-1) == batch["labels"]).float().mean()
        return {"metrics": {"loss": float(F.cross_entropy(logits, batch["labels"])), "right": float(right)}}


class ParityTask(Task):
    """`task: parity`."""

    name = "parity"
    recipe_type = ParityRecipe
    results = RESULTS
    model_classes = (ParityModel,)
    model_fields = model_fields("num_labels")

    def prepare(
        self, recipe: ParityRecipe, *, cache: Path, tokenizer: Any = None, progress: ProgressOf = untold
    ) -> ParityData:
        return ParityData(recipe)


TASK = ParityTask()
