"""``leapformer lra``: every task with every mechanism, one run after the other, and the table they make.

A run lies in OUTPUT/TASK/ATTENTION-seedN. What is finished there is taken as it is, what was interrupted goes on. Under
torchrun each process takes every n-th run and its own GPU; the first one writes the table when its own share is done,
and the same command without torchrun writes it again from all of them.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import MOST, Threads, a_path, use_threads
from leapformer.errors import LeapformerError
from leapformer.files.showing import shown

SUFFIXES = {"small": "", "cpu": "-cpu", "base": "-base"}
LINEAR = {"linear-relu", "linear-elu", "cosformer", "leap"}
# The reduced ListOps is a set of its own, made with --min-length 100 --max-length 300.
OWN_DATA = {("listops", "cpu"): "lra-listops-cpu"}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@dataclass(frozen=True)
class Job:
    """One run that the table needs."""

    task: str
    attention: str
    seed: int
    folder: Path


@needs("lra", "leapformer.analysis.lra", "leapformer.training.train", "leapformer.tasks.registry")
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
    from leapformer.analysis.lra import NAMES, TASKS
    from leapformer.files.folders import check_output_folder
    from leapformer.training.recipes import as_override, nearest

    if size not in SUFFIXES:
        raise LeapformerError(
            f"--size: expected {', '.join(SUFFIXES)}, found {shown(size)}{nearest(size, list(SUFFIXES))}"
        )
    jobs = [
        Job(task, kind, seed, output / task / f"{kind}-seed{seed}")
        for seed in range(seeds)
        for task in _chosen(tasks, TASKS, "--tasks")
        for kind in _chosen(attention, tuple(NAMES), "--attention")
    ]
    check_output_folder(output)
    use_threads(threads)
    rank, processes = _own_share()
    for job in [] if only_table else jobs[rank::processes]:
        overrides = [f"attention={job.attention}", f"training.seed={job.seed}", *(change or [])]
        overrides.append(as_override("data.path", str(data / OWN_DATA.get((job.task, size), f"lra-{job.task}"))))
        if budget is not None:
            overrides += [f"max_steps={budget}", *_shorter_warmup(f"lra/{job.task}{SUFFIXES[size]}", budget)]
        if not _finish(job, f"lra/{job.task}{SUFFIXES[size]}", overrides):
            typer.echo("Interrupted. The same command goes on.")
            raise typer.Exit(130)
    if rank == 0:
        _report(jobs, output)


def _chosen(names: str, known: Sequence[str], option: str) -> list[str]:
    from leapformer.training.recipes import nearest

    chosen = list(known) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise LeapformerError(
                f"{option}: expected all or some of {', '.join(known)}, found {shown(name)}{nearest(name, known)}"
            )
    return list(dict.fromkeys(chosen))


def _own_share() -> tuple[int, int]:
    """Rank and number of processes. The runs know nothing of each other, so the Trainer must not see the launcher."""
    rank, processes = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if processes > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("LOCAL_RANK", "0")
        for name in LAUNCHER:
            os.environ.pop(name, None)
    return rank, processes


def _number(name: str, default: int) -> int:
    """A number that the launcher has put into the environment."""
    value = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,6}", value):
        raise LeapformerError(f"{name}: expected a number in this variable of the environment, found {shown(value)}")
    return int(value)


def _shorter_warmup(recipe: str, budget: int) -> Iterator[str]:
    """A warm-up is a tenth of a run at most."""
    from leapformer.tasks.registry import load_recipe

    warmup = load_recipe(recipe)[0].training.warmup_steps
    if warmup > budget // 10:
        yield f"warmup_steps={budget // 10}"


def _finish(job: Job, recipe: str, overrides: Sequence[str]) -> bool:
    """Train and test one run, unless that has been done; False where it was interrupted."""
    from leapformer.analysis.lra import NAMES, SPLIT
    from leapformer.tasks.registry import load_recipe
    from leapformer.training.run import Run
    from leapformer.training.train import train

    run = Run(job.folder)
    resolved, task = load_recipe(recipe, overrides)
    if run.finished:
        differing = resolved.to_dict() != run.recipe()
        if differing:
            raise LeapformerError(f"{run.path}: holds a run of another recipe; choose another --output")
    else:
        typer.echo(f"{job.task}, {NAMES[job.attention]}, seed {job.seed}", err=True)
        if train(resolved, task, job.folder, progress_bar=True).results is None:
            return False
    results = run.results()
    if SPLIT not in results["splits"]:  # looked at once, when nothing is left to choose
        run.write_results({**results, **_test(run, resolved, task, job, results)})
    return True


def _test(run: Any, recipe: Any, task: Any, job: Job, results: dict[str, Any]) -> dict[str, Any]:
    """What results.json gets from the test split: its figures, the speed, and what computed the attention."""
    from leapformer.analysis.lra import SPLIT
    from leapformer.training.arguments import choose_device
    from leapformer.training.callbacks import passing_bar

    device = choose_device(recipe.training)
    model, _ = task.open(run.model_path)
    data = task.prepare(recipe, cache=run.cache_path, progress=passing_bar)
    data.check_model(model)
    model = model.to(device)
    started = time.perf_counter()
    metrics = data.evaluate(model, split=SPLIT)["metrics"]
    seconds = time.perf_counter() - started
    return {
        "splits": {**results["splits"], SPLIT: metrics},
        "inference_examples_per_second": round(metrics["examples"] / seconds, 2),
        "impl": _implementation(device) if job.attention in LINEAR else "torch",
    }


def _implementation(device: str) -> str:
    """What "auto" takes for float32 tensors on this device."""
    from leapformer.ops import available_impls

    if device == "cpu":
        return "native" if not available_impls()["native"] else "torch"
    return "triton" if not available_impls().get("triton", ["not there"]) else "torch"


def _report(jobs: Sequence[Job], output: Path) -> None:
    """Print the tables and write lra.md and lra.html, from those runs that are finished."""
    from leapformer.analysis.lra import COLUMNS, SPLIT, TASKS, Cell, check_tested, overview, task_rows, write_lra_page
    from leapformer.analysis.markdown import markdown_table
    from leapformer.analysis.runs import load_run
    from leapformer.files.writing import write_text
    from leapformer.training.run import Run

    cells = []
    for task, kind in dict.fromkeys((job.task, job.attention) for job in jobs):
        folders = [job.folder for job in jobs if (job.task, job.attention) == (task, kind)]
        runs = [load_run(folder) for folder in folders if Run(folder).finished]
        tested = [check_tested(run) for run in runs if run.split(SPLIT)]
        if tested:
            cells.append(Cell(task, kind, tested))
    if not cells:
        return
    columns, rows = overview(cells)
    parts = [f"Test accuracy in per cent\n\n{markdown_table(columns, rows)}"]
    parts += [f"{task}\n\n{markdown_table(COLUMNS, found)}" for task in TASKS if (found := task_rows(cells, task))]
    text = "\n\n".join(parts) + "\n"
    typer.echo(text)
    kinds, names = (
        ",".join(dict.fromkeys(values)) for values in zip(*((j.attention, j.task) for j in jobs), strict=True)
    )
    command = shlex.join(["leapformer", "lra", "--tasks", names, "--attention", kinds, "--output", str(output)])
    write_text(output / "lra.md", text)
    write_lra_page(output / "lra.html", cells, command=command)
    typer.echo(f"Written to {output}: lra.md, lra.html, and a folder for each run")
