"""``leapformer plot latency`` and ``leapformer compare`` on translation runs that are made up, logs and all."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from leapformer.cli import main
from leapformer.tasks.registry import describe
from leapformer.tasks.simulst.scoring.curves import log_path
from leapformer.tasks.simulst.scoring.instances import Instance, score, write_instances
from tests.analysis.builders import translation_results, write_translation_run

WORDS = "the cat the dog and a very old mouse sat on one mat".split()
KS = (1, 5, None)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")


def translated(k: int | None, *, right: float, seed: int, sentences: int = 30) -> list[Instance]:
    """Sentences of seven words, one a second, of which a share is right."""
    of_references, own = random.Random(0), random.Random(seed)
    instances = []
    for index in range(sentences):
        reference = of_references.choices(WORDS, k=7)
        prediction = [word if own.random() < right else own.choice(WORDS) for word in reference]
        delays = [7000.0 if k is None else min((k + place) * 1000.0, 7000.0) for place in range(7)]
        instances.append(Instance(index, " ".join(prediction), delays, [], " ".join(reference), ["a.wav"], 7000.0))
    return instances[::-1]  # the order of the rows does not matter


def evaluated(folder: Path, name: str, attention: str, *, right: float, seed: int = 0) -> Path:
    """A run with its logs and its curve."""
    run = write_translation_run(folder, name, attention)
    points = []
    for k in KS:
        instances = translated(k, right=right, seed=seed)
        path = log_path(run, "test", k)
        path.parent.mkdir(parents=True)
        write_instances(path, instances)
        points.append({"k": k, "sentences": len(instances), **score(instances)})
    content = translation_results(attention, points=None, name=name, curves={"test": points})
    run.joinpath("results.json").write_text(json.dumps(content))
    return run


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return [
        str(evaluated(tmp_path, "base", "softmax", right=0.7, seed=1)),
        str(evaluated(tmp_path, "ours", "leap", right=0.9, seed=2)),
    ]


def one_line(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_latency_prints_tables_and_writes_them_with_the_picture(runs, tmp_path, capsys):
    output = tmp_path / "new" / "pictures"
    assert main(["plot", "latency", *runs, "--split", "test", "--draws", "100", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "against softmax" in printed and "offline" in printed and "95 % of 100 bootstrap draws" in printed
    assert sorted(path.name for path in output.iterdir()) == ["quality-latency-test.md", "quality-latency-test.png"]
    assert output.joinpath("quality-latency-test.png").read_bytes().startswith(b"\x89PNG")
    text = output.joinpath("quality-latency-test.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    row = next(row for row in rows if row[:2] == ["LeaPformer", "1"])
    low, high = (float(end) for end in row[4].split("[")[1].rstrip("]").split(","))
    assert 0 < low < float(row[4].split()[0]) < high  # clearly better on the same sentences
    assert row[rows[0].index("LAAL s")] == "1.00"
    assert ["LeaPformer", "3"] in [row[:2] for row in rows]  # at an equal lagging of 3 s


def test_without_draws_or_logs_there_are_no_intervals(runs, tmp_path, capsys):
    arguments = ["plot", "latency", *runs, "--split", "test", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--draws", "0"]) == 0
    assert "[" not in (printed := capsys.readouterr().out) and "bootstrap" not in printed
    for run in runs:
        for k in KS:
            log_path(Path(run), "test", k).unlink()
    assert main(arguments) == 0
    assert "No logs of sentences, and so no intervals." in capsys.readouterr().out


def test_points_of_other_policies_have_intervals_from_their_own_logs(runs, tmp_path, capsys):
    for number, run in enumerate(map(Path, runs)):
        instances = translated(2, right=0.6 + 0.3 * number, seed=3 + number)
        path = log_path(run, "test", "align-att-frames-2")
        path.parent.mkdir(parents=True)
        write_instances(path, instances)
        content = json.loads((run / "results.json").read_text())
        points = [{"frames": 2, "sentences": len(instances), **score(instances)}]
        content["policy_curves"] = {"test": [{"label": "align-att", "option": "frames", "points": points}]}
        (run / "results.json").write_text(json.dumps(content))
    output = tmp_path / "pictures"
    assert main(["plot", "latency", *runs, "--split", "test", "--draws", "50", "--output", str(output)]) == 0
    text = output.joinpath("quality-latency-test.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    row = next(row for row in rows if row[:2] == ["LeaPformer, align-att", "frames=2"])
    low, high = (float(end) for end in row[4].split("[")[1].rstrip("]").split(","))
    assert 0 < low < float(row[4].split()[0]) < high
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--split", "test", "--output", str(page)]) == 0
    assert "LeaPformer, align-att" in page.read_text() and "frames=2" in page.read_text()
    path.unlink()
    assert main(["plot", "latency", *runs, "--split", "test", "--draws", "50", "--output", str(output)]) == 0


def test_latency_faults_are_one_line(runs, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert "no scores by k on validation; run: leapformer evaluate" in one_line(
        capsys, "plot", "latency", *runs, *output
    )
    test = [*output, "--split", "test"]
    path = log_path(Path(runs[1]), "test", 5)
    instances = translated(5, right=0.9, seed=2)
    write_instances(path, translated(5, right=0.1, seed=2))
    error = one_line(capsys, "plot", "latency", *runs, *test)
    assert f"{path}: expected BLEU " in error and error.endswith("; evaluate again\n")
    write_instances(path, [*instances[:-1], Instance(0, "x", [1.0], [], "x", ["a.wav"], 7000.0)])
    changed = json.loads(Path(runs[1], "results.json").read_text())
    changed["curves"]["test"][1] |= score([*instances[:-1], Instance(0, "x", [1.0], [], "x", ["a.wav"], 7000.0)])
    Path(runs[1], "results.json").write_text(json.dumps(changed))
    assert "and not the same: only equal test sets compare" in one_line(capsys, "plot", "latency", *runs, *test)
    path.write_text("{\n")
    assert "instances.log:1" in one_line(capsys, "plot", "latency", *runs, *test)
    (tmp_path / "file").write_text("")
    assert "expected a folder, found a file" in one_line(
        capsys, "plot", "latency", *runs, "--output", str(tmp_path / "file")
    )
    assert not (tmp_path / "out").exists()


def test_compare_says_quality_and_lagging_and_writes_them_on_the_page(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--split", "test", "--markdown", "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    header = printed.splitlines()[0]
    assert all(name in header for name in ("BLEU k=5", "BLEU offline", "LAAL s k=5", "parameters", "tokens/s"))
    assert "LAAL lagging of the words" in printed
    text = page.read_text()
    assert "Quality and lagging" in text and "against softmax" in text and "lagging, LAAL (s)" in text


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            {"k": 5, "BLEU": 25.314},
            "loss 1.2346 nats a token, token accuracy 72.50%, BLEU 25.31 at k = 5; 800 tokens/s",
        ),
        (
            {"k": None, "BLEU": 30.0},
            "loss 1.2346 nats a token, token accuracy 72.50%, BLEU 30.00 offline; 800 tokens/s",
        ),
        ({"chrF": 71.5}, "loss 1.2346 nats a token, token accuracy 72.50%, chrF 71.50; 800 tokens/s"),
        ({}, "loss 1.2346 nats a token, token accuracy 72.50%; 800 tokens/s"),
    ],
)
def test_a_finished_training_is_told_in_one_line(metrics, said):
    split = {"loss": 1.23456, "perplexity": 3.4, "token_accuracy": 0.725, **metrics}
    assert describe({"tokens_per_second": 800.4, "splits": {"validation": split}}) == said
