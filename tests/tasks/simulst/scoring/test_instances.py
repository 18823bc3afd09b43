"""The log of an evaluation: SimulEval's rows, every fault with its row, and scores that equal OmniSTEval's."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.tasks.simulst.scoring.instances import LOG_NAME, Instance, read_instances, score, write_instances
from leapformer.tasks.simulst.scoring.latency import METRICS

pytest.importorskip("sacrebleu")

# As SimulEval 1.1.4 wrote it.
SIMULEVAL_ROW = (
    '{"index": 0, "prediction": "Ein Hund l\\u00e4uft .", "delays": [360.0, 720.0, 1000.0, 1000.0], "elapsed": '
    '[401.5, 790.25, 1100.0, 1100.0], "prediction_length": 4, "reference": "Ein Hund l\\u00e4uft schnell .", "source": '
    '["/data/a.wav", "samplerate: 16000 Hz", "channels: 1"], "source_length": 1000.0}'
)


def instance(**changes) -> Instance:
    return replace(
        Instance(0, "Ein Hund läuft .", [360.0, 720.0, 1000.0, 1000.0], [401.5, 790.25, 1100.0, 1100.0],
                 "Ein Hund läuft schnell .", ["/data/a.wav", "samplerate: 16000 Hz", "channels: 1"], 1000.0),
        **changes,
    )  # fmt: skip


def corpus(seed: int) -> list[Instance]:
    """Made-up sentences, some with nothing written and some without a reference."""
    draw = random.Random(seed)
    words = "ein kleiner Hund läuft , schnell über die Straße . naïve".split()
    text = lambda: [draw.choice(words) for _ in range(draw.choice([0, 1, 4, draw.randint(1, 40)]))]  # noqa: E731
    rows = []
    for index in range(draw.choice([1, 2, 20])):
        prediction, source_length = text(), draw.choice([360.0, draw.uniform(100, 20_000)])
        delays = sorted(min(source_length, 360.0 * draw.randint(1, 40)) for _ in prediction)
        if draw.random() < 0.1:
            delays = [source_length + 5] * len(delays)
        spent, elapsed = 0.0, []
        for delay in delays:
            spent += draw.expovariate(1 / 30)
            elapsed.append(delay + spent)
        rows.append(Instance(index, " ".join(prediction), delays, elapsed, " ".join(text()), ["a.wav"], source_length))
    return rows


def test_rows_are_simulevals(tmp_path):
    path = tmp_path / LOG_NAME
    write_instances(path, [instance()])
    assert path.read_text() == SIMULEVAL_ROW + "\n"
    assert read_instances(path) == [instance()]
    assert [file.name for file in tmp_path.iterdir()] == [LOG_NAME]


def test_what_is_written_is_read(tmp_path):
    path, rows = tmp_path / LOG_NAME, [row for row in corpus(seed=3) if row.index != 4]
    rows.append(Instance(99, "", [], [], "", "a source text", 3))
    rows.append(Instance(98, "zwei Wörter", [1, 2], [], "x", "a source text", 3))
    write_instances(path, rows)
    assert read_instances(path) == rows


def test_a_text_source_and_other_keys(tmp_path):
    row = {**json.loads(SIMULEVAL_ROW), "source": "a dog runs", "metric": {}, "prediction_spm": []}
    (tmp_path / LOG_NAME).write_text(json.dumps(row) + "\n\n")
    assert read_instances(tmp_path / LOG_NAME) == [instance(source="a dog runs")]


def test_interrupted_writing_leaves_the_old_log(tmp_path):
    path = tmp_path / LOG_NAME
    write_instances(path, [instance()])

    def interrupted():
        yield instance(index=5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_instances(path, interrupted())
    assert read_instances(path) == [instance()]
    assert [file.name for file in tmp_path.iterdir()] == [LOG_NAME]


@pytest.mark.parametrize(("changes", "match"), [
    ({"delays": [1.0, 2.0]}, "delays: expected 4, one a word of the prediction, found 2"),
    ({"elapsed": [1.0]}, "elapsed: expected 4, one a word of the prediction, found 1"),
    ({"delays": [1.0, float("nan"), 2.0, 3.0]}, "delays: expected a list of finite numbers from 0 on, found .*nan"),
    ({"delays": 3.0}, r"delays: expected a list of finite numbers from 0 on, found 3\.0"),
    ({"elapsed": [1.0, 1.0, 1.0, "2"]}, "elapsed: expected a list of finite numbers from 0 on"),
    ({"index": -1}, "index: expected an integer from 0 on, found -1"),
    ({"index": True}, "index: expected an integer from 0 on, found True"),
    ({"prediction": None}, "prediction: expected text, found None"),
    ({"reference": None}, "reference: expected text, found None"),
    ({"source": [1]}, r"source: expected text or a list of texts, found \[1\]"),
    ({"source_length": float("inf")}, "source_length: expected a finite number from 0 on, found inf"),
    ({"source_length": "3"}, "source_length: expected a finite number from 0 on, found '3'"),
])  # fmt: skip
def test_faults_of_a_row(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        instance(**changes)
    rows = [SIMULEVAL_ROW, json.dumps({**json.loads(SIMULEVAL_ROW), "index": 1, **changes})]
    (tmp_path / LOG_NAME).write_text("\n".join(rows))
    fails(tmp_path / LOG_NAME, f"{LOG_NAME}:2: {match}")


def fails(path: Path, match: str) -> None:
    with pytest.raises(LeapformerError, match=match) as caught:
        read_instances(path)
    assert "\n" not in str(caught.value)


def test_faults_of_a_log(tmp_path):
    path = tmp_path / LOG_NAME
    fails(path, f"cannot read .*{LOG_NAME}")
    path.write_text("\n\n")
    fails(path, f"{LOG_NAME}: expected at least one row, found none")
    path.write_text(SIMULEVAL_ROW + "\n" + SIMULEVAL_ROW[:100])
    fails(path, f"{LOG_NAME}:2: expected a JSON object")
    path.write_text(SIMULEVAL_ROW + "\n" + SIMULEVAL_ROW)
    fails(path, f"{LOG_NAME}:2: expected each index once, found 0 again")
    path.write_text('{"index": 3, "prediction": "x"}')
    fails(path, f"{LOG_NAME}:1: expected the key 'delays', found index, prediction")


def test_scores_of_perfect_output():
    scores = score([instance(reference=instance().prediction)])
    assert scores["BLEU"] == pytest.approx(100) and scores["chrF"] == pytest.approx(100)
    assert scores["StartOffset"] == 360.0 and scores["StartOffset_CA"] == 401.5
    assert list(scores) == [
        "BLEU",
        "chrF",
        *METRICS,
        "StartOffset",
        *(f"{name}_CA" for name in METRICS),
        "StartOffset_CA",
    ]


def test_latency_is_of_delays_or_of_times():
    rows = [instance(), instance(index=1, prediction="", delays=[], elapsed=[]), instance(index=2, reference="")]
    scores = score(rows)
    for name, metric in METRICS.items():
        for suffix, times in (("", rows[0].delays), ("_CA", rows[0].elapsed)):
            expected = (metric(times, 1000.0, 5) + metric(times, 1000.0, 1)) / 2  # an empty reference has one word
            assert scores[name + suffix] == pytest.approx(expected, abs=1e-9)


def test_what_has_no_times_has_no_computation_aware_scores():
    for elapsed in ([], [0.0] * 4):
        assert not [name for name in score([instance(), instance(index=1, elapsed=elapsed)]) if name.endswith("_CA")]


def test_nothing_written_at_all():
    scores = score([instance(prediction="", delays=[], elapsed=[])])
    assert scores["BLEU"] == 0 and scores["chrF"] == 0
    assert all(math.isnan(scores[name]) for name in (*METRICS, "StartOffset"))
    with pytest.raises(ValueError, match="instances: expected at least one, got none"):
        score([])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(MissingExtra, match=r"'sacrebleu'.*leapformer\[speech\]"):
        score([instance()])


def test_omnisteval_gives_the_same(tmp_path):
    """Its AL, LAAL, AP and DAL are adapted from SimulEval's code."""
    scorer = pytest.importorskip("omnisteval.scoring", reason="omnisteval is not installed")
    loader = pytest.importorskip("omnisteval.io", reason="omnisteval is not installed")
    log, references = tmp_path / LOG_NAME, tmp_path / "target.txt"
    for seed in range(40):
        rows = corpus(seed)
        write_instances(log, rows)
        references.write_text("".join(row.reference + "\n" for row in rows), encoding="utf-8")
        loaded = loader.load_shortform_instances(str(log), str(references), "delays", "elapsed")
        theirs, _, _ = scorer.evaluate_instances(loaded, is_longform=False)
        ours = score(read_instances(log))
        assert ours["BLEU"] == pytest.approx(theirs["bleu"], abs=1e-6)
        assert ours["chrF"] == pytest.approx(theirs["chrf"], abs=1e-6)
        for name in METRICS:
            if any(row.delays for row in rows):
                assert ours[name] == pytest.approx(theirs[name.lower()], abs=1e-6)
                assert ours[f"{name}_CA"] == pytest.approx(theirs[f"ca_{name.lower()}"], abs=1e-6)
            else:
                assert math.isnan(ours[name]) and math.isnan(ours[f"{name}_CA"])


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e999", "NaN", "-1", "1e16", "[[1]]", "true"])
def test_numbers_beyond_all_floats(tmp_path, value):
    path = tmp_path / "instances.log"
    write_instances(path, [Instance(0, "a", [1.0], [], "b", "c", 2.0)])
    path.write_text(path.read_text().replace('"source_length": 2.0', f'"source_length": {value}'))
    with pytest.raises(
        LeapformerError, match="instances.log:1: source_length: expected a finite number from 0 on, found"
    ):
        read_instances(path)
