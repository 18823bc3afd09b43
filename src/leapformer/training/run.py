"""A run: one folder that holds the recipe, the metrics, the checkpoints, the best model and the results.

recipe.yaml      the resolved recipe
metrics.jsonl    one JSON object per logged event, in order of steps
checkpoints/     checkpoint-N, each enough to resume from
model/           the best model so far, for `from_pretrained`, with its tokenizer
tensorboard/
pretraining/     a run of its own, where the recipe asks for one before it
results.json     written last: a run that has it is finished
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from leapformer.errors import LeapformerError
from leapformer.files.folders import check_own_files
from leapformer.files.reading import read_yaml
from leapformer.files.records import read_events, read_results
from leapformer.files.showing import cut, shown
from leapformer.files.writing import recover, write_json, write_text
from leapformer.training.recipes import Recipe
from leapformer.training.saving import check_archive, check_weights

CHECKPOINT_PREFIX = "checkpoint-"
CHECKPOINT_ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class Run:
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
    def cache_path(self) -> Path:
        """Where prepared data is kept, beside the runs that share it."""
        return self.path.parent / ".cache"

    @property
    def finished(self) -> bool:
        return self.results_path.is_file()

    def check(self, recipe: Recipe) -> None:
        """Check that this recipe can be trained here, before anything is written.

        Raises:
            LeapformerError: the folder holds something else, a finished run, or a run of another recipe.
        """
        if self.path.exists() and not self.path.is_dir():
            raise LeapformerError(f"{self.path}: expected a folder for the run, found a file")
        if not self.recipe_path.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise LeapformerError(
                    f"{self.path}: expected an empty folder or an unfinished run, found other files; "
                    "choose another --output"
                )
            return
        if self.finished:
            raise LeapformerError(f"{self.path}: this run is finished; choose another --output")
        differences = list(_differences(self.recipe(), recipe.to_dict()))
        if differences:
            raise LeapformerError(
                f"{self.path}: holds an unfinished run of another recipe ({'; '.join(differences[:3])}); "
                "choose another --output"
            )

    def start(self, recipe: Recipe) -> Path | None:
        """Make the folder, or take up the interrupted run that is there.

        Returns:
            The checkpoint to resume from, or None to start at step 0.

        Raises:
            LeapformerError: see `check` and `last_checkpoint`.
        """
        self.check(recipe)
        if self.recipe_path.is_file():
            for folder in (self.path, self.checkpoints_path):
                recover(folder)
            return self.last_checkpoint()
        self._make_folder()
        write_text(self.recipe_path, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        return None

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

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json, whole or not at all."""
        write_json(self.results_path, results)

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event to metrics.jsonl."""
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise LeapformerError(f"{self.metrics_path}: could not be written ({error.strerror})") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The logged events; a row that is damaged, such as one that a crash cut off, is left out."""
        return read_events(self.metrics_path)

    def rewind(self, step: int) -> None:
        """Forget the events after `step`, which a resumed run logs again."""
        kept = [event for event in self.metrics() if event.get("step", 0) <= step]
        write_text(self.metrics_path, "".join(json.dumps(event) + "\n" for event in kept))

    def checkpoints(self) -> list[Path]:
        """The checkpoints by step, the last one last."""
        found = self.checkpoints_path.glob(f"{CHECKPOINT_PREFIX}*")
        return sorted((path for path in found if path.is_dir()), key=checkpoint_step)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, checked to be whole.

        Raises:
            LeapformerError: it is cut off; says which to remove to go on from an earlier one.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        last = checkpoints[-1]
        try:
            check_weights(last / "model.safetensors")
            for name in CHECKPOINT_ARCHIVES:
                check_archive(last / name)
        except LeapformerError as error:
            raise LeapformerError(f"{error}; remove {last} to resume from the checkpoint before it") from error
        return last

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LeapformerError(f"{self.path}: can't make this folder ({error.strerror})") from error


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint folder was written at; -1 where the name has none."""
    number = path.name.removeprefix(CHECKPOINT_PREFIX)
    return int(number) if number.isdigit() else -1


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Any:
    """ "key: old, now new" for every key in which two recipes differ."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {shown(before)}, now {shown(after)}"
