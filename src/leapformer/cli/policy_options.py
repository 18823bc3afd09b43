"""The options of all policies on the commands that take a policy, from the one table of policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from leapformer.cli.options import with_options
from leapformer.tasks.simulst.streaming.policy_registry import POLICIES, Option, PolicyEntry, all_options

Command = TypeVar("Command", bound=Callable[..., Any])


def names() -> str:
    """Of the policies, for a person."""
    *others, last = POLICIES
    return f"{', '.join(others)} or {last}" if others else last


def takes_policies(*, several: bool) -> Callable[[Command], Command]:
    """A command whose `**options` are those of all policies, behind `--policy`; those that are not given are None.

    Arguments:
        several: whether the first option of a policy takes several values, with commas between.
    """

    def mark(command: Command) -> Command:
        vars(command)["several_policies"] = several
        return command

    return mark


def with_policies(command: Command) -> Command:
    """The same command; where it takes policies, with the options of those that there are now."""
    several = vars(command).get("several_policies")
    if several is not None:
        vars(command).pop("__signature__", None)
        added = {name: _annotation(owners, several=several) for name, owners in all_options().items()}
        vars(command)["__signature__"] = with_options(command, added, behind="policy")
    return command


def given(options: dict[str, str | None]) -> dict[str, str]:
    """Those that were."""
    return {name: text for name, text in options.items() if text is not None}


def _annotation(owners: list[tuple[PolicyEntry, Option]], *, several: bool) -> Any:
    lists = several and any(option is entry.options[0] for entry, option in owners)
    text = " ".join(f"{entry.name}: {option.described(in_a_list=lists)}." for entry, option in owners)
    option = typer.Option(owners[0][1].flag, metavar="N,N,..." if lists else "N", help=text)
    return Annotated[str | None, option]
