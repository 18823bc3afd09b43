"""``leapformer data prepare``: what it prints, and one line for every wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from leapformer.cli import main
from leapformer.cli.data_sets import DATA_SETS
from leapformer.tasks.lra.dataset import load
from leapformer.tasks.simulst.corpora.preparing import CORPORA


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


# ---- speech


def speech_rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_spoken_grammar(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    output = tmp_path / "x"
    arguments = ["speech-demo", "--count", "10", "--workers", "1", "--output", str(output)]
    assert main(["data", "prepare", *arguments]) == 0
    printed = capsys.readouterr()
    assert "train: 10 utterances, 0.01 hours, " in printed.out and "GPL-3" in printed.out
    assert f"Written to {output}" in printed.out and "speech-demo: shards" in printed.err
    assert [len(speech_rows(output, split)) for split in ("train", "validation", "test")] == [10, 1, 1]
    assert "holds data with seed 0, expected 1" in one_line(capsys, *arguments, "--seed", "1")


def test_spoken_text(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    for name, lines in {"a.fr": ["Bonjour.", "", "Merci."], "a.en": ["Hello.", "x", "Thanks."],
                        "b.fr": ["Bonsoir."], "b.en": ["Good evening."]}.items():  # fmt: skip
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    a, b = ([str(tmp_path / f"{name}.{language}") for language in ("fr", "en")] for name in "ab")
    arguments = ["speech-from-text", "--pairs", *a, "--validation-pairs", *b, "--test-pairs", *b, "--language", "fr",
                 "--workers", "1", "--output", str(tmp_path / "x")]  # fmt: skip
    assert "a.fr:2: expected text, found an empty line" in one_line(capsys, *arguments)
    assert main(["data", "prepare", *arguments, "--skip-bad"]) == 0
    assert "skipped: data: " in capsys.readouterr().err
    train, test = (speech_rows(tmp_path / "x", split) for split in ("train", "test"))
    assert [row["translation"] for row in train] == ["Hello.", "Thanks."] and train[0]["voice"].startswith("fr+")
    assert [row["text"] for row in test] == ["Bonsoir."]


def test_recorded_speech(tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    corpus, output = tmp_path / "corpus", tmp_path / "x"
    corpus.mkdir()
    samples = np.arange(8_000, dtype=np.int16)
    soundfile.write(corpus / "a.wav", samples, 16_000)
    for split in ("train", "dev", "tst-HE"):
        rows = [f"{name}\t{name}.wav\tEins {name}\ten" for name in ("a", "b")]
        (corpus / f"{split}_st.tsv").write_text("\n".join(["id\taudio\ttgt_text\tsrc_lang", *rows, "c\tc\tc\tes"]))
    arguments = ["speech-manifest", "--from", str(corpus), "--source-language", "en", "--target-language", "de",
                 "--workers", "1", "--output", str(output)]  # fmt: skip
    assert "dev_st.tsv:3: b.wav: expected an audio file, found No such file" in one_line(capsys, *arguments)
    assert main(["data", "prepare", *arguments, "--skip-bad"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("skipped: ") == 3 and "3 bad rows were skipped" in printed.err
    for line in (
        "train: 1 utterances, 0.00 hours, 0.0 MB",
        "test-he: 1 utterances",
        "left out: 3 rows, other languages",
    ):
        assert line in printed.out
    assert (output / "test-he.int16").read_bytes() == samples.astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("name", "extra"), [("speech-demo", "espeak"), ("speech-from-text", "espeak"), ("speech-mustc", "speech"),
                        ("lra-text", "lra"), ("something", "lra")],
)  # fmt: skip
def test_a_missing_package_is_told_by_its_extra(monkeypatch, capsys, name, extra):
    monkeypatch.delitem(sys.modules, "leapformer.cli.data", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    line = one_line(capsys, name, "--output", "x")
    assert "'tqdm'" in line and f"pip install 'leapformer[{extra}]'" in line


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
        (["lra-image", "--pairs", "a", "b", "--from", ".", "--output", "x"], "--pairs is not an option of this task"),
        (["speech-mustk", "--output", "x"], "did you mean speech-mustc"),
        (["speech-demo", "--from", ".", "--output", "x"], "speech-demo: --from is not an option of this data set"),
        (["speech-demo", "--size", "32", "--output", "x"], "speech-demo: --size is not an option of this data set"),
        (["speech-from-text", "--output", "x"], "speech-from-text: expected --pairs SOURCE TARGET, found none"),
        (["speech-from-text", "--output", "x", "--pairs", "a"], "Option '--pairs' requires 2 arguments"),
        (["speech-mustc", "--output", "x"], "speech-mustc: expected --from with the folder of the corpus, found none"),
        (["speech-mustc", "--language", "en", "--output", "x"], "--language is not an option of this data set"),
        (
            ["speech-mustc", "--from", ".", "--source-language", "en", "--output", "x"],
            "speech-mustc: expected --source-language and --target-language, found en",
        ),
        (
            ["speech-mustc", "--from", "file", "--source-language", "en", "--target-language", "de", "--output", "x"],
            "--from file: expected a folder, found a file",
        ),
        (["lra-listops"], "Missing option '--output'"),
        (["lra-listops", "--output", "file"], "--output file: expected a folder, found a file"),
        (["lra-listops", "--output", "."], "--output .: expected an empty folder, found file"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert message in one_line(capsys, *arguments)


def test_every_corpus_has_a_command(capsys):
    line = one_line(capsys, "nothing", "--output", "x")
    assert all(f"speech-{corpus}" in line for corpus in CORPORA)


# ---- the table of data sets


def help_of(capsys, *arguments: str) -> str:
    assert main(["data", "prepare", *arguments, "--help"]) == 0
    return capsys.readouterr().out


def test_help_lists_the_data_sets_with_a_line_each(capsys):
    printed = help_of(capsys)
    for entry in DATA_SETS.values():
        assert any(line.split() == [entry.name, *entry.about.split()] for line in printed.splitlines())
    assert "--output" not in printed


def test_help_of_one_shows_its_options_alone(capsys):
    general = {"--output", "--seed", "--workers", "--skip-bad", "--help"}
    for name, own in {
        "lra-listops": {"--from", "--count", "--min-length", "--max-length"},
        "lra-image": {"--from"},
        "lra-pathfinder": {"--from", "--count", "--size", "--level"},
        "speech-demo": {"--count"},
        "speech-from-text": {"--count", "--pairs", "--validation-pairs", "--test-pairs", "--language"},
        "speech-covost": {"--count", "--from", "--source-language", "--target-language"},
    }.items():
        shown = {line.split()[0] for line in help_of(capsys, name).splitlines() if line.startswith("  --")}
        assert shown == general | own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'NAME'"),
        (["--output", "x"], "Missing argument 'NAME'"),
        (["--output", "x", "--skip-bad", "lra-text"], "lra-text: expected --from"),
        (["--pairs", "a", "b", "lra-image", "--output=x"], "lra-image: --pairs is not an option of this task"),
        (["--count", "9", "lra-text", "--from=x", "--output=x"], "lra-text: --count is not an option of this task"),
        (["--output=x", "--", "bogus"], "found 'bogus'"),
        (["--bogus", "lra-text"], "No such option: --bogus"),
        (["lra-text", "--output", "x", "--bogus", "3"], "No such option: --bogus"),
        (["lra-text", "--output"], "Option '--output' requires an argument"),
        (["lra-text", "--output", "x", "more"], "unexpected extra argument"),
    ],
)
def test_the_name_may_stand_behind_options(capsys, arguments, message):
    assert message in one_line(capsys, *arguments)
