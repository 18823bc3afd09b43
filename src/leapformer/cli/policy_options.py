"""The options of all policies on the commands that take a policy, from the one table of policies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from leapformer.tasks.simulst.streaming.policy_registry import POLICIES, Option, PolicyEntry, all_options


def names() -> str:
    """Of the policies, for a person."""
    *others, last = POLICIES
    return f"{', '.join(others)} or {last}" if others else last


def add_policy_options(command: Callable[..., Any], *, several: bool) -> None:
    """Give a command the options of the policies that there are now, behind `--policy`. They
    arrive in its `**options`; those that are not given are None.

    Arguments:
        several: whether the first option of a policy takes several values, with commas between.
    """
    vars(command).pop("__signature__", None)
    own = inspect.signature(command, eval_str=True)
    kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [_parameter(owners, several=several) for owners in all_options().values()]
    place = 1 + [each.name for each in kept].index("policy")
    vars(command)["__signature__"] = own.replace(parameters=[*kept[:place], *added, *kept[place:]])  # what typer reads


def given(options: dict[str, str | None]) -> dict[str, str]:
    """Those that were."""
    return {name: text for name, text in options.items() if text is not None}


def _parameter(owners: list[tuple[PolicyEntry, Option]], *, several: bool) -> inspect.Parameter:
    lists = several and any(option is entry.options[0] for entry, option in owners)
    text = " ".join(f"{entry.name}: {option.described(in_a_list=lists)}." for entry, option in owners)
    option = typer.Option(owners[0][1].flag, metavar="N,N,..." if lists else "N", help=text)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(owners[0][1].name, kind, default=None, annotation=Annotated[str | None, option])
