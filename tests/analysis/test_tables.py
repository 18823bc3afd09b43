"""The comparison table: groups of seeds, paired differences, baselines."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapformer.analysis.markdown import markdown_table
from leapformer.analysis.runs import RunRecord
from leapformer.analysis.tables import comparison, paired_difference
from leapformer.errors import LeapformerError

from .builders import curve_point, results, translation_results


def run(attention: str, loss: float, /, *, seed: int = 0, fingerprint: str = "aaaaaaaa") -> RunRecord:
    content = results(attention, perplexity=300.0, seed=seed, recipe_fingerprint=fingerprint)
    content["splits"]["validation"]["loss"] = loss
    return RunRecord(folder=Path(f"{attention}-{seed}-{fingerprint}"), results=content)


def test_seeds_of_a_recipe_are_one_row_with_mean_and_deviation():
    table = comparison([run("leap", 3.0), run("leap", 3.2, seed=1), run("softmax", 2.5)])
    assert [row[:3] for row in table.rows] == [
        ["softmax", "0", "2.5000"],
        ["LeaPformer", "0, 1", "3.1000 ± 0.1414"],
        ["counted bigram", "", ""],
        ["counted unigram", "", ""],
    ]
    assert [row[:3] for row in table.runs] == [
        ["softmax-0-aaaaaaaa", "0", "2.5000"],
        ["leap-0-aaaaaaaa", "0", "3.0000"],
        ["leap-1-aaaaaaaa", "1", "3.2000"],
    ]
    assert all(len(row) == len(table.columns) for row in table.rows + table.runs)
    assert comparison([run("leap", 3.0), run("softmax", 2.5)]).runs == []  # the rows say it already
    assert table.notes == []  # one seed in common says nothing of a difference


def test_a_difference_under_two_standard_errors_is_none():
    mean, error = paired_difference([3.0, 3.2, 3.1], [3.1, 3.15, 3.2])
    assert mean == pytest.approx(-0.05) and error == pytest.approx(0.05)
    assert str(paired_difference([1.0], [2.0])) == "(-1.0, nan)"
    close = [run("leap", loss, seed=seed) for seed, loss in enumerate([3.0, 3.2, 3.1])]
    close += [run("softmax", loss, seed=seed) for seed, loss in enumerate([3.1, 3.15, 3.2])]
    (note,) = comparison(close).notes
    assert note.endswith("-0.0500 nats/token, standard error 0.0500 over 3 paired seeds: no difference")
    far = [run("leap", loss, seed=seed) for seed, loss in enumerate([2.0, 2.2, 2.1])] + close[3:]
    (note,) = comparison(far).notes
    assert note.endswith("over 3 paired seeds: LeaPformer is better")


def test_one_label_of_two_recipes_is_two_rows():
    table = comparison([run("leap", 3.0), run("leap", 2.0, fingerprint="bbbbbbbb")])
    assert [row[0] for row in table.rows[:2]] == [
        "LeaPformer, lm/pydocs-tiny bbbbbb",
        "LeaPformer, lm/pydocs-tiny aaaaaa",
    ]


def translation(attention: str, bleu: float | None, /, *, seed: int = 0, **changes) -> RunRecord:
    points = None if bleu is None else [curve_point(5, bleu, 1800), curve_point(None, bleu + 8, 4000)]
    content = translation_results(attention, points=points, seed=seed, recipe_fingerprint="aaaaaaaa", **changes)
    return RunRecord(folder=Path(f"{attention}-{seed}"), results=content)


def test_translation_runs_have_columns_of_their_own():
    table = comparison([translation("leap", 25.0), translation("leap", 27.0, seed=1), translation("softmax", None)])
    assert table.columns == [
        "model",
        "seeds",
        "loss",
        "ppl",
        "token accuracy %",
        "BLEU k=5",
        "BLEU offline",
        "LAAL s k=5",
        "tokens/s",
        "MiB",
        "parameters",
        "of LeaP",
    ]
    rows = {row[0]: row[2:8] for row in table.rows}
    assert rows["LeaPformer"][3:] == ["26.00 ± 1.41", "34.00 ± 1.41", "1.80 ± 0.00"]
    assert rows["softmax"] == ["1.2500", "3.49", "72.50", "-", "-", "-"]
    text = comparison([translation("leap", 25.0, source="text")])
    assert "LAAL words k=5" in text.columns and "LAAL s k=5" not in text.columns


def test_a_split_that_was_only_translated_is_compared_without_a_loss():
    curves = {"test": [curve_point(5, 25.0, 1800)]}
    runs = [translation("leap", None, curves=curves), translation("softmax", None, curves=curves)]
    table = comparison(runs, split="test")
    assert "loss" not in table.columns and [row[0] for row in table.rows] == ["LeaPformer", "softmax"]
    tested = {"test": {"loss": 1.0}}
    table = comparison([*runs[:1], translation("softmax", None, curves=curves, splits=tested)], split="test")
    assert [row[:3] for row in table.rows] == [["softmax", "0", "1.0000"], ["LeaPformer", "0", "-"]]


def test_paired_seeds_compare_loss_and_bleu():
    runs = [translation("leap", bleu, seed=seed) for seed, bleu in enumerate([25.0, 27.0, 26.0])]
    runs += [translation("softmax", bleu, seed=seed) for seed, bleu in enumerate([22.0, 24.5, 22.5])]
    loss, bleu = comparison(runs).notes
    assert loss == (
        "LeaPformer - softmax: +0.0000 nats/token, standard error 0.0000 over 3 paired seeds: no difference"
    )
    assert bleu == (
        "LeaPformer - softmax: +3.00 BLEU at k = 5, standard error 0.29 over 3 paired seeds: LeaPformer is better"
    )


def test_faults():
    with pytest.raises(LeapformerError, match="expected at least one run"):
        comparison([])
    with pytest.raises(LeapformerError, match="not evaluated on test; run: leapformer evaluate leap-0"):
        comparison([run("leap", 3.0)], split="test")
    with pytest.raises(LeapformerError, match="found seed 0 of LeaPformer also in"):
        comparison([run("leap", 3.0), run("leap", 3.0)])


def test_markdown():
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
