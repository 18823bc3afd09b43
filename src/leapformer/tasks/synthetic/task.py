"""Synthetic tasks as a task of the training: the causal language model, asked at some places of sequences that are
made on the fly.

B: sequences of a batch, T: tokens of each, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown
from leapformer.models import LeapformerForCausalLM
from leapformer.models.loss import IGNORE_INDEX, next_token_labels
from leapformer.tasks.model_section import config_of, model_fields
from leapformer.tasks.synthetic.data import Sequences, chance, collate
from leapformer.tasks.synthetic.recipe import SyntheticRecipe, too_long
from leapformer.tasks.synthetic.results import RESULTS, at
from leapformer.training.task import ProgressOf, Task, TaskData, untold

SPLITS = ("train", "validation", "test")
EVALUATED = 512  # sequences of a split at each length
MOST_EXAMPLES = 1 << 20  # of a training, each seen once; one of more sees them again, in another order


class SyntheticData(TaskData):
    """The sequences of one recipe, and its model."""

    unit = RESULTS.unit

    def __init__(self, recipe: SyntheticRecipe) -> None:
        self.recipe, self.collator = recipe, collate
        self.kind = recipe.data.task_kind
        self.config = config_of(recipe, vocab_size=self.kind.vocab_size)
        section = recipe.training
        self.train_dataset = Sequences(
            self.kind,
            length=recipe.data.lengths[0],
            seed=section.seed,
            stream="train",
            count=min(section.max_steps * section.batch_size * section.accumulation, MOST_EXAMPLES),
        )

    def split(self, name: str, *, length: int) -> Sequences:
        """The sequences of a split: those of validation and test are the same in every run.

        Raises:
            LeapformerError: there is no such split.
        """
        if name not in SPLITS:
            raise LeapformerError(f"split {shown(name)}: expected one of {', '.join(SPLITS)}")
        seed = self.recipe.training.seed if name == "train" else 0
        return Sequences(self.kind, length=length, seed=seed, stream=name, count=EVALUATED)

    def build_model(self) -> LeapformerForCausalLM:
        return LeapformerForCausalLM(self.config)

    def check_model(self, model: Any) -> None:
        if model.config.vocab_size != self.config.vocab_size:
            raise LeapformerError(
                f"recipe {self.recipe.name}: expected a model of vocab_size={self.config.vocab_size}, as the data has "
                f"it, found {model.config.vocab_size}"
            )
        limit = model.config.length_limit()
        fault = None if limit is None else too_long(self.recipe.data, *limit)
        if fault is not None:
            raise LeapformerError(f"recipe {self.recipe.name}: {fault}")

    def describe_model(self, model: Any) -> dict[str, Any]:
        section = self.recipe.data
        return {**super().describe_model(model), "kind": section.kind, "length": section.length}

    def count_targets(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def quick_metrics(self, model: Any) -> dict[str, float]:
        """Loss and accuracy at the trained length on the first examples of the validation set."""
        dataset = self.split("validation", length=self.recipe.data.lengths[0])
        wanted = max(1, self.recipe.training.eval_tokens // dataset.length)
        found = self.measure(model, dataset, range(min(wanted, len(dataset))))
        return {"loss": found["loss"], "accuracy": found["accuracy"]}

    def evaluate(self, model: Any, *, split: str) -> dict[str, Any]:
        """Loss, accuracy with its standard error, and chance, of a whole split at every length."""
        metrics: dict[str, float] = {}
        for times, length in zip(self.recipe.data.evaluate_at, self.recipe.data.lengths, strict=True):
            dataset = self.split(split, length=length)
            told = f"evaluating the {split} split at {length} tokens"
            found = {**self.measure(model, dataset, range(len(dataset)), told=told), "chance": chance(dataset)}
            metrics |= {at(name, times): value for name, value in found.items()}
        return {"metrics": {**metrics, "examples": EVALUATED}}

    @torch.no_grad()
    def measure(self, model: Any, dataset: Sequences, indices: Sequence[int], *, told: str = "") -> dict[str, float]:
        """Mean loss in nats and accuracy over what is asked, and its standard error; ``told``: to ``progress``."""
        was_training = model.training
        model.eval()
        nats, right, count = 0.0, 0, 0
        size = max(1, self.recipe.training.eval_batch_tokens // dataset.length)
        starts = range(0, len(indices), size)
        for start in self.progress(starts, told) if told else starts:
            batch = dataset.batch(indices[start : start + size])
            targets = next_token_labels(batch["labels"]).to(model.device)
            asked = targets != IGNORE_INDEX
            logits = model(batch["input_ids"].to(model.device), use_cache=False).logits[asked].float()
            nats += float(F.cross_entropy(logits, targets[asked], reduction="sum"))
            right += int((logits.argmax(-1) == targets[asked]).sum())
            count += int(asked.sum())
        model.train(was_training)
        accuracy = right / count
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        return {"loss": nats / count, "accuracy": accuracy, "accuracy_error": error}


class SyntheticTask(Task):
    """`task: synthetic`."""

    name = "synthetic"
    recipe_type = SyntheticRecipe
    results = RESULTS
    model_classes = (LeapformerForCausalLM,)
    model_fields = model_fields()

    def prepare(
        self, recipe: SyntheticRecipe, *, cache: Path, tokenizer: Any = None, progress: ProgressOf = untold
    ) -> SyntheticData:
        """Nothing is read, and nothing is cached."""
        data = SyntheticData(recipe)
        data.progress = progress
        return data


TASK = SyntheticTask()
