"""Runs that somebody else made: read-only ones are looked at, hostile ones do nothing, damaged ones are one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from leapformer.cli import keeping, main
from leapformer.errors import LeapformerError
from leapformer.tasks.simulst.scoring.curves import evaluate_curve
from leapformer.training.run import Run
from leapformer.training.train import train
from tests.training.builders import tiny_recipe


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    train(*tiny_recipe(folder, "max_steps=2"), folder / "run")
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "runs" / "run")
    return tmp_path / "runs" / "run"


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line]
    assert len(lines) == 1 and lines[0].startswith("leapformer: ")
    return lines[0]


@pytest.fixture
def read_only(monkeypatch, run):
    """As on storage that can't be written, where root can't either."""

    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system", str(run))

    access = os.access
    monkeypatch.setattr(Run, "write_results", refuse)
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not Path(path).is_relative_to(run.parent)
    )
    (run / "plots").write_text("")  # no folder can be made there


def test_a_read_only_run_is_evaluated_and_drawn(capsys, run, read_only):
    before = sorted(path for path in run.parent.rglob("*"))
    assert main(["evaluate", str(run)]) == 0
    output = capsys.readouterr().out
    assert "word_perplexity" in output and "The figures could not be kept: " in output and "Written" not in output
    assert main(["plot", "proportions", str(run)]) == 0
    output = capsys.readouterr().out
    assert "layer 0: queries 0." in output and "The pictures could not be kept: " in output
    assert sorted(path for path in run.parent.rglob("*")) == before
    assert main(["plot", "proportions", str(run), "--output", str(run.parent.parent / "out")]) == 0


def test_the_cache_of_a_read_only_run_is_used_and_left_alone(run, read_only):
    cache = run.parent / ".cache"
    cache.mkdir()
    (cache / "a").write_text("1")
    with keeping.cache_of(Run(run)) as folder:
        assert folder != cache and (folder / "a").read_text() == "1"
        (folder / "b").write_text("2")
    assert not folder.exists() and sorted(path.name for path in cache.iterdir()) == ["a"]


def test_logs_that_cannot_be_kept_cost_no_figures(tmp_path, capsys):
    from tests.cli.test_plot import translated

    (tmp_path / "evaluation").write_text("")  # a file in the place of the folder
    kept = []
    points = evaluate_curve(
        tmp_path, "test", [1, None], write=lambda k: translated(k, right=0.8, seed=0),
        keep=lambda write: kept.append(keeping.keep(write, what="the logs")),
    )  # fmt: skip
    assert len(points) == 2 and kept == [False, False] and "The logs could not be kept: " in capsys.readouterr().out


def test_no_code_of_a_run_is_executed(capsys, monkeypatch, run):
    model = run / "model"
    (model / "evil.py").write_text(f"open({str(run / 'executed')!r}, 'w').close()\nclass Evil:\n    pass\n")
    path = model / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(content))
    for command in (["evaluate"], ["generate", "the"], ["plot", "proportions"]):
        with open(os.devnull) as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            text = command[1:] if command[0] == "generate" else []
            words = command[:1] if text else command
            assert "auto_map: expected none" in refusal(capsys, *words, run, *text)
    assert not (run / "executed").exists()


@pytest.mark.parametrize(
    "name", ["results.json", "recipe.yaml", "metrics.jsonl", "model", "evaluation", "model/config.json"]
)
def test_nothing_outside_of_a_run_is_read_or_written(capsys, tmp_path, run, name):
    path, outside = run / name, tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.mkdir()
    path.symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else sorted(outside.iterdir())
    for command in ("evaluate", "compare"):
        assert "expected no link that leads out of" in refusal(capsys, command, run)
    assert before == (outside.read_bytes() if outside.is_file() else sorted(outside.iterdir()))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("results.json", b"[" * 100_000, "at most 64 deep"),
        ("results.json", b"9" * 5000, "4300 digits"),
        ("results.json", b"\xff", "expected UTF-8"),
        ("results.json", b'{"splits": 3}', "splits: expected a valid dictionary"),
        ("recipe.yaml", b"task: 2020-99-99", "task '2020-99-99'"),
        ("recipe.yaml", b"- " * 100_000, "at most 64 deep"),
        ("recipe.yaml", b"\xff", "expected UTF-8"),
        ("recipe.yaml", b"[]", "expected a recipe"),
        ("model/config.json", b"[]", "expected a JSON object, found list []"),
        ("model/config.json", b"[" * 100_000, "at most 64 deep"),
        ("model/config.json", b'{"model_type": "leapformer", "hidden_size": "x"}', "do not fit"),
        ("model/tokenizer.json", b"{}", "no tokenizer could be loaded"),
        ("model/tokenizer.json", b"\xff", "expected UTF-8"),
        ("model/tokenizer_config.json", b"[]", "expected a JSON object"),
        ("model/model.safetensors", b"\xff" * 100, "expected whole safetensors weights"),
        ("model/model.safetensors", b"", "expected whole safetensors weights"),
    ],
)
def test_damage_is_one_line(capsys, run, name, content, found):
    (run / name).write_bytes(content)
    assert found in refusal(capsys, "evaluate", run)


@pytest.mark.parametrize(
    "name", ["results.json", "recipe.yaml", "metrics.jsonl", "model/config.json", "model/tokenizer.json"]
)
def test_a_pipe_does_not_wait(capsys, run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    assert "found a pipe" in refusal(capsys, "evaluate", run)


def test_a_model_of_another_task(capsys, run):
    path = run / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LeapformerForMaskedLM"]}))
    assert "expected a LeapformerForCausalLM, found a LeapformerForMaskedLM" in refusal(capsys, "evaluate", run)
    assert "expected a LeapformerForCausalLM" in refusal(capsys, "generate", run, "x")


def test_both_readers_of_a_run_say_the_same(trained):
    from leapformer.analysis.runs import load_run

    assert load_run(trained).results == Run(trained).results()
    assert load_run(trained).events == Run(trained).metrics()
    with pytest.raises(LeapformerError, match="expected a finished run"):
        load_run(trained.parent)
