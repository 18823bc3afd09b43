"""The command: what it prints, its exit codes, and one line for every wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from leapformer import __version__
from leapformer.cli import main
from tests.training.builders import write_recipe


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Finished runs of two attentions with two seeds each."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = write_recipe(folder)
    for attention in ("leap", "softmax"):
        for seed in (0, 1):
            output = folder / "runs" / f"{attention}-{seed}"
            arguments = ["train", str(recipe), f"attention={attention}", f"seed={seed}", "--output", str(output)]
            assert main(arguments) == 0
    return folder / "runs"


def one_line(capsys, *arguments: str) -> str:
    """The error of a call that must fail with code 2, nothing on the output and one line."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("leapformer: ")
    return captured.err


def test_help_and_version(capsys):
    assert main([]) == 0 and "train" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0 and "KEY=VALUE" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    output = capsys.readouterr().out
    assert "lm/wikitext2-small" in output and "lm/wikitext103" in output and "250,000 steps" in output


def test_train_says_where_everything_is(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    threads = torch.get_num_threads()
    output = tmp_path / "run"
    assert main(["train", str(recipe), "max_steps=1", "--output", str(output), "--threads", str(threads)]) == 0
    captured = capsys.readouterr()
    assert "validation: loss" in captured.out and f"Written to {output}" in captured.out
    assert "100%" in captured.err


def test_train_names_the_run_after_the_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(write_recipe(tmp_path)), "max_steps=1", "attention=linear"]) == 0
    assert (tmp_path / "runs" / "tiny-max_steps=1-attention=linear" / "results.json").is_file()


def test_compare_groups_seeds_and_tells_the_difference(runs, capsys):
    folders = [str(path) for path in sorted(runs.iterdir()) if path.name != ".cache"]
    assert main(["compare", *folders, "--markdown"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n| LeaPformer | 0, 1 |") == output.count("\n| softmax | 0, 1 |") == 1
    assert "| counted bigram |" in output and " ± " in output
    assert "standard error" in output and "over 2 paired seeds" in output
    assert main(["compare", *folders]) == 0
    assert "LeaPformer" in capsys.readouterr().out


def test_compare_refuses_a_seed_twice_and_a_split_without_figures(runs, capsys):
    folder = str(runs / "leap-0")
    assert "expected each seed of a recipe once" in one_line(capsys, "compare", folder, folder)
    assert "not evaluated on test" in one_line(capsys, "compare", folder, "--split", "test")
    assert "found none" in one_line(capsys, "compare", str(runs / "nothing"))


def test_evaluate_adds_a_split(runs, capsys):
    folder = runs / "softmax-1"
    before = json.loads((folder / "results.json").read_text())["splits"]["validation"]
    assert main(["evaluate", str(folder)]) == 0
    assert "word_perplexity" in capsys.readouterr().out
    after = json.loads((folder / "results.json").read_text())["splits"]["validation"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert main(["evaluate", str(folder), "--context-window", "5"]) == 0
    capsys.readouterr()
    splits = json.loads((folder / "results.json").read_text())["splits"]
    assert splits["validation"] == after
    assert splits["validation, context window 5"]["tokens"] == after["tokens"]
    assert splits["validation, context window 5"]["loss"] != after["loss"]
    assert "data.context_window: expected 0 to" in one_line(capsys, "evaluate", str(folder), "--context-window", "900")
    assert "no test split" in one_line(capsys, "evaluate", str(folder), "--split", "test")
    assert "unknown split 'tset'" in one_line(capsys, "evaluate", str(folder), "--split", "tset")


def test_generate_goes_on_from_the_prompt(runs, capsys):
    arguments = ["generate", str(runs / "leap-0"), "the cat", "--tokens", "5", "--seed", "3"]
    outputs = []
    for _ in range(2):
        assert main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith("the cat") and len(outputs[0]) > len("the cat\n")
    assert "expected at least one token" in one_line(capsys, "generate", str(runs / "leap-0"), "")


def test_a_prompt_too_long_for_cosformer(tmp_path, capsys):
    output = str(tmp_path / "run")
    assert main(["train", str(write_recipe(tmp_path)), "attention=cosformer", "max_steps=1", "--output", output]) == 0
    capsys.readouterr()
    error = one_line(capsys, "generate", output, "a long prompt of many letters")
    assert "expected at most max_position_embeddings=16 tokens" in error and "cosFormer" in error
    assert main(["generate", output, "ab", "--tokens", "15", "--temperature", "0"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "lm/wikitext2-smal"], "did you mean lm/wikitext2-small"),
        (["train", "lm/pydocs-tiny", "sed=1"], "sed: unknown key; did you mean"),
        (["train", "lm/pydocs-tiny", "variant=pape"], "model.variant: expected one of paper, gated, found 'pape'"),
        (["train", "lm/pydocs-tiny", "--threads", "0"], "Invalid value for '--threads'"),
        (["generate", "nowhere", "x"], "nowhere: expected the folder of a run"),
        (["evaluate", "nowhere"], "nowhere: expected the folder of a run"),
    ],
)
def test_wrong_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in one_line(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_several_faults_of_a_recipe_are_a_line_each(capsys):
    assert main(["train", "lm/pydocs-tiny", "sed=1", "learning_rate=0", "leap_bins=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "leapformer: recipe lm/pydocs-tiny: 3 faults" and len(lines) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"caf\xe9 and tea\n" * 9, "offset 3"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "rows.jsonl:2"),
    ],
)
def test_wrong_data_is_one_line_and_writes_nothing(tmp_path, capsys, name, content, message):
    recipe = write_recipe(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    output = tmp_path / "runs" / "a"
    assert message in one_line(capsys, "train", str(recipe), f"path={tmp_path / name}", "--output", str(output))
    assert not output.exists()


def test_a_language_model_that_cannot_be_causal_is_one_line(tmp_path, capsys):
    arguments = ["train", str(write_recipe(tmp_path)), "attention=bigbird", "--output", str(tmp_path / "runs" / "a")]
    assert "expected a kind that can be causal, found 'bigbird'" in one_line(capsys, *arguments)


def test_a_cut_off_model_is_one_line(runs, tmp_path, capsys):
    weights = runs / "leap-1" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    try:
        assert "model.safetensors: expected whole safetensors weights" in one_line(
            capsys, "generate", str(runs / "leap-1"), "x"
        )
    finally:
        weights.write_bytes(whole)


def test_plot_proportions_writes_one_picture_for_each_layer(runs, capsys):
    assert main(["plot", "proportions", str(runs / "leap-0"), "--text", "the cat sat"]) == 0
    assert "proportions-layer-0.svg" in capsys.readouterr().out
    assert (runs / "leap-0" / "plots" / "proportions-layer-0.svg").read_text().lstrip().startswith("<")


def test_a_missing_extra_is_told_with_the_pip_line(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "leapformer.cli.recipes", raising=False)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert "pip install 'leapformer[lm]'" in one_line(capsys, "recipes")


def test_ctrl_c_ends_with_the_line_that_resumes(tmp_path):
    """A process of its own, as a user would stop it; the printed command then finishes the run."""
    recipe, output = write_recipe(tmp_path), tmp_path / "run"
    program = [sys.executable, "-c", "import sys; from leapformer.cli import main; sys.exit(main())"]
    arguments = ["train", str(recipe), "max_steps=100000", "save_every=100000", "eval_every=100000"]
    process = subprocess.Popen(
        [*program, *arguments, "--output", str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = out.splitlines()[-1]
    assert last.startswith("Interrupted after step ")
    assert last.endswith(f"To go on: leapformer {' '.join(arguments)} --output {output}")
    assert len(list((output / "checkpoints").iterdir())) == 1
