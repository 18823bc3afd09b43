"""What a task brings to the training: its recipe's sections, its data, its model and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel

from leapformer.training.loading import check_fit, load_model, saved_tokenizer
from leapformer.training.recipes import Recipe
from leapformer.training.results import TaskResults

# Wraps what takes long, told what it is; a command puts a bar there.
ProgressOf = Callable[[Sequence[int], str], Iterable[int]]


def untold(items: Sequence[int], what: str) -> Iterable[int]:
    """The items as they are: nobody watches."""
    return items


class TaskData(ABC):
    """The prepared data of one recipe."""

    unit: str  # what the loss is a mean over, in the plural: "tokens" or "examples"
    tokenizer: Any = None  # saved beside the model with its save_pretrained, where there is one
    train_dataset: Dataset
    # Of every training example: batches are then made of examples of about one length. None: of any.
    train_lengths: Sequence[int] | None = None
    progress: ProgressOf = staticmethod(untold)
    collator: Callable[[list[Any]], dict[str, Any]]

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """A model with fresh weights, drawn from torch's global generator."""

    def take_over(self, model: PreTrainedModel, pretrained: PreTrainedModel) -> None:
        """Give `model` what it takes over from the model of `Task.pretraining`."""
        raise NotImplementedError

    @abstractmethod
    def check_model(self, model: Any) -> None:
        """Check that a model which was loaded can take this data.

        Raises:
            LeapformerError: it is one of other data.
        """

    def describe_model(self, model: Any) -> dict[str, Any]:
        """What results.json says of the model's kind."""
        config = model.config
        return {"attention": config.attention, "variant": config.variant, "conv_width": config.conv_width}

    @abstractmethod
    def count_targets(self, batch: dict[str, Any]) -> int:
        """How many of them a collated batch has."""

    @abstractmethod
    def quick_metrics(self, model: PreTrainedModel) -> dict[str, float]:
        """Metrics on a fixed part of the validation set, "loss" among them (lower is better)."""

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, *, split: str) -> dict[str, Any]:
        """All metrics on a whole split.

        Returns:
            A mapping with "metrics" for the split and further keys that go into results.json as they are.

        Raises:
            LeapformerError: there is no such split.
        """


class Task(ABC):
    """A kind of problem that recipes can name."""

    name: str
    recipe_type: type[Recipe]
    results: TaskResults  # what its runs have in results.json
    model_classes: tuple[type[PreTrainedModel], ...]  # that its models may be of
    model_fields: Mapping[str, Any]  # what a recipe may say of the model, with the types

    @abstractmethod
    def prepare(self, recipe: Any, *, cache: Path, tokenizer: Any = None, progress: ProgressOf = untold) -> TaskData:
        """Load and encode the data of a validated recipe; what takes long is kept under `cache`.

        Arguments:
            tokenizer: that of a trained model; None trains or builds the recipe's.
            progress: wraps what takes long here, and becomes that of the data: of evaluations of a whole split.
        """

    def load_tokenizer(self, folder: Path) -> Any:
        """What `TaskData.tokenizer` wrote beside a model, for `prepare`; None where there is none."""
        return saved_tokenizer(folder)

    def open(self, folder: Path) -> tuple[Any, Any]:
        """The model in a folder and what `load_tokenizer` gives, checked to fit one another.

        Raises:
            LeapformerError: one of them is missing or damaged, or they don't fit.
        """
        model, tokenizer = load_model(folder, classes=self.model_classes), self.load_tokenizer(folder)
        if tokenizer is not None:
            check_fit(model, tokenizer, folder)
        return model, tokenizer

    def pretraining(self, recipe: Any) -> tuple[Recipe, Task] | None:
        """A recipe to train before this one, and its task; None where there is none."""
        return None
