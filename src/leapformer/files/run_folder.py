"""The folder of a run as it is read: by the training, which writes it, and by whoever shows what it holds.

recipe.yaml      the resolved recipe
metrics.jsonl    one JSON object per logged event, in order of steps
checkpoints/     checkpoint-N, each enough to resume from
model/           the best model so far, for `from_pretrained`, with its tokenizer
tensorboard/
pretraining/     a run of its own, where the recipe asks for one before it
results.json     written last: a run that has it is finished
.lock            while a training is at work here
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.folders import check_own_files
from leapformer.files.reading import read_yaml
from leapformer.files.records import read_events, read_results
from leapformer.files.showing import cut


class RunFolder:
    """The folder of one run. Making the object touches nothing on disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe_path = self.path / "recipe.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.results_path = self.path / "results.json"
        self.checkpoints_path = self.path / "checkpoints"
        self.model_path = self.path / "model"
        self.tensorboard_path = self.path / "tensorboard"
        self.pretraining_path = self.path / "pretraining"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return self.results_path.is_file()

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as it was trained.

        Raises:
            LeapformerError: this is not the folder of a run, or a link in it leads out of it.
        """
        if not os.path.lexists(self.recipe_path):
            raise LeapformerError(f"{cut(self.path, 240)}: expected the folder of a run, found no recipe.yaml in it")
        check_own_files(self.path)
        content = read_yaml(self.recipe_path)
        if not isinstance(content, dict) or "task" not in content:
            raise LeapformerError(f"{cut(self.recipe_path, 240)}: expected a recipe, found something else")
        return content

    def results(self) -> dict[str, Any]:
        """What results.json holds, with the types of `files.records.ResultsRecord`.

        Raises:
            LeapformerError: the run is not finished, or the file is damaged.
        """
        if not os.path.lexists(self.results_path):
            self.recipe()
            raise LeapformerError(f"{cut(self.path, 240)}: this run is not finished, so it has no results.json")
        check_own_files(self.path)
        return read_results(self.results_path)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged events; a row that is damaged, such as one that a crash cut off, is left out."""
        return read_events(self.metrics_path)

    def divergence(self) -> dict[str, Any] | None:
        """The event with which this run stopped, if that was a loss, a gradient or a weight that is no number."""
        return next((event for event in reversed(self.metrics()) if event.get("diverged") is True), None)
