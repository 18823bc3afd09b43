"""``leapformer ablate``: all cells are checked first, runs go on where they were, a failure ends no other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from leapformer.cli import main
from leapformer.cli.ablate import Progress, _duration, _share
from leapformer.files.run_folder import RunFolder
from leapformer.files.showing import cut
from leapformer.tasks.registry import load_recipe
from leapformer.training.children import Children
from tests.analysis.builders import results
from tests.training.builders import write_recipe

LIMIT = 300  # seconds that a busy machine may take


def refused(capsys, *arguments: str) -> list[str]:
    """The lines of a call that must fail with code 2 and print nothing else."""
    assert main(["ablate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("leapformer: ")
    return captured.err.splitlines()


def finished_run(folder: Path, recipe: Path, *overrides: str, seed: int, bits: float, **changes) -> Path:
    """The folder of a run as a training leaves it, with made-up figures."""
    resolved, _ = load_recipe(recipe, [*overrides, f"training.seed={seed}"])
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved.to_dict(), sort_keys=False))
    content = results("leap", perplexity=300.0, task="lm", seed=seed, **changes)
    content["splits"]["validation"]["bits_per_byte"] = bits
    (folder / "results.json").write_text(json.dumps(content))
    return folder


# ---- before anything runs


def test_every_bad_cell_is_told_before_the_first_run(tmp_path, capsys):
    output = tmp_path / "grid"
    lines = refused(
        capsys,
        str(write_recipe(tmp_path)),
        "--vary",
        "hidden_size=16,17,no",
        "--cell",
        "good: attention=leap",
        "--cell",
        "bad: attention=laep learning_rate=0",
        "--output",
        str(output),
    )
    rate = "training.learning_rate: expected greater than 0, found 0"
    number = "model.hidden_size: expected a valid integer, unable to parse string as an integer, found 'no'"
    assert lines[0] == f"leapformer: ablate {cut(tmp_path / 'tiny.yaml')}:"
    told = dict(line.strip().split(": ", 1) for line in lines[1:])
    assert list(told) == [
        f"cell {cell},hidden_size={size}"
        for cell, size in (("good", 17), ("good", "no"), ("bad", 16), ("bad", 17), ("bad", "no"))
    ]
    assert told["cell good,hidden_size=no"] == number and "model.hidden_size" in told["cell good,hidden_size=17"]
    assert re.fullmatch(f"model.attention: expected one of .*, found 'laep'; {rate}", told["cell bad,hidden_size=16"])
    assert told["cell bad,hidden_size=no"].endswith(f"found 'laep'; {number}; {rate}")
    assert not output.exists()


def test_a_fault_of_all_cells_is_told_once(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path))
    (line,) = refused(capsys, recipe, "--vary", "attention=leap,linear", "sed=1")
    assert line.endswith("tiny.yaml: sed: unknown key; did you mean training.seed?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one --vary or --cell, found none"),
        (["--vary", "attention"], "--vary: expected key=value,value, found 'attention'"),
        (["--cell", "attention=leap"], "--cell: expected 'name: key=value key=value', found 'attention=leap'"),
        (["--vary", "seed=1,2"], "seed: expected no such key, as --seeds gives every cell its seeds"),
        (["--vary", "attention=leap", "training.seed=3"], "training.seed: expected no such key"),
        (["--vary", "max_steps=1,2", "--budget", "3"], "max_steps: expected no such key beside --budget"),
        (["--vary", "attention=leap,linear", "attention=linear"], "attention: expected either in --vary or as"),
        (["--vary", "attention=leap", "--baseline", "linear"], "--baseline: expected one of attention=leap, found"),
        (["--vary", "attention=leap", "--metric", "bits"], "metric: expected one of bits_per_byte, loss, word_per"),
        (["--vary", "attention=leap", "--budget", "4", "warmup_steps=5"], "training.warmup_steps: expected at most"),
        (["--vary", "attention=leap", "--seeds", "0"], "'--seeds'"),
        (["--cell", "a b: hidden_size=16", "--cell", "a/b: hidden_size=32"], "expected a folder of its own"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    lines = refused(capsys, str(write_recipe(tmp_path)), *arguments)
    assert message in "\n".join(lines) and not (tmp_path / "runs").exists()


def test_a_dry_run_lists_the_cells_and_their_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", str(write_recipe(tmp_path)), "--vary", "attention=leap,linear", "--dry-run"]) == 0
    *runs, total = capsys.readouterr().out.splitlines()
    folder = Path("runs", "ablations", "tiny")
    assert runs == [
        f"attention={kind}, seed {seed}: 8 steps, new; {folder / f'attention={kind}-seed{seed}'}"
        for seed in (0, 1)
        for kind in ("leap", "linear")
    ]
    assert total == "4 runs, 32 steps in all, 32 of them to be trained"
    assert not (tmp_path / "runs").exists()


def test_a_pretraining_counts_among_the_steps(capsys):
    both = ["ablate", "simulst/demo", "--vary", "learning_rate=1e-3", "--seeds", "1", "--dry-run"]
    assert main(both) == 0
    recipe, task = load_recipe("simulst/demo")
    before = task.pretraining(recipe)
    assert before is not None
    steps = recipe.training.max_steps + before[0].training.max_steps
    assert f"1 runs, {steps:,} steps in all" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["lm/wikitext2-small", "lra/text-cpu", "simulmt/demo"])
def test_recipes_of_every_task_can_be_varied(capsys, recipe):
    assert main(["ablate", recipe, "--vary", "learning_rate=1e-3,2e-3", "--budget", "10", "--dry-run"]) == 0
    assert "4 runs" in capsys.readouterr().out


def test_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr("leapformer.tasks.preparation.processors", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    grid = [type("Run", (), {"recipe": load_recipe(write_recipe(tmp_path))[0]})()] * 20
    assert _share(grid, None, None) == (8, 1)
    assert _share(grid, None, 3) == (2, 3)
    assert _share(grid, None, 16) == (1, 16)
    assert _share(grid, 1, None) == (1, None)
    assert _share(grid[:2], None, None) == (2, 1)
    assert _share(grid[:1], None, None) == (1, None)


# ---- the table of what is there


@pytest.fixture
def grid(tmp_path) -> tuple[Path, list[str], Path]:
    """A grid of which one run of eight is not there: recipe, the options that name it, its folder."""
    recipe, output = write_recipe(tmp_path), tmp_path / "grid"
    bits = {"softmax": [2.0, 2.5, 3.0, 3.5], "leap": [1.5, 2.125, 2.5]}
    for kind, values in bits.items():
        for seed, value in enumerate(values):
            folder = output / f"attention={kind}-seed{seed}"
            finished_run(folder, recipe, f"attention={kind}", seed=seed, bits=value)
    return recipe, ["--vary", "attention=softmax,leap", "--seeds", "4", "--output", str(output)], output


def test_the_table_of_what_is_finished(grid, capsys):
    recipe, options, output = grid
    assert main(["ablate", str(recipe), *options, "--table"]) == 0
    out = capsys.readouterr().out
    # Differences -0.5, -0.375, -0.5: mean -11 / 24, standard deviation 0.125 / sqrt(3), divided by sqrt(3).
    assert "| attention=softmax | 4 | 2.7500 ± 0.3227 | baseline |" in out
    assert "| attention=leap | 3 | 2.0417 ± 0.2917 | better -0.4583 ± 0.0417 |" in out
    assert "1 of 8 runs are not finished." in out
    assert (output / "ablation.md").read_text() + "\n" == out[: out.index("Written to")]
    content = json.loads((output / "ablation.json").read_text())
    assert content["cells"][1]["difference"] == pytest.approx(-11 / 24) and content["task"] == "lm"
    assert content["cell_overrides"] == {kind: [kind] for kind in ("attention=softmax", "attention=leap")}
    assert sum(content["runs"].values()) == 7
    assert (output / "ablation.csv").read_text().count("\n") == 3
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "ablation.svg").read_text()
    assert main(["ablate", str(recipe), *options, "--table", "--metric", "loss"]) == 0
    out = capsys.readouterr().out
    assert "| attention=leap | 3 | 1.60000 ± 0.00000 | none (+0.00000 ± 0.00000) |" in out
    assert main(["ablate", str(recipe), *options, "--table", "--baseline", "attention=leap"]) == 0
    assert "| attention=softmax | 4 | 2.7500 ± 0.3227 | worse +0.4583 ± 0.0417 |" in capsys.readouterr().out


def test_a_table_of_nothing(tmp_path, capsys):
    output = tmp_path / "grid"
    options = ["--vary", "attention=leap,linear", "--output", str(output), "--table"]
    assert main(["ablate", str(write_recipe(tmp_path)), *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "No run is finished, so there is no table.\n" and not output.exists()


def test_another_recipe_in_the_folder_of_a_cell_is_refused_with_its_keys(grid, capsys):
    recipe, options, output = grid
    lines = refused(capsys, str(recipe), *options, "learning_rate=1e-3")
    assert lines[0] == "leapformer: ablate:" and len(lines) == 8  # each of the seven that are there
    assert (
        f"{output}/attention=softmax-seed0: holds a finished run of another recipe (training.learning_rate was 0.003, "
        "now 0.001); choose another --output"
    ) in lines[1]
    content = yaml.safe_load(recipe.read_text())
    content["training"]["batch_size"] = 2
    recipe.write_text(yaml.safe_dump(content))
    assert "training.batch_size was 4, now 2" in refused(capsys, str(recipe), *options, "--table")[1]


def test_an_unfinished_run_of_another_recipe_is_refused_too(grid, capsys):
    recipe, options, output = grid
    folder = output / "attention=leap-seed3"
    finished_run(folder, recipe, "attention=leap", "clip=3", seed=3, bits=1.0)
    (folder / "results.json").unlink()
    (line,) = refused(capsys, str(recipe), *options, "--dry-run")
    assert "holds an unfinished run of another recipe (training.clip was 3.0, now 1.0)" in line


def test_the_state_of_a_grid_is_in_its_dry_run(grid, capsys):
    recipe, options, output = grid
    folder = output / "attention=leap-seed3"
    finished_run(folder, recipe, "attention=leap", seed=3, bits=1.0)
    (folder / "results.json").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 2.0}\n{"step": 5, "loss": 1.5}\n{"step": 6, "lo')
    assert main(["ablate", str(recipe), *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "attention=softmax, seed 0: 8 steps, finished;" in out
    assert "attention=leap, seed 3: 8 steps, 5 of 8 steps done;" in out
    assert out.endswith("8 runs, 64 steps in all, 3 of them to be trained\n")


# ---- the line of progress


def test_the_line_of_progress_fits_the_terminal_and_ends_in_lines(grid, capsys, monkeypatch):
    from leapformer.cli.ablate import _grid
    from leapformer.training.children import Work
    from leapformer.training.grid import expand

    recipe, _, output = grid
    monkeypatch.setenv("COLUMNS", "90")
    cells = expand(["attention=softmax,leap"], [])
    runs = {
        each.name: each
        for each in _grid(str(recipe), cells, [], seeds=range(4), budget=None, vary=[], folder=output)
        if each.seed == 3 or each.cell.name == "attention=leap"
    }
    works = [Work(name, ["none"], output / "log") for name in runs]
    children = Children(works, 2)
    progress = Progress(8, children)
    progress.on_terminal = True
    progress.looked = float("-inf")
    folder = output / "attention=leap-seed3"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 2.25}\n')
    children.running["attention=leap, seed 3"] = None  # pyright: ignore[reportArgumentType]
    progress.tell(runs, stopping=False)
    err = capsys.readouterr().err
    assert err.startswith("\r3/8 done, starting | attention=leap, seed 3 4/8 loss 2.250") and err.endswith("\x1b[K")
    children.running.clear()
    children.done.append("attention=leap, seed 0")
    children.failed["attention=leap, seed 3"] = "no memory\x1b[2J"
    progress.tell(runs, stopping=False)
    progress.close()
    lines = capsys.readouterr().err.replace("\r\x1b[K", "").splitlines()
    assert lines[0].startswith("[4/8] attention=leap, seed 0: loss ") or lines[0].startswith("[5/8]")
    assert any("attention=leap, seed 3: failed: no memory [2J" in line for line in lines)


def test_durations():
    assert [_duration(s) for s in (0.4, 89, 90, 3600, 5400, 12_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "60 min",
        "1 h 30 min",
        "3 h 20 min",
    ]


# ---- end to end


@pytest.mark.slow
def test_a_grid_end_to_end_with_a_cell_that_fails(tmp_path, capsys):
    output = tmp_path / "grid"
    small = ["hidden_size=16", "num_hidden_layers=1", "block_size=32", "eval_tokens=200", "validation_share=0.001"]
    cells = ["--cell", "leap: attention=leap", "--cell", "broken: source=text path=/nowhere", "--cell"]
    cells += ["softmax+conv: attention=softmax conv_width=4"]
    options = ["lm/pydocs-tiny", *small, *cells, "--seeds", "1", "--budget", "4", "--output", str(output)]
    assert main(["ablate", *options]) == 2
    captured = capsys.readouterr()
    assert "| leap | 1 |" in captured.out and "| softmax+conv | 1 |" in captured.out
    assert "one seed (" in captured.out and "| broken | 0 | - | - |" in captured.out
    assert "1 of 3 runs are not finished." in captured.out
    last = captured.err.splitlines()[-1]
    assert last.startswith("leapformer: 1 of 3 runs failed") and "broken, seed 0: " in last and "/nowhere" in last
    assert {line[:5] for line in captured.err.splitlines() if line.startswith("[")} == {"[1/3]", "[2/3]", "[3/3]"}
    run = RunFolder(output / "softmax+conv-seed0")
    found = run.results()
    assert (found["attention"], found["conv_width"], found["steps"], found["seed"]) == ("softmax", 4, 4, 0)
    assert found["state_bytes"] > 0 and run.recipe()["training"]["warmup_steps"] == 0
    # What is finished is not run again; what failed is, and fails again.
    before = run.results_path.stat().st_mtime_ns
    assert main(["ablate", *options]) == 2
    assert run.results_path.stat().st_mtime_ns == before
    assert "[3/3] broken, seed 0: failed" in capsys.readouterr().err


PROGRAM = [sys.executable, "-c", "import sys; from leapformer.cli import main; sys.exit(main())"]


def start_grid(folder: Path) -> tuple[subprocess.Popen[str], list[str], list[Path]]:
    """A grid of two runs of 300 steps, both of which have begun."""
    output = folder / "grid"
    options = ["ablate", str(write_recipe(folder)), "max_steps=300", "save_every=100000", "eval_every=100000"]
    options += ["--vary", "attention=leap,linear", "--seeds", "1", "--jobs", "2", "--output", str(output)]
    process = subprocess.Popen([*PROGRAM, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [output / f"attention={kind}-seed0" for kind in ("leap", "linear")]
    deadline = time.monotonic() + LIMIT
    while not all((run / "metrics.jsonl").is_file() for run in runs):
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(process.communicate()[1])
        time.sleep(0.02)
    return process, options, runs


def first_rows(runs: list[Path]) -> list[str]:
    return [(run / "metrics.jsonl").read_text().split("\n")[0] for run in runs]


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_with_a_checkpoint_and_the_same_command_goes_on(tmp_path, capsys):
    process, options, runs = start_grid(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, err
    assert out.startswith("Interrupted with ") and "The same command goes on" in out
    stopped = [run for run in runs if not (run / "results.json").exists()]
    assert stopped and all(len(list((run / "checkpoints").iterdir())) == 1 for run in stopped)
    for run in stopped:  # a busy machine may have finished the first one before the other began
        assert f"{run.name.removesuffix('-seed0')}, seed 0: stopped after step " in err
    before = first_rows(runs)
    assert main(options) == 0
    assert "| attention=linear | 1 |" in capsys.readouterr().out
    assert first_rows(runs) == before  # their seconds would be others if they had begun again
    for run in runs:
        steps = [event["step"] for event in RunFolder(run).metrics() if "loss" in event]
        assert steps == list(range(1, 301))


@pytest.mark.slow
def test_after_a_kill_the_runs_save_and_the_same_command_goes_on(tmp_path, capsys):
    process, options, runs = start_grid(tmp_path)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + LIMIT
    while any((run / ".lock").exists() for run in runs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    saved = [run for run in runs if not (run / "results.json").exists()]
    assert saved and all(len(list((run / "checkpoints").iterdir())) == 1 for run in saved)
    before = first_rows(runs)
    assert main(options) == 0
    assert "| attention=linear | 1 |" in capsys.readouterr().out and first_rows(runs) == before
