"""``leapformer ablate``: a grid of trainings of one recipe, and what it shows.

A run lies in OUTPUT/CELL-seedN and is one of `leapformer train`, in a process of its own. What is finished there is
taken as it is, what was interrupted goes on.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import MOST, MOST_THREADS, Overrides, a_path
from leapformer.cli.train import default_name
from leapformer.errors import LeapformerError
from leapformer.files.showing import cut, shown

if TYPE_CHECKING:
    from leapformer.training.children import Children
    from leapformer.training.grid import Cell
    from leapformer.training.recipes import Recipe
    from leapformer.training.run import Run

LOGS = "logs"  # the outputs of the runs, in the folder of the grid
LOOK_EVERY = 0.2  # seconds
MOST_TOLD = 50  # faults


@dataclass(frozen=True)
class GridRun:
    """One training of a grid.

    Attributes:
        overrides: of the command that trains it.
        steps: with those of a training that comes before it.
    """

    cell: Cell
    seed: int
    run: Run
    recipe: Recipe
    overrides: Sequence[str]
    steps: int

    @property
    def name(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"


@needs(
    "plots",
    "leapformer.analysis.ablation",
    "leapformer.analysis.plots",
    "leapformer.training.train",
    "leapformer.tasks.registry",
)
def ablate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name from 'leapformer recipes', or a .yaml file.")],
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,C", help="The values of a key; several: all combinations."),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: KEY=VALUE KEY=VALUE'", help="Keys that change together; several are one axis."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds 0 to N - 1 of each cell.")] = 2,
    budget: Annotated[int | None, typer.Option(min=1, max=MOST, help="Steps of a run; default: the recipe's.")] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="CELL", help="The cell that the others are compared with; default: the first.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="KEY", help="What cells are compared by, such as loss; default: the task's.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_THREADS, help="Runs at a time; default: cores divided by threads, 1 on a GPU."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_THREADS, help="CPU threads of a run; default: 1 where several run at a time."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=a_path, metavar="PATH", help="Folder of the grid; default: runs/ablations/RECIPE."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Train nothing: the table of what is finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their steps, and stop.")] = False,
) -> None:
    """Train a grid of changes to a recipe, resume what was interrupted, and compare the cells over their seeds."""
    from leapformer.files.folders import check_output_folder
    from leapformer.tasks.registry import get_results
    from leapformer.training.grid import GridError, expand
    from leapformer.training.recipes import read_recipe

    fixed = overrides or []
    folder = Path("runs/ablations") / default_name(str(read_recipe(recipe)["name"]), []) if output is None else output
    check_output_folder(folder)
    cells = expand(vary or [], cell or [])
    names = [each.name for each in cells]
    first = names[0] if baseline is None else baseline
    if first not in names:
        raise LeapformerError(f"--baseline: expected one of {cut(', '.join(names), 400)}, found {shown(first)}")
    grid = _grid(recipe, cells, fixed, seeds=range(seeds), budget=budget, vary=vary or [], folder=folder)
    get_results(grid[0].recipe.task).metric(metric)
    _check_folders(grid, at_work=not (table or dry_run))
    if dry_run:
        _tell_plan(grid)
        return
    failed: dict[str, str] = {}
    if not table and not all(each.run.finished for each in grid):
        children = _children(recipe, grid, jobs=jobs, threads=threads, folder=folder)
        number = _run(children, grid, Progress(len(grid), children))
        failed = children.failed
        if number is not None:
            _tell_interrupted(grid, folder, number)
    _report(grid, first, folder, recipe=recipe, fixed=fixed, metric=metric)
    if failed:
        faults = [f"{name}: {line or 'no output'}" for name, line in failed.items()]
        raise GridError(f"{len(failed)} of {len(grid)} runs failed (their outputs: {folder / LOGS})", _most(faults))


# ---- the grid


def _grid(
    recipe: str,
    cells: Sequence[Cell],
    fixed: Sequence[str],
    *,
    seeds: Sequence[int],
    budget: int | None,
    vary: Sequence[str],
    folder: Path,
) -> list[GridRun]:
    """The runs of all cells, those of one seed together, each with its validated recipe.

    Raises:
        GridError: lists every fault of every cell.
    """
    from leapformer.training.grid import GridError
    from leapformer.training.run import Run

    faults = list(_key_faults(cells, fixed, vary, budgeted=budget is not None))
    steps = [] if budget is None or faults else _budget(recipe, budget)
    by_cell: dict[str, dict[str, None]] = {}  # faults in their order, each once
    grid: list[GridRun] = []
    for seed in () if faults else seeds:
        for cell in cells:
            overrides = [*steps, *fixed, *cell.overrides, f"training.seed={seed}"]
            try:
                resolved, before = _resolved(recipe, overrides, budgeted=budget is not None)
            except LeapformerError as error:
                by_cell.setdefault(cell.name, {}).update(dict.fromkeys(getattr(error, "faults", [str(error)])))
                continue
            total = resolved.training.max_steps + before
            grid.append(GridRun(cell, seed, Run(folder / cell.folder(seed)), resolved, overrides, total))
    faults += _cell_faults(by_cell, len(cells))
    owners: dict[str, str] = {}
    for each in grid:
        other = owners.setdefault(each.run.name.casefold(), each.name)
        if other != each.name:
            faults.append(f"cell {cut(each.name)}: expected a folder of its own, found {each.run.name} also of {other}")
    if faults:
        raise GridError(f"ablate {cut(recipe)}", _most(faults))
    return grid


def _cell_faults(by_cell: Mapping[str, Collection[str]], cells: int) -> Iterator[str]:
    """Faults that all cells have, once; then a line for each cell with its own."""
    counts = Counter(fault for found in by_cell.values() for fault in found)
    yield from (fault for fault, count in counts.items() if count == cells)
    for name, found in by_cell.items():
        if own := [fault for fault in found if counts[fault] < cells]:
            yield f"cell {cut(name)}: {'; '.join(own)}"


def _key_faults(cells: Sequence[Cell], fixed: Sequence[str], vary: Sequence[str], *, budgeted: bool) -> Iterator[str]:
    """Keys that an option sets already."""
    from leapformer.training.grid import SEED, STEPS, same_key

    set_here = [override.partition("=")[0] for override in fixed]
    keys = dict.fromkeys([*set_here, *(key for cell in cells for key in cell.keys)])
    for key in keys:
        if same_key(key, SEED):
            yield f"{key}: expected no such key, as --seeds gives every cell its seeds"
        if budgeted and same_key(key, STEPS):
            yield f"{key}: expected no such key beside --budget, which sets it"
    for key in (option.partition("=")[0].strip() for option in vary):
        if any(same_key(key, other) for other in set_here):
            yield f"{cut(key)}: expected either in --vary or as key=value for all cells, found both"


def _budget(recipe: str, steps: int) -> list[str]:
    """What a run of so many steps needs; what the user says of the same keys comes behind it and counts."""
    from leapformer.tasks.registry import load_recipe
    from leapformer.training.grid import shortened

    return shortened(load_recipe(recipe)[0].training, steps)


def _resolved(recipe: str, overrides: Sequence[str], *, budgeted: bool) -> tuple[Recipe, int]:
    """The validated recipe of a cell, and the steps of a training that comes before it."""
    from leapformer.tasks.registry import load_recipe
    from leapformer.training.arguments import choose_device

    resolved, task = load_recipe(recipe, overrides)
    section = resolved.training
    choose_device(section)
    if budgeted and section.warmup_steps > section.max_steps:
        raise LeapformerError(
            f"training.warmup_steps: expected at most the {section.max_steps} steps of --budget, found "
            f"{section.warmup_steps}"
        )
    before = task.pretraining(resolved)
    return resolved, 0 if before is None else before[0].training.max_steps


def _check_folders(grid: Sequence[GridRun], *, at_work: bool) -> None:
    """Check that what lies in the folders of the runs is theirs.

    Arguments:
        at_work: nobody else may train there.

    Raises:
        GridError: names each that is of another recipe, with the keys, or in use.
    """
    from leapformer.training.grid import GridError

    faults = []
    for each in grid:
        try:
            if at_work:
                each.run.check_free()
            if not each.run.finished:
                each.run.check(each.recipe)
            elif differences := each.run.differences(each.recipe):
                faults.append(
                    f"{each.run.path}: holds a finished run of another recipe ({'; '.join(differences[:3])}); "
                    "choose another --output"
                )
        except LeapformerError as error:
            faults.append(str(error))
    if faults:
        raise GridError("ablate", _most(faults))


def _most(faults: Sequence[str]) -> list[str]:
    """As many as anybody reads."""
    more = len(faults) - MOST_TOLD
    return [*faults[:MOST_TOLD], f"and {more} more"] if more > 0 else list(faults)


def _tell_plan(grid: Sequence[GridRun]) -> None:
    left = 0
    for each in grid:
        done = _steps_done(each)
        left += each.steps - done
        state = "finished" if each.run.finished else f"{done:,} of {each.steps:,} steps done" if done else "new"
        typer.echo(f"{each.name}: {each.steps:,} steps, {state}; {each.run.path}")
    total = sum(each.steps for each in grid)
    typer.echo(f"{len(grid)} runs, {total:,} steps in all, {left:,} of them to be trained")


def _steps_done(each: GridRun) -> int:
    """As far as its files tell: up to the last event of a run, of that before it where it has none."""
    if each.run.finished:
        return each.steps
    event = _last_event(each.run)
    before = each.steps - each.recipe.training.max_steps
    if event is not None:
        return before + event["step"]
    earlier = _last_event(type(each.run)(each.run.pretraining_path)) if before else None
    return 0 if earlier is None else earlier["step"]


def _last_event(run: Run) -> dict[str, Any] | None:
    from leapformer.files.records import last_event

    return last_event(run.metrics_path)


# ---- running it


def _children(recipe: str, grid: Sequence[GridRun], *, jobs: int | None, threads: int | None, folder: Path) -> Children:
    """The processes of the runs that are not finished, none of them started."""
    from leapformer.files.writing import make_folder
    from leapformer.training.children import Children, Work, limited_threads

    jobs, threads = _share(grid, jobs, threads)
    make_folder(folder / LOGS)
    works = []
    for each in grid:
        if each.run.finished:
            continue
        command = [sys.executable, "-m", "leapformer.cli.child", "train", "--output", str(each.run.path)]
        command += [] if threads is None else ["--threads", str(threads)]
        works.append(
            Work(
                each.name,
                [*command, "--", recipe, *each.overrides],
                folder / LOGS / f"{each.run.name}.log",
                shares=_data_of(each.recipe),
                prepared=each.run.recipe_path.is_file,  # written when the data is there
            )
        )
    return Children(works, jobs, limited_threads(threads))


def _share(grid: Sequence[GridRun], jobs: int | None, threads: int | None) -> tuple[int, int | None]:
    """How many runs at a time, and how many threads each; None: PyTorch's own choice.

    By the whole grid, so that a run is resumed with the threads that it began with.
    """
    from leapformer.tasks.preparation import processors
    from leapformer.training.arguments import choose_device

    if jobs is None:
        on_gpu = any(choose_device(each.recipe.training) == "cuda" for each in grid)
        jobs = 1 if on_gpu else max(1, processors() // (threads or 1))
    jobs = min(jobs, len(grid))
    return jobs, 1 if threads is None and jobs > 1 else threads


def _data_of(recipe: Recipe) -> str:
    """What decides which data a run prepares: all but the model and the training."""
    import json

    aside = ("name", "description", "model", "training")
    return json.dumps({key: value for key, value in recipe.to_dict().items() if key not in aside}, sort_keys=True)


def _run(children: Children, grid: Sequence[GridRun], progress: Progress) -> int | None:
    """Run all; the signal that stopped it, or None. A second one ends the children at once."""
    from leapformer.training.callbacks import Stop, interruptible

    stop, asked = Stop(), False
    going = {work.name for work in children.works}
    runs = {each.name: each for each in grid if each.name in going}
    try:
        with interruptible(stop):
            while children.step():
                if stop.requested and not asked:
                    asked = True
                    children.stop()
                progress.tell(runs, stopping=asked)
                time.sleep(LOOK_EVERY)
            progress.tell(runs, stopping=asked)
    finally:
        progress.close()
        children.kill()
    return stop.signal if children.stopped or children.waiting else None


class Progress:
    """One line that is written again in its place on a terminal; elsewhere a line for each run that has ended."""

    def __init__(self, total: int, children: Children) -> None:
        self.total = total
        self.children = children
        self.before = total - len(children.works)  # that were finished before
        self.on_terminal = sys.stderr.isatty()
        self.told: set[str] = set()
        self.started = self.looked = time.monotonic()
        self.steps_at_start: int | None = None
        self.line_open = False

    def tell(self, runs: dict[str, GridRun], *, stopping: bool) -> None:
        """Say what has ended since the last call, and how far the others are."""
        if self.steps_at_start is None:
            self.steps_at_start = sum(map(_steps_done, runs.values()))
        children = self.children
        for name in [*children.done, *children.failed, *children.stopped]:
            if name not in self.told:
                self.told.add(name)
                self._line(f"[{self._ended()}/{self.total}] {name}: {self._end_of(runs[name])}")
        now = time.monotonic()
        if self.on_terminal and now - self.looked >= 1:
            self.looked = now
            text = self._overview(runs, now - self.started, stopping=stopping)
            sys.stderr.write(f"\r{_printable(text, get_terminal_size().columns - 1)}\x1b[K")
            sys.stderr.flush()
            self.line_open = True

    def close(self) -> None:
        """Take the line away."""
        if self.line_open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self.line_open = False

    def _line(self, text: str) -> None:
        self.close()
        typer.echo(_printable(text, 400), err=True)

    def _ended(self) -> int:
        return self.before + len(self.told)

    def _end_of(self, each: GridRun) -> str:
        from leapformer.tasks.registry import describe

        if each.name in self.children.failed:
            return f"failed: {self.children.failed[each.name]}"
        if each.name in self.children.stopped:
            return f"stopped after step {_steps_done(each):,} of {each.steps:,}"
        return describe(each.run.results())

    def _overview(self, runs: dict[str, GridRun], seconds: float, *, stopping: bool) -> str:
        children = self.children
        parts = [f"{self.before + len(children.done)}/{self.total} done"]
        if children.failed:
            parts.append(f"{len(children.failed)} failed")
        parts.append("stopping" if stopping else self._time_left(runs, seconds))
        running = [_how_far(runs[name]) for name in children.running]
        return ", ".join(parts) + (f" | {'; '.join(running)}" if running else "")

    def _time_left(self, runs: dict[str, GridRun], seconds: float) -> str:
        """By the steps done since the start; runs that failed do none."""
        going = [each for name, each in runs.items() if name not in self.children.failed]
        done = sum(map(_steps_done, runs.values())) - (self.steps_at_start or 0)
        left = sum(each.steps - _steps_done(each) for each in going)
        if not left:
            return "evaluating"
        return f"{_duration(left * seconds / done)} left" if done > 0 else "starting"


def _how_far(each: GridRun) -> str:
    event = _last_event(each.run) or {}
    loss = next((event[key] for key in ("loss", "eval_loss") if isinstance(event.get(key), int | float)), None)
    return f"{each.name} {_steps_done(each):,}/{each.steps:,}" + ("" if loss is None else f" loss {loss:.3f}")


def _duration(seconds: float) -> str:
    """3 h 20 min, 4 min or 50 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _printable(text: str, longest: int) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= longest else f"{line[: max(0, longest - 3)]}..."


def _tell_interrupted(grid: Sequence[GridRun], folder: Path, number: int) -> None:
    finished = sum(each.run.finished for each in grid)
    typer.echo(
        f"Interrupted with {finished} of {len(grid)} runs finished, kept in {folder}. The same command goes on; with "
        "--table it compares what is finished."
    )
    raise typer.Exit(128 + number)


# ---- what it shows


def _report(
    grid: Sequence[GridRun], baseline: str, folder: Path, *, recipe: str, fixed: Sequence[str], metric: str | None
) -> None:
    """Print the table, and write it with all numbers and the picture, from those runs that are finished."""
    from leapformer.analysis.ablation import ablation, ablation_csv, ablation_json, ablation_markdown, ablation_picture
    from leapformer.analysis.plots import figure_png, figure_svg_file
    from leapformer.analysis.runs import load_run
    from leapformer.files.writing import write_bytes, write_json, write_text

    finished = [each for each in grid if each.run.finished]
    if not finished:
        typer.echo("No run is finished, so there is no table.", err=True)
        return
    cells = {each.cell.name: each.cell for each in grid}
    loaded: dict[str, list[Any]] = {name: [] for name in cells}
    for each in finished:
        loaded[each.cell.name].append(load_run(each.run.path))
    found = ablation(loaded, baseline=baseline, metric=metric)
    text = ablation_markdown(found)
    missing = len(grid) - len(finished)
    if missing:
        text += f"\n{missing} of {len(grid)} runs are not finished.\n"
    typer.echo(text)
    first = loaded[finished[0].cell.name][0].results
    content = {
        "recipe": recipe,
        "overrides": list(fixed),
        "cell_overrides": {name: list(cell.overrides) for name, cell in cells.items()},
        "runs": {str(each.run.path): each.run.finished for each in grid},
        **ablation_json(found),
        **{key: first.get(key) for key in ("task", "machine", "versions", "git")},
    }
    write_json(folder / "ablation.json", content)
    write_text(folder / "ablation.csv", ablation_csv(found))
    write_text(folder / "ablation.md", text)
    figure = ablation_picture(found)
    write_bytes(folder / "ablation.png", figure_png(figure))
    write_bytes(folder / "ablation.svg", figure_svg_file(figure))
    typer.echo(f"Written to {folder}: ablation.md, .json, .csv, .svg and .png, and a folder for each run")
