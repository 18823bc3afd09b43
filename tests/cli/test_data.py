"""``leapformer data prepare``: what it prints, and one line for every wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leapformer.cli import main
from leapformer.tasks.lra.dataset import load


def one_line(capsys, *arguments: str) -> str:
    assert main(["data", "prepare", *arguments]) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert captured.out == "" and line.startswith("leapformer: ")
    return line


def test_generated_data_and_a_second_call(tmp_path, capsys):
    output = str(tmp_path / "x")
    arguments = ["lra-listops", "--count", "30", "--min-length", "20", "--max-length", "50", "--workers", "1"]
    for _ in range(2):
        assert main(["data", "prepare", *arguments, "--output", output]) == 0
        printed = capsys.readouterr().out
        assert "train: 30 examples, " in printed and f"Written to {output}" in printed
    assert len(load("listops", output, "test")) == 3
    assert "holds data with seed 0, expected 1" in one_line(capsys, *arguments, "--seed", "1", "--output", output)


def write_imdb(folder: Path) -> Path:
    folder.mkdir()
    rows = [json.dumps({"label": 1, "text": "x"})] * 10 + ["{"] * 30
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def test_bad_rows_are_listed(tmp_path, capsys):
    source = write_imdb(tmp_path / "imdb")
    arguments = ["lra-text", "--from", str(source), "--output", str(tmp_path / "x")]
    assert f"{source / 'train.jsonl'}:11: expected a JSON object" in one_line(capsys, *arguments)
    assert main(["data", "prepare", *arguments, "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert error.count("skipped: ") == 20 and "60 bad rows were skipped" in error and "card.json lists them" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lra-listop", "--output", "x"], "expected one of lra-listops, lra-text"),
        (["lra-listop", "--output", "x"], "did you mean lra-listops"),
        (["lra-text", "--output", "x"], "lra-text: expected --from"),
        (
            ["lra-text", "--from", "nowhere", "--output", "x"],
            "--from nowhere: expected a file or folder, found nothing",
        ),
        (["lra-image", "--from", ".", "--size", "32", "--output", "x"], "--size is not an option of this task"),
        (["lra-pathfinder", "--size", "31", "--output", "x"], "--size: expected 32, 64, 128 or 256, found 31"),
        (["lra-listops"], "Missing option '--output'"),
        (["lra-listops", "--output", "file"], "--output file: expected a folder, found a file"),
        (["lra-listops", "--output", "."], "--output .: expected an empty folder, found file"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert message in one_line(capsys, *arguments)
