"""The recipe of a Long-Range Arena task, its data and its metrics: accuracy beside trivial baselines.

Letters: B sequences, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from leapformer.errors import LeapformerError
from leapformer.models import LeapformerForSequenceClassification
from leapformer.tasks.lra.baselines import majority_baseline, root_operator_baseline
from leapformer.tasks.lra.dataset import LraDataset, PadCollator, load
from leapformer.tasks.lra.results import RESULTS
from leapformer.tasks.model_section import build_config, config_of
from leapformer.training.recipes import MOST_RATE, MOST_STEPS, MOST_TOKENS, Recipe, Section, expand_path
from leapformer.training.task import TaskData

SET_BY_DATA = ("num_labels", "paired_inputs")


class DataSection(Section):
    """Which prepared data, and how much of each document."""

    dataset: Literal["listops", "text", "retrieval", "image", "pathfinder"]
    path: str = Field(description="folder that `leapformer data prepare` filled, $VARIABLES allowed")
    max_length: int | None = Field(
        default=None, ge=1, le=MOST_TOKENS, description="cut documents of text and retrieval here; none: as prepared"
    )
    brackets: bool = Field(
        default=True, description="false: ListOps without closing brackets, as an older harness had it"
    )


class DenoiseSection(Section):
    """How `pretrain: denoise` goes; what is not given is as in the training that follows."""

    mask_share: float | None = Field(
        default=None, gt=0, lt=1, description="of the tokens; none: 0.1 of ListOps, 0.15 of bytes, 0.5 of pixels"
    )
    pretrain_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    pretrain_learning_rate: float | None = Field(default=None, gt=0, le=MOST_RATE)


class LraRecipe(Recipe):
    """A recipe with `task: lra`."""

    data: DataSection
    pretrain: Literal["none", "denoise"] = Field(
        default="none", description="denoise: first fill in masked tokens of the task's own inputs"
    )
    denoise: DenoiseSection = Field(default_factory=DenoiseSection)

    @field_validator("model", mode="after")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        build_config(model, vocab_size=256, num_labels=2)
        return model


class LraData(TaskData):
    """The three splits of one recipe, and its model."""

    unit = RESULTS.unit

    def __init__(self, recipe: LraRecipe) -> None:
        self.recipe = recipe
        self._splits: dict[str, LraDataset] = {}
        self.train_dataset = train = self.split("train")
        self.collator = PadCollator(train.pad_id)
        limit = self.config().length_limit()
        if limit is not None and train.max_length > limit[0]:
            raise LeapformerError(
                f"recipe {recipe.name}: model.max_position_embeddings: expected at least the {train.max_length} tokens "
                "of "
                f"the longest document, found {limit[0]}; {limit[1]}"
            )

    def split(self, name: str) -> LraDataset:
        """The examples of a split, mapped once.

        Raises:
            LeapformerError: there is no such split, or the folder does not hold such data.
        """
        section = self.recipe.data
        if name not in self._splits:
            self._splits[name] = load(
                section.dataset,
                expand_path(section.path, key="data.path"),
                name,
                max_length=section.max_length,
                brackets=section.brackets,
            )
        return self._splits[name]

    def config(self) -> Any:
        train = self.split("train")
        return config_of(
            self.recipe,
            vocab_size=train.vocab_size,
            num_labels=train.num_classes,
            paired_inputs=train.two_documents,
        )

    def build_model(self) -> PreTrainedModel:
        return LeapformerForSequenceClassification(self.config())

    def check_model(self, model: Any) -> None:
        own, found = self.config(), model.config
        for name in ("vocab_size", "num_labels", "paired_inputs"):
            if getattr(found, name) != getattr(own, name):
                raise LeapformerError(
                    f"recipe {self.recipe.name}: expected a model of {name}={getattr(own, name)}, as the data has it, "
                    "found "
                    f"{getattr(found, name)}"
                )
        limit, longest = found.length_limit(), self.split("train").max_length
        if limit is not None and longest > limit[0]:
            raise LeapformerError(
                f"recipe {self.recipe.name}: expected a model that takes the {longest} tokens of the longest document, "
                "found "
                f"one of max_position_embeddings={limit[0]}; {limit[1]}"
            )

    def take_over(self, model: Any, pretrained: Any) -> None:
        """The encoder of a model that filled in masks; its last symbol was the mask."""
        weights = pretrained.model.state_dict()
        weights["embed_tokens.weight"] = weights["embed_tokens.weight"][: self.split("train").vocab_size]
        model.model.load_state_dict(weights)

    def count_targets(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def quick_metrics(self, model: Any) -> dict[str, float]:
        """Loss and accuracy on examples spread evenly over the validation set."""
        dataset = self.split("validation")
        wanted = max(1, self.recipe.training.eval_tokens // dataset.max_length)
        found = self.metrics(model, dataset, range(0, len(dataset), -(-len(dataset) // wanted)))
        return {"loss": found["loss"], "accuracy": found["accuracy"]}

    def evaluate(self, model: Any, *, split: str) -> dict[str, Any]:
        """Metrics and trivial baselines of a whole split."""
        dataset = self.split(split)
        found = self.metrics(model, dataset, range(len(dataset)), told=f"evaluating the {split} split")
        return {"metrics": {**found, **self.baselines(split)}}

    def baselines(self, split: str) -> dict[str, float]:
        """Accuracies that need no model: the commonest label, and for ListOps that of each first symbol."""
        train, dataset = self.split("train"), self.split(split)
        found = {"majority_accuracy": majority_baseline(train, dataset)}
        if dataset.task == "listops":
            found["root_operator_accuracy"] = root_operator_baseline(train, dataset)
        return found

    @torch.no_grad()
    def metrics(self, model: Any, dataset: LraDataset, indices: Iterable[int], *, told: str = "") -> dict[str, float]:
        """Mean loss in nats, accuracy and its standard error, with the model in evaluation mode; ``told``: to
        ``progress``.
        """
        was_training = model.training
        model.eval()
        nats, right, count = 0.0, 0, 0
        size = max(1, self.recipe.training.eval_batch_tokens // dataset.max_length)
        indices = list(indices)
        starts = range(0, len(indices), size)
        for start in self.progress(starts, told) if told else starts:
            batch = self.collator([dataset[index] for index in indices[start : start + size]])
            labels = batch.pop("labels").to(model.device)
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.float()  # [B, N]
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        model.train(was_training)
        accuracy = right / count
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        return {"loss": nats / count, "accuracy": accuracy, "accuracy_error": error, "examples": count}
