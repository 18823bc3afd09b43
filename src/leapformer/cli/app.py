"""The commands, collected; each has a file of its own with its options and its work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from leapformer import __version__
from leapformer.cli.ablate import ablate
from leapformer.cli.bench import bench
from leapformer.cli.compare import compare
from leapformer.cli.data import prepare
from leapformer.cli.demo import demo
from leapformer.cli.evaluate import evaluate
from leapformer.cli.generate import generate
from leapformer.cli.lra import lra
from leapformer.cli.plot_latency import latency
from leapformer.cli.plot_proportions import proportions
from leapformer.cli.policy_options import with_policies
from leapformer.cli.recipes import recipes
from leapformer.cli.train import train
from leapformer.cli.translate import translate
from leapformer.errors import LeapformerError
from leapformer.files.showing import cut, shown

COMMANDS: dict[str, Callable[..., None] | typer.Typer] = {
    "recipes": recipes,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "ablate": ablate,
    "generate": generate,
    "translate": translate,
    "lra": lra,
    "bench": bench,
    "demo": demo,
    "plot proportions": proportions,
    "plot latency": latency,
    "data prepare": prepare,
}
GROUPS = {"plot": "Pictures of a trained run.", "data": "Data sets of the tasks."}

# The base of click's errors, reached in public: some versions of typer carry a copy of click of their own.
ClickException: Any = typer.BadParameter.__mro__[2]


def run(argv: Sequence[str] | None) -> int:
    """Parse and run; wrong usage gives one line and code 2."""
    command = typer.main.get_command(_collected())
    arguments = sys.argv[1:] if argv is None else list(argv)
    for argument in arguments:
        if "\0" in argument:
            raise LeapformerError(f"expected arguments without zero bytes, found {shown(argument)}")
    try:
        code = command.main(args=arguments or ["--help"], prog_name="leapformer", standalone_mode=False)
    except ClickException as error:
        raise LeapformerError(f"{cut(error.format_message(), 400)} (see leapformer --help)") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    except SystemExit as stop:  # what the parser makes of a pipe that nobody reads any more
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        raise
    return code if isinstance(code, int) else 0


def _collected() -> typer.Typer:
    """All commands, those with a group's name before their own in that group."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback(invoke_without_command=True)(_options)
    groups = {name: typer.Typer(no_args_is_help=True, help=about) for name, about in GROUPS.items()}
    for name, group in groups.items():
        app.add_typer(group, name=name)
    for name, command in COMMANDS.items():
        group, _, own = name.rpartition(" ")
        place = groups.get(group, app)
        if isinstance(command, typer.Typer):
            place.add_typer(command, name=own)
        else:
            place.command(own)(with_policies(command))
    return app


def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Transformers with linear attention whose re-weighting is learned."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
