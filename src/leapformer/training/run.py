"""A run: one folder that holds the recipe, the metrics, the checkpoints, the best model and the results.

What lies in it is listed in `leapformer.files.run_folder`, which reads it; here it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from leapformer.errors import LeapformerError
from leapformer.files.locking import LOCK, check_free, locked
from leapformer.files.records import parse_event, read_progress
from leapformer.files.run_folder import RunFolder
from leapformer.files.showing import shown
from leapformer.files.writing import STAGING_PREFIX, json_text, recover, staged_file, write_json, write_text
from leapformer.training import ranks
from leapformer.training.recipes import Recipe
from leapformer.training.restoring import check_trainer_state
from leapformer.training.saving import check_checkpoint

OPTIMIZER, SCHEDULE, TRAINER_STATE, PROGRESS = "optimizer.pt", "scheduler.pt", "trainer_state.json", "progress.json"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})", re.ASCII)


class Run(RunFolder):
    """The folder of one run, for the training that writes it. Making the object touches nothing on disk."""

    @property
    def cache_path(self) -> Path:
        """Where prepared data is kept, beside the runs that share it."""
        return self.path.parent / ".cache"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block, this training alone uses the folder, which is made; of several ranks the first holds it.

        Raises:
            LeapformerError: another training is at work here, or the folder can't be made.
        """
        if not ranks.is_first():
            yield
            return
        self._make_folder()
        with locked(self.path):
            yield

    def check(self, recipe: Recipe) -> None:
        """Check that this recipe can be trained here, before anything is written.

        Raises:
            LeapformerError: the folder holds something else, a finished run, or a run of another recipe.
        """
        if self.path.exists() and not self.path.is_dir():
            raise LeapformerError(f"{self.path}: expected a folder for the run, found a file")
        if not self.recipe_path.is_file():
            # A training that was killed in its first moment has left no more than these.
            leftovers = {LOCK, STAGING_PREFIX + self.recipe_path.name}
            if self.path.is_dir() and any(path.name not in leftovers for path in self.path.iterdir()):
                raise LeapformerError(
                    f"{self.path}: expected an empty folder or an unfinished run, found other files; "
                    "choose another --output"
                )
            return
        if self.finished:
            raise LeapformerError(f"{self.path}: this run is finished; choose another --output")
        differences = self.differences(recipe)
        if differences:
            raise LeapformerError(
                f"{self.path}: holds an unfinished run of another recipe ({'; '.join(differences[:3])}); "
                "choose another --output"
            )

    def differences(self, recipe: Recipe) -> list[str]:
        """ "key was old, now new" for every key in which a recipe differs from that of this run; nothing without a run.

        Raises:
            LeapformerError: the recipe that is there is damaged.
        """
        return list(_differences(self.recipe(), recipe.to_dict())) if self.recipe_path.is_file() else []

    def check_free(self) -> None:
        """Check that no training is at work in this folder, before anything is read or written.

        Raises:
            LeapformerError: one is.
        """
        if ranks.is_first():
            check_free(self.path)

    def start(self, recipe: Recipe) -> Path | None:
        """Make the folder, or take up the interrupted run that is there.

        Returns:
            The checkpoint to resume from, or None to start at step 0.

        Raises:
            LeapformerError: see `check` and `last_checkpoint`.
        """
        self.check(recipe)
        if ranks.is_first():
            self._make_folder()
            for folder in (self.path, self.checkpoints_path):
                recover(folder)
        if self.recipe_path.is_file():
            return self.last_checkpoint()
        if ranks.is_first():
            write_text(self.recipe_path, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        return None

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json, whole or not at all."""
        write_json(self.results_path, results)

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event to metrics.jsonl; NaN and infinity become null."""
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json_text(event) + "\n")
        except OSError as error:
            raise LeapformerError(f"{self.metrics_path}: could not be written ({error.strerror})") from error

    def rewind(self, step: int) -> None:
        """Forget the events after `step`, which a resumed run logs again, and rows that are damaged."""
        if not self.metrics_path.is_file():
            return
        with self.metrics_path.open("rb") as rows, staged_file(self.metrics_path) as kept:
            for row in rows:
                event = parse_event(row.decode("utf-8", "surrogateescape")) if row.endswith(b"\n") else None
                if event is not None and event["step"] <= step:
                    kept.write(row)

    def checkpoints(self) -> list[Path]:
        """The checkpoints by step, the last one last."""
        found = self.checkpoints_path.glob("checkpoint-*")
        return sorted((path for path in found if checkpoint_step(path) >= 0 and path.is_dir()), key=checkpoint_step)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, checked to be whole.

        Raises:
            LeapformerError: it is damaged; says which to remove to go on from an earlier one.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        last = checkpoints[-1]
        with self.resuming(last):
            numbers = range(ranks.count())
            random_states = [f"rng_state_{number}.pth" for number in numbers] if len(numbers) > 1 else ["rng_state.pth"]
            check_checkpoint(last, archives=(OPTIMIZER, SCHEDULE, *random_states), others=(TRAINER_STATE, PROGRESS))
            check_trainer_state(last / TRAINER_STATE, step=checkpoint_step(last))
            read_progress(last / PROGRESS)
        return last

    @contextmanager
    def resuming(self, checkpoint: Path) -> Iterator[None]:
        """Within the block, what is said of a checkpoint that can't be used ends with the way out.

        Raises:
            LeapformerError: what the block raises, and what to remove.
        """
        try:
            yield
        except LeapformerError as error:
            before = [path.name for path in self.checkpoints() if checkpoint_step(path) < checkpoint_step(checkpoint)]
            way = f"resume from {before[-1]}" if before else "begin again with step 1"
            raise LeapformerError(f"{error}; remove {checkpoint} to {way}") from error

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LeapformerError(f"{self.path}: can't make this folder ({error.strerror})") from error


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint folder was written at; -1 where the name has none."""
    match = _CHECKPOINT.fullmatch(path.name)
    return -1 if match is None else int(match[1])


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Any:
    """ "key: old, now new" for every key in which two recipes differ."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {shown(before)}, now {shown(after)}"
