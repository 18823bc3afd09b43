"""Typed views of what a run writes about itself."""

from __future__ import annotations

import json

import pytest

from leapformer.errors import LeapformerError
from leapformer.files.records import read_events, read_results
from tests.analysis.builders import curve_point, results, translation_results


def written(tmp_path, content) -> str:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_results_of_every_kind_are_taken_as_they_are(tmp_path):
    for content in (
        results("leap", perplexity=310.0),
        translation_results("leap", points=[curve_point(None, 1.0, 2.0), curve_point(3, 1.0, 2.0)]),
        {"splits": {}},
        {"splits": {"test": {"loss": 1, "new": 2.5}}, "new": {"a": [1]}},
    ):
        assert read_results(written(tmp_path, content)) == content


def test_what_older_versions_wrote_for_unknown_figures_is_none(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"splits": {"validation": {"loss": NaN, "word_perplexity": Infinity}}}')
    assert read_results(path)["splits"]["validation"] == {"loss": None, "word_perplexity": None}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"splits": None}, "splits: expected a valid dictionary, found None"),
        (
            {"splits": {"test": {"loss": "x"}}},
            "splits.test.loss: expected a valid integer or a valid number, found 'x'",
        ),
        ({"splits": {"test": {"new": [1]}}}, "splits.test.new: expected a valid integer or a valid number, found [1]"),
        ({"splits": {"test": {"accuracy": 2}}}, "splits.test.accuracy: expected less than or equal to 1, found 2"),
        ({"splits": {"test": {"perplexity": 0}}}, "splits.test.perplexity: expected greater than 0, found 0"),
        ({"splits": {"test": {"k": True}}}, "splits.test.k: expected a valid integer, found True"),
        ({"seed": "0"}, "seed: expected a valid integer, found '0'"),
        ({"parameters": 10**30}, "parameters: expected less than or equal to 1000000000000000, found 1000000000"),
        ({"parameters": None}, "parameters: expected a valid integer, found None"),
        ({"tokens_per_second": -1}, "tokens_per_second: expected greater than or equal to 0, found -1"),
        ({"attention": 3}, "attention: expected a valid string or a valid list, found 3"),
        ({"name": "a\x1b[31m"}, "name: expected text that should match pattern"),
        ({"recipe": "x" * 400}, "recipe: expected text that should have at most 300 characters"),
        ({"curves": {"test": [{"BLEU": 1}]}}, "expected the key curves.test.0.k, found none"),
        ({"perplexity_by_position": [{"start": 0}]}, "expected the key perplexity_by_position.0.end, found none"),
        ({"baselines": {"a": "b"}}, "baselines.a: expected a valid integer or a valid number, found 'b'"),
    ],
)
def test_wrong_types_and_ranges_are_one_line(tmp_path, change, line):
    with pytest.raises(LeapformerError) as caught:
        read_results(written(tmp_path, {**results("leap", perplexity=310.0), **change}))
    assert f"results.json: {line}" in str(caught.value) and "\n" not in str(caught.value)


def test_no_metrics(tmp_path):
    assert read_events(tmp_path / "metrics.jsonl") == []
