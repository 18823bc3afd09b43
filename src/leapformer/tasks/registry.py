"""The tasks that a recipe can name. Only the one that is asked for is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown
from leapformer.training.recipes import Recipe, nearest, read_recipe, resolve_recipe
from leapformer.training.results import TaskResults

if TYPE_CHECKING:  # showing the results of a run needs no torch
    from leapformer.training.task import Task

# Each is a folder: its module `task` has TASK, and its module `results` has RESULTS.
TASKS = {
    "lm": "leapformer.tasks.lm",
    "lra": "leapformer.tasks.lra",
    "lra-denoise": "leapformer.tasks.lra.denoise",
    "simulst": "leapformer.tasks.simulst",
    "synthetic": "leapformer.tasks.synthetic",
}


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        LeapformerError: there is none.
    """
    return import_module(f"{_folder(name)}.task").TASK


def get_results(name: str) -> TaskResults:
    """What the runs of the task of this name have in results.json.

    Raises:
        LeapformerError: there is no such task.
    """
    return import_module(f"{_folder(name)}.results").RESULTS


def task_of(results: Mapping[str, Any]) -> str:
    """The task of a run by its results.json: what it says, or what the figures tell where an older version said
    nothing.
    """
    if results.get("task"):
        return results["task"]
    splits = [split for split in results.get("splits", {}).values() if split]
    if results.get("source") in ("speech", "text") or any("token_accuracy" in split for split in splits):
        return "simulst"
    if any("accuracy" in split for split in splits):
        filled_in_masks = "tokens_per_second" in results and "examples_per_second" not in results
        return "lra-denoise" if filled_in_masks else "lra"
    return "lm"


def describe(results: Mapping[str, Any]) -> str:
    """The main figures of a finished training in one line, as its task has it."""
    return get_results(task_of(results)).describe(results)


def _folder(name: str) -> str:
    if name not in TASKS:
        raise LeapformerError(f"task {shown(name)}: expected one of {', '.join(TASKS)}{nearest(name, list(TASKS))}")
    return TASKS[name]


def load_recipe(reference: str | PathLike[str], overrides: Sequence[str] = ()) -> tuple[Recipe, Task]:
    """A validated recipe and the task it belongs to.

    Arguments:
        reference: the name of a recipe that comes with the package, or the path of a .yaml file.
        overrides: "key=value" each, see `resolve_recipe`.

    Raises:
        LeapformerError: there is no such recipe or task, or the recipe has faults; all of them are told.
    """
    content = read_recipe(reference)
    named = content.get("task")
    task = get_task(named if isinstance(named, str) else shown(named))
    recipe = resolve_recipe(content, schema=task.recipe_type, model_fields=task.model_fields, overrides=overrides)
    return recipe, task
