"""Simultaneous translation as a task of the training: speech or text in one language, text in another, wait-k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leapformer.models import LeapformerForConditionalGeneration
from leapformer.models.translation import ENCODER_FIELDS
from leapformer.models.translation_configuration import LeapformerTranslationConfig
from leapformer.tasks.model_section import model_fields
from leapformer.tasks.simulst.data import TranslationData
from leapformer.tasks.simulst.processor import TranslationProcessor, open_translation
from leapformer.tasks.simulst.recipe import TranslationRecipe
from leapformer.tasks.simulst.results import RESULTS
from leapformer.training.recipes import Recipe, read_recipe, resolve_recipe
from leapformer.training.task import ProgressOf, Task, untold

SET_BY_DATA = ("source", "num_features", "source_vocab_size", "ctc_vocab_size")
# Encoder fields that a recipe for pre-training takes from the recipe that it comes before.
_SHARED = tuple(name for name in ENCODER_FIELDS if name not in SET_BY_DATA)
# What it takes of that recipe's training: the seed, and how the machine is used.
_SHARED_TRAINING = ("seed", "device", "processes", "bf16", "gradient_checkpointing", "compile")


class TranslationTask(Task):
    """`task: simulst`."""

    name = "simulst"
    recipe_type = TranslationRecipe
    results = RESULTS
    model_classes = (LeapformerForConditionalGeneration,)
    model_fields = model_fields(*SET_BY_DATA, config_class=LeapformerTranslationConfig)

    def prepare(
        self, recipe: TranslationRecipe, *, cache: Path, tokenizer: Any = None, progress: ProgressOf = untold
    ) -> TranslationData:
        """Open the data; features, their statistics and vocabularies are computed once and kept under `cache`."""
        return TranslationData(recipe, cache=cache, processor=tokenizer, progress=progress)

    def load_tokenizer(self, folder: Path) -> TranslationProcessor:
        return TranslationProcessor.from_pretrained(folder)

    def open(self, folder: Path) -> tuple[Any, TranslationProcessor]:
        return open_translation(folder)

    def pretraining(self, recipe: TranslationRecipe) -> tuple[Recipe, Task] | None:
        """The recipe that `pretraining` names, on this recipe's data, with its encoder, vocabularies and seed, on its
        device.
        """
        if recipe.pretraining is None:
            return None
        content = read_recipe(recipe.pretraining)
        own, theirs = recipe.to_dict(), dict(content.get("data", {}))
        content["data"] = {**own["data"], "target": theirs.get("target", "transcription")}
        content["vocabulary"] = own["vocabulary"]
        shared = {name: recipe.model[name] for name in _SHARED if name in recipe.model}
        content["model"] = {**content.get("model", {}), **shared}
        content["training"] = {
            **content.get("training", {}),
            **{name: own["training"][name] for name in _SHARED_TRAINING},
        }
        resolved = resolve_recipe(content, schema=TranslationRecipe, model_fields=self.model_fields)
        return resolved, self


TASK = TranslationTask()
