"""The tasks that a recipe can name. Only the one that is asked for is imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from os import PathLike

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown
from leapformer.training.recipes import Recipe, nearest, read_recipe, resolve_recipe
from leapformer.training.task import Task

TASKS = {
    "lm": "leapformer.tasks.lm.task",
    "lra": "leapformer.tasks.lra.task",
    "lra-denoise": "leapformer.tasks.lra.denoise",
    "simulst": "leapformer.tasks.simulst.task",
}


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        LeapformerError: there is none.
    """
    if name not in TASKS:
        raise LeapformerError(f"task {shown(name)}: expected one of {', '.join(TASKS)}{nearest(name, list(TASKS))}")
    return import_module(TASKS[name]).TASK


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
