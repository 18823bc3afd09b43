"""The commands and their options. Each does its work in a function of its own that is imported when it is called."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from leapformer import __version__
from leapformer.cli import policy_options
from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.showing import cut, shown
from leapformer.tasks.simulst.streaming.policy_registry import DEFAULT

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
plot = typer.Typer(no_args_is_help=True, help="Pictures of a trained run.")
app.add_typer(plot, name="plot")
data = typer.Typer(no_args_is_help=True, help="Data sets of the tasks.")
app.add_typer(data, name="data")

# The base of click's errors, reached in public: some versions of typer carry a copy of click of their own.
ClickException: Any = typer.BadParameter.__mro__[2]

# No option asks for more than a machine can do, or than the libraries behind it take.
MOST_THREADS = 1024
MOST_SEED = 2**32 - 1
MOST = 10**9  # of steps, examples, sentences
MOST_TOKENS = 10**7  # of one text, and of k


def a_path(text: str | Path) -> Path:
    """What the user gave for a path; an empty text would be the folder that the command runs in."""
    if not str(text):
        raise typer.BadParameter("expected a path, found an empty text")
    return Path(text)


def a_text(text: str) -> str:
    """A text that was given in UTF-8."""
    if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
        raise typer.BadParameter(f"expected text in UTF-8, found {shown(text)}")
    return text


def finite(number: float | None) -> float | None:
    """A number that is one: "nan" passes every comparison with a smallest and a largest."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"expected a number, found {number}")
    return number


def temperature(number: float) -> float:
    """A temperature that logits can be divided by."""
    if not (number == 0 or 1e-3 <= number <= 1e3):
        raise typer.BadParameter(f"expected 0, or a number from 0.001 to 1,000, found {number:g}")
    return number


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads of PyTorch; default: PyTorch's own choice.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", parser=a_path, help="Folder of a run, such as runs/NAME.")]


def run(argv: Sequence[str] | None) -> int:
    """Parse and run; wrong usage gives one line and code 2."""
    policy_options.add_policy_options(evaluate, several=True)
    policy_options.add_policy_options(translate, several=False)
    command = typer.main.get_command(app)
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


def _work(module: str, function: str, extra: str = "lm") -> Callable[..., Any]:
    """The function that does a command's work; a missing package is told by the extra that brings it."""
    try:
        work = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("leapformer"):
            raise
        raise MissingExtra(extra, package=error.name, purpose="this command") from error
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()  # our own bar is the one to look at
    return work


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Transformers with linear attention whose re-weighting is learned."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def recipes() -> None:
    """List what can be trained."""
    _work("leapformer.cli.recipes", "list_recipes")()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name from 'leapformer recipes', or a .yaml file.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=a_path, metavar="PATH", help="Folder of the run; default: runs/NAME after the recipe."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a recipe, or go on with an interrupted run of it."""
    _work("leapformer.cli.train", "train_recipe")(recipe, overrides or [], output=output, threads=threads)


@app.command()
def evaluate(
    folder: RunFolder,
    split: Annotated[str, typer.Option(help="validation, test or train.")] = "validation",
    context_window: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_TOKENS,
            help="Tokens each block repeats of the one before it; default: what the recipe says.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Translation: quality and lagging with {policy_options.names()}, at each value of its option; "
            "--k alone: wait-k with each k, and offline.",
        ),
    ] = None,
    batched: Annotated[
        bool, typer.Option("--batched", help="With these: many sentences at a time, without computation-aware lagging.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="With these: only the first so many sentences.")
    ] = None,
    threads: Threads = None,
    **options: Any,
) -> None:
    """Evaluate a trained run on a whole split; results.json keeps the figures."""
    given = policy_options.given(options)
    if policy is not None or given:
        _work("leapformer.cli.evaluate", "evaluate_latency", "speech")(
            folder,
            split=split,
            policy=policy or DEFAULT,
            options=given,
            batched=batched,
            limit=limit,
            threads=threads,
        )
        return
    _work("leapformer.cli.evaluate", "evaluate_run")(
        folder, split=split, context_window=context_window, threads=threads
    )


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", parser=a_path, help="Folders of finished runs.")],
    split: Annotated[str, typer.Option(help="The split whose figures are compared.")] = "validation",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(parser=a_path, metavar="PATH", help="Also write a self-contained HTML page to this file."),
    ] = None,
) -> None:
    """One table of quality, speed, memory and parameters; several seeds give a mean and a paired difference."""
    _work("leapformer.cli.compare", "compare_runs", "plots")(folders, split=split, markdown=markdown, output=output)


@app.command()
def generate(
    folder: RunFolder,
    prompt: Annotated[str, typer.Argument(parser=a_text, metavar="PROMPT", help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="How many tokens to write at most.")] = 200,
    temperature: Annotated[
        float,
        typer.Option(callback=temperature, help="From 0.001 to 1,000, or 0, which always takes the likeliest token."),
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=finite, help="Share of probability to draw from.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the random draws.")] = 0,
    threads: Threads = None,
) -> None:
    """Go on from a prompt; words appear as they are written."""
    _work("leapformer.cli.generate", "generate_text")(
        folder, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, threads=threads
    )


@app.command()
def translate(
    folder: RunFolder,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Audio (wav, flac, ogg, mp3), or text where the run's source is text.")
    ],
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"{policy_options.names()}.")] = DEFAULT,
    continuous: Annotated[
        bool, typer.Option("--continuous", help="Begin another sentence where one ends before the audio does.")
    ] = False,
    realtime: Annotated[bool, typer.Option("--realtime", help="Read the audio no faster than it is heard.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for every word, and a last one.")] = False,
    threads: Threads = None,
    **options: Any,
) -> None:
    """Translate while reading: words appear as the audio is read. FILE - takes lines of text from the standard input."""
    _work("leapformer.cli.translate", "translate_file", "speech")(
        folder,
        file,
        policy=policy,
        options=policy_options.given(options),
        continuous=continuous,
        realtime=realtime,
        as_json=as_json,
        threads=threads,
    )


@app.command()
def lra(
    tasks: Annotated[
        str, typer.Option(help="all, or names with commas: listops,text,retrieval,image,pathfinder.")
    ] = "all",
    attention: Annotated[str, typer.Option(help="all twelve, or names with commas such as softmax,leap.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds 0 to N - 1 of each.")] = 1,
    budget: Annotated[int | None, typer.Option(min=1, max=MOST, help="Steps of a run; default: the recipe's.")] = None,
    size: Annotated[
        str, typer.Option(help="small: lra/TASK; cpu: reduced, lra/TASK-cpu; base: lra/TASK-base.")
    ] = "small",
    data: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of the prepared data, lra-TASK in it.")
    ] = Path("data"),
    output: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of the runs, the table and the page.")
    ] = Path("runs/lra"),
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to every recipe.")
    ] = None,
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Train nothing: the table and the page of what is finished.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train what is missing of Long-Range Arena, resume what was interrupted, and write one table and one page."""
    _work("leapformer.cli.lra", "long_range_arena", "lra")(
        tasks=tasks, attention=attention, seeds=seeds, budget=budget, size=size, data=data, output=output,
        changes=change or [], only_table=only_table, threads=threads,
    )  # fmt: skip


@plot.command("proportions")
def plot_proportions(
    folder: RunFolder,
    text: Annotated[
        str | None,
        typer.Option(
            parser=a_text, metavar="TEXT", help="The text to look at; default: the start of the validation set."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(parser=a_path, metavar="PATH", help="Folder of the pictures; default: RUN/plots.")
    ] = None,
) -> None:
    """Draw the learned proportions of each layer and head along a text."""
    _work("leapformer.cli.plot", "plot_proportions", "plots")(folder, text=text, output=output)


@plot.command("latency")
def plot_latency(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", parser=a_path, help="Translation runs, evaluated with --k.")
    ],
    split: Annotated[str, typer.Option(help="The split whose scores are shown.")] = "validation",
    draws: Annotated[int, typer.Option(min=0, max=20_000, help="Of the bootstrap; 0: no intervals.")] = 1000,
    output: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of the picture and the tables.")
    ] = Path("runs/latency"),
) -> None:
    """Draw BLEU against lagging of translation runs; the first is what the others are compared with."""
    _work("leapformer.cli.plot", "plot_latency", "plots")(folders, split=split, draws=draws, output=output)


TextPair = tuple[Path, Path]


@data.command("prepare")
def data_prepare(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="lra-listops, lra-text, lra-retrieval, lra-image, lra-pathfinder; speech-demo, speech-from-text; "
            "speech-mustc, speech-covost, speech-europarl, speech-manifest, speech-tuxpaint, speech-asterisk.",
        ),
    ],
    output: Annotated[Path, typer.Option(parser=a_path, metavar="PATH", help="Folder to fill.")],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", parser=a_path, metavar="PATH", help="What to convert; none generates listops and pathfinder."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of all that is drawn.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Processes; default: one for each processor.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Training examples to make; default: in full.")
    ] = None,
    min_length: Annotated[
        int | None, typer.Option(min=1, max=MOST_TOKENS, help="listops: shortest expression; default 501.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="listops: longest expression; text, retrieval: where to cut; default 1999, 4000.",
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, max=MOST_TOKENS, help="pathfinder: 32, 64, 128 or 256; default 32.")
    ] = None,
    level: Annotated[
        int | None, typer.Option(min=1, max=MOST_TOKENS, help="pathfinder: 6, 9 or 14 paddles; default 14.")
    ] = None,
    pairs: Annotated[
        TextPair | None,
        typer.Option(metavar="SOURCE TARGET", help="speech-from-text: sentences to speak, and their translations."),
    ] = None,
    validation_pairs: Annotated[
        TextPair | None,
        typer.Option(metavar="SOURCE TARGET", help="The same for validation; default: a tenth of --pairs."),
    ] = None,
    test_pairs: Annotated[
        TextPair | None, typer.Option(metavar="SOURCE TARGET", help="The same for the test; default: a tenth.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="speech-from-text: of the source, as espeak-ng calls it; default en.")
    ] = None,
    source_language: Annotated[str | None, typer.Option(help="Recorded speech: its language, such as fr.")] = None,
    target_language: Annotated[str | None, typer.Option(help="Recorded speech: of the translations.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on over bad rows; count and list them.")] = False,
) -> None:
    """Generate or convert a data set; the same command goes on with an interrupted one."""
    kind = "espeak" if name in ("speech-demo", "speech-from-text") else name.partition("-")[0]
    extra = kind if kind in ("espeak", "speech") else "lra"
    _work("leapformer.cli.data", "prepare_data", extra)(
        name, output=output, source=source, seed=seed, workers=workers, count=count, skip_bad=skip_bad,
        min_length=min_length, max_length=max_length, size=size, level=level, pairs=pairs,
        validation_pairs=validation_pairs, test_pairs=test_pairs, language=language,
        source_language=source_language, target_language=target_language,
    )  # fmt: skip


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[WHAT]", help="attention, decoding, training, overhead, processes, lra, streaming or all."
        ),
    ] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: about a minute for all.")] = False,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens, such as 512,4096; streaming: seconds. Default: each one's own.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Turns of the contenders; default: 7, quick: 3.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads of PyTorch.")] = 1,
    limit: Annotated[
        float | None,
        typer.Option(callback=finite, help="Seconds that one call may take; slower ones are listed as not run."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Whose model training measures; default: lm/wikitext2-small.")
    ] = None,
    output: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of JSON, tables and pictures.")
    ] = Path("runs/bench"),
) -> None:
    """Measure speed and memory on this machine's processor, by ratios within one run."""
    _work("leapformer.cli.bench", "run_bench", "plots")(
        what, quick=quick, lengths=lengths, repeats=repeats, threads=threads, limit=limit, recipe=recipe,
        output=output,
    )  # fmt: skip


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(parser=a_path, metavar="PATH", help="Folder of the demo's runs and page.")
    ] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """Train language models and simultaneous translation on what is built in, compare, write pages. Nothing to download."""
    _work("leapformer.cli.demo", "run_demo", "plots")(output=output, threads=threads)
