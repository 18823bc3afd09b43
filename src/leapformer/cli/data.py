"""``leapformer data prepare``: a command for each data set of the table, with the options of that one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from leapformer.cli.data_sets import DATA_SETS, DataSet
from leapformer.cli.late import load
from leapformer.cli.options import MOST_SEED, MOST_THREADS, a_path, with_options
from leapformer.errors import LeapformerError
from leapformer.files.showing import shown

if TYPE_CHECKING:
    from leapformer.tasks.preparation import Progress

SHOWN_BAD_ROWS = 20
# What wrong usage is told by; some versions of typer carry a copy of click of their own.
UsageError: Any = typer.BadParameter.__mro__[1]


class Preparation(TyperCommand):
    """`leapformer data prepare NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except UsageError as fault:
            flag = getattr(fault, "option_name", "")
            if flag in _widths([self]) or flag not in _widths(_commands()):
                raise
            entry = DATA_SETS[self.name or ""]
            raise LeapformerError(f"{entry.name}: {flag} is not an option of this {entry.called}") from None


class Preparations(TyperGroup):
    """`leapformer data prepare`: its commands are the data sets. NAME may also stand behind its options."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(DATA_SETS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command(DATA_SETS[cmd_name])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _name_first(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in DATA_SETS:
            load("lra", "tqdm")  # as where the name is right: without packages nothing can be prepared
            near = difflib.get_close_matches(name[:100], DATA_SETS, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise LeapformerError(f"data prepare: expected one of {', '.join(DATA_SETS)}, found {shown(name)}{hint}")
        return name, self.get_command(ctx, name), args[1:]


prepare = typer.Typer(
    cls=Preparations,
    subcommand_metavar="NAME",
    help="Generate or convert a data set; the same command goes on with an interrupted one. "
    "The options of one: leapformer data prepare NAME --help.",
)


def _commands() -> list[Any]:
    return [_command(entry) for entry in DATA_SETS.values()]


def _widths(commands: list[Any]) -> dict[str, int]:
    """The options of some commands, each with the number of words that it takes."""
    options = (option for command in commands for option in command.params)
    return {flag: 0 if option.is_flag else option.nargs for option in options for flag in option.opts}


def _command(entry: DataSet) -> Any:
    """The command of one data set, with the options of all and its own."""

    def command(**given: Any) -> None:
        prepare_data(entry, **given)

    vars(command)["__signature__"] = with_options(partial(prepare_data, entry), entry.options, behind="output")
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    about = f"{entry.about} The same command goes on with an interrupted preparation."
    alone.command(entry.name, cls=Preparation, help=about, short_help=entry.about)(command)
    return typer.main.get_command(alone)


def _name_first(arguments: list[str]) -> list[str]:
    """The arguments with the data set's name before its options.

    Raises:
        LeapformerError: there is no name.
    """
    found = 0
    widths = _widths(_commands()) if arguments and arguments[0].startswith("-") else {}
    while found < len(arguments) and arguments[found].startswith("-"):
        flag, value, _ = arguments[found].partition("=")
        if flag != "--" and flag not in widths:
            return arguments  # --help, or what is no option of any
        found += 1 + (0 if value else widths.get(flag, 0))
    if found >= len(arguments):
        raise LeapformerError("Missing argument 'NAME'. (see leapformer --help)")
    return [arguments[found], *arguments[:found], *arguments[found + 1 :]]


def prepare_data(
    entry: DataSet,
    output: Annotated[Path, typer.Option(parser=a_path, metavar="PATH", help="Folder to fill.")],
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of all that is drawn.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Processes; default: one for each processor.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on over bad rows; count and list them.")] = False,
    **options: Any,
) -> None:
    """Prepare a data set under a progress bar, and say what it holds.

    Arguments:
        options: the set's own; None where they are not given.

    Raises:
        LeapformerError: an option that it needs is missing, or a fault of the data.
    """
    module, _, function = entry.work.partition(":")
    load(entry.extra, "tqdm", module)
    from leapformer.files.folders import check_output_folder

    check_output_folder(output)
    given = {name: value for name, value in options.items() if value is not None}
    for expected, names in entry.required.items():
        if any(name not in given for name in names):
            found = next((given[name] for name in names if name in given), "none")
            raise LeapformerError(f"{entry.name}: expected {expected}, found {found}")
    general = {"seed": seed, "workers": workers, "skip_bad": skip_bad}
    try:
        with _progress(entry.name) as progress:
            work = getattr(import_module(module), function)
            card = work(output=output, progress=progress, **general, **entry.fixed, **given)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; {output} is not complete. The same command goes on.")
        raise typer.Exit(130) from None
    _tell_bad_rows(card["bad_rows"], output)
    for line in entry.tell(card, output):
        typer.echo(line)


def _tell_bad_rows(bad: list[str], output: Path) -> None:
    for row in bad[:SHOWN_BAD_ROWS]:
        typer.echo(f"skipped: {row}", err=True)
    if bad:
        typer.echo(f"{len(bad):,} bad rows were skipped; {output / 'card.json'} lists them", err=True)


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """A bar on the error stream for each part of the work, drawn rarely where nobody watches."""
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def show(done: int, total: int | None, what: str) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = tqdm(
                total=total,
                desc=f"{name}: {what}",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30.0,
            )
        bars[what].total = total
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
