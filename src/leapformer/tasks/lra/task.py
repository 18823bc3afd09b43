"""Long-Range Arena as a task of the training, after filling in masks where a recipe asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leapformer.models import LeapformerForSequenceClassification
from leapformer.tasks.lra.data import SET_BY_DATA, LraData, LraRecipe
from leapformer.tasks.lra.denoise.task import TASK as DENOISE
from leapformer.tasks.lra.denoise.task import pretraining_recipe
from leapformer.tasks.lra.results import RESULTS
from leapformer.tasks.model_section import model_fields
from leapformer.training.recipes import Recipe
from leapformer.training.task import ProgressOf, Task, untold


class LraTask(Task):
    """`task: lra`."""

    name = "lra"
    recipe_type = LraRecipe
    results = RESULTS
    model_classes = (LeapformerForSequenceClassification,)
    model_fields = model_fields(*SET_BY_DATA)

    def prepare(
        self, recipe: LraRecipe, *, cache: Path, tokenizer: Any = None, progress: ProgressOf = untold
    ) -> LraData:
        """Open the prepared data; nothing is cached."""
        data = LraData(recipe)
        data.progress = progress
        return data

    def pretraining(self, recipe: LraRecipe) -> tuple[Recipe, Task] | None:
        """Filling in masks, where the recipe asks for it."""
        return None if recipe.pretrain == "none" else (pretraining_recipe(recipe), DENOISE)


TASK = LraTask()
