"""Quality against lagging: curves, interpolation, the bootstrap, and what picture and tables show of them."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from leapformer.analysis.latency import (
    SentenceCounts,
    System,
    bootstrap_bleu,
    check_paired,
    common_laggings,
    equal_lagging_table,
    interpolate,
    interval,
    k_labels,
    latency_table,
    quality_latency,
    sentence_counts,
    systems,
)
from leapformer.analysis.plots import figure_svg
from leapformer.analysis.runs import RunRecord
from leapformer.errors import LeapformerError
from tests.analysis.builders import curve_point, translation_results

SLOW = [curve_point(None, 40.0, 4000), curve_point(3, 30.0, 2000), curve_point(1, 20.0, 1000)]
FAST = [curve_point(1, 22.0, 900), curve_point(3, 36.0, 1900), curve_point(None, 41.0, 4000)]


def run(name: str, points: list | None, /, attention: str = "leap", **changes) -> RunRecord:
    content = translation_results(attention, points=points, name=name, **changes)
    return RunRecord(folder=Path(name), results=content)


@pytest.fixture
def lines() -> list[System]:
    return systems([run("slow", SLOW, "softmax"), run("fast", FAST)], split="validation")


# ---- curves


def test_seeds_are_one_line_or_a_line_each():
    runs = [run("a", SLOW, seed=0), run("b", FAST, seed=1), run("c", FAST, "softmax")]
    one, other = systems(runs, split="validation")
    assert (one.label, other.label, [each.place for each in (one, other)]) == ("LeaPformer", "softmax", [0, 1])
    assert one.ks == [1, 3]
    assert one.values(1, "BLEU") == [20.0, 22.0] and one.mean(None, "BLEU") == 40.5
    assert one.values(3, "LAAL") == pytest.approx([2.0, 1.9])  # seconds
    assert one.values(3, "AP") == [0.625, 0.625]
    assert one.values(5, "BLEU") == [] and one.mean(5, "BLEU") is None
    assert [line.label for line in systems(runs, split="validation", by_seed=True)] == [
        "LeaPformer seed 0", "LeaPformer seed 1", "softmax",
    ]  # fmt: skip


def test_only_the_ks_of_all_seeds_and_only_numbers_count():
    damaged = [curve_point(1, 22.0, math.nan), curve_point(3, 36.0, 1900), curve_point(5, 36.5, 2500)]
    (line,) = systems([run("a", SLOW, seed=0), run("b", damaged, seed=1)], split="validation")
    assert line.ks == [1, 3]
    assert line.values(1, "LAAL") == [] and line.values(1, "BLEU") == [20.0, 22.0]
    assert common_laggings([line]) != []  # a is measured at both
    lost = System("b", line.runs[1:], "validation", 0)
    assert interpolate([(2.0, 1.0)], 2.0) == 1.0 and len(quality_latency([lost]).axes) == 1


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([run("b", None)], r"^b: no scores by k on validation; run: leapformer evaluate b --split validation --k 1,3"),
        ([run("b", FAST, source="text")], "^b: expected a source of speech as in a, found text: seconds and words"),
        ([run("b", FAST, source=None)], r"^b: expected a translation run \(source speech or text\), found None"),
        ([run("b", [{**FAST[0], "sentences": 3}])], "^b: expected 4 sentences of validation as in a, found 3"),
        ([run("b", FAST)], "^b: expected each seed of a recipe once"),
    ],
)
def test_runs_that_do_not_go_together(others, message):
    with pytest.raises(LeapformerError, match=message):
        systems([run("a", SLOW), *others], split="validation")


def test_no_runs_and_a_split_without_curves():
    with pytest.raises(LeapformerError, match="expected at least one run"):
        systems([], split="validation")
    with pytest.raises(LeapformerError, match="a: no scores by k on test"):
        systems([run("a", SLOW)], split="test")


# ---- other policies


def with_policies(
    name: str, points: list | None, /, attention: str = "leap", **frames: tuple[float, float]
) -> RunRecord:
    """`frames`: BLEU and LAAL of AlignAtt by its option, as in f2."""
    scores = [(int(key[1:]), curve_point(None, *values)) for key, values in frames.items()]
    measured = [{"frames": value, **{k: v for k, v in point.items() if k != "k"}} for value, point in scores]
    curves = {"validation": [{"label": "align-att", "option": "frames", "points": measured}]}
    return run(name, points, attention, policy_curves=curves)


def test_other_policies_are_lines_of_their_own():
    ours = with_policies("ours", FAST, f4=(35.0, 2900), f1=(33.0, 1500))
    base = with_policies("base", SLOW, "softmax", f1=(31.0, 1400))
    lines = systems([base, ours], split="validation")
    assert [line.label for line in lines] == ["softmax", "softmax, align-att", "LeaPformer", "LeaPformer, align-att"]
    assert [line.place for line in lines] == [0, 0, 1, 1]
    assert lines[3].ks == [1, 4] and lines[3].mean(4, "LAAL") == 2.9 and lines[3].mean(None, "BLEU") is None
    columns, rows = latency_table(lines)
    assert [row[:2] for row in rows if row[0].startswith("LeaP")] == [
        ["LeaPformer", "1"], ["LeaPformer", "3"], ["LeaPformer", "offline"],
        ["LeaPformer, align-att", "frames=1"], ["LeaPformer, align-att", "frames=4"],
    ]  # fmt: skip
    svg = figure_svg(quality_latency(lines))
    assert "LeaPformer, align-att" in svg and "frames=4" in svg and "k=3" in svg
    # Equal laggings are those of the wait-k curves; what does not reach one is not there.
    plain = equal_lagging_table([line for line in lines if not line.policy])
    columns, rows = equal_lagging_table(lines)
    assert [row for row in rows if "align" not in row[0]] == plain[1]
    assert {row[0] for row in rows if "align" in row[0]} == {"LeaPformer, align-att"}


def test_differences_are_taken_from_the_first_models_line_of_the_same_policy():
    """k = 1 and frames = 1 are different points."""
    ours, base = (
        with_policies(name, points, attention, f1=(33.0, 1500))
        for name, points, attention in (("ours", FAST, "leap"), ("base", SLOW, "softmax"))
    )
    lines = systems([base, ours], split="validation")
    samples = {(line.runs[0].folder, line.key(1)): numpy.full(100, 10.0 * place) for place, line in enumerate(lines)}
    rows = latency_table(lines, samples)[1]
    found = {(row[0], row[1]): row[3:5] for row in rows}
    assert found["LeaPformer", "1"] == ["[20.00, 20.00]", "+2.00 [20.00, 20.00]"]
    assert found["LeaPformer, align-att", "frames=1"] == ["[30.00, 30.00]", "+0.00 [20.00, 20.00]"]
    assert found["softmax, align-att", "frames=1"] == ["[10.00, 10.00]", "-"]


def test_a_run_without_k_and_a_policy_without_an_option():
    points = [{"sentences": 4, "BLEU": 31.0, "LAAL": 1500}]
    curves = {"validation": [{"label": "two-one", "option": "", "points": points}]}
    (line,) = systems([run("a", None, policy_curves=curves)], split="validation")
    assert (line.label, line.ks, line.point(0)) == ("LeaPformer, two-one", [0], "")
    assert "LeaPformer, two-one" in figure_svg(quality_latency([line]))
    other = {"validation": [{"label": "two-one", "option": "", "points": [{**points[0], "sentences": 3}]}]}
    with pytest.raises(LeapformerError, match="^b: expected 4 sentences of validation as in a, found 3"):
        systems([run("a", SLOW), run("b", FAST, "softmax", policy_curves=other)], split="validation")


# ---- equal lagging


def test_interpolation_by_hand():
    points = [(3.0, 10.0), (1.0, 4.0), (2.0, 8.0)]
    assert interpolate(points, 1.25) == 5.0  # a quarter of the way from 4 to 8
    assert interpolate(points, 2.5) == 9.0
    assert [interpolate(points, at) for at in (1.0, 2.0, 3.0)] == [4.0, 8.0, 10.0]
    assert interpolate(points, 0.999) is None and interpolate(points, 3.001) is None
    assert interpolate([], 1.0) is None
    assert interpolate([(1.0, 4.0), (1.0, 6.0)], 1.0) == 6.0
    arrays = interpolate([(1.0, numpy.array([0.0, 8.0])), (3.0, numpy.array([4.0, 0.0]))], 1.5)
    assert arrays is not None and arrays.tolist() == [1.0, 6.0]


def test_bleu_at_equal_lagging_by_hand(lines):
    # softmax: 20 at 1 s, 30 at 2 s; LeaPformer: 22 at 0.9 s, 36 at 1.9 s. Both reach 1 to 1.9 s.
    laggings = common_laggings(lines)
    assert laggings == [1.0, 1.2, 1.4, 1.6, 1.8]
    columns, rows = equal_lagging_table(lines)
    assert columns == ["model", "LAAL s", "BLEU", "against softmax"]
    assert [(row[0], float(row[1])) for row in rows] == [
        (line.label, lagging) for lagging in laggings for line in lines
    ]
    for row in rows:
        softmax, leap = 20 + 10 * (float(row[1]) - 1), 22 + 14 * (float(row[1]) - 0.9)
        expected = [f"{softmax:.2f}", "-"] if row[0] == "softmax" else [f"{leap:.2f}", f"{leap - softmax:+.2f}"]
        assert row[2:] == expected


def test_each_seed_is_interpolated_for_itself():
    again = [curve_point(1, 24.0, 1100), curve_point(3, 34.0, 2100)]
    both = systems([run("a", SLOW, seed=0), run("b", again, seed=1), run("c", FAST, "softmax")], split="validation")
    _, rows = equal_lagging_table(both)
    assert rows[2] == ["LeaPformer", "1.4", "25.50 ± 2.12", "-"]  # 24 and 27
    assert rows[3] == ["softmax", "1.4", "29.00", "+3.50"]
    assert equal_lagging_table(both[:1]) == ([], [])


def test_curves_without_a_common_lagging(lines):
    apart = systems([run("a", FAST), run("b", [curve_point(1, 9.0, 3000)], "softmax")], split="validation")
    assert common_laggings(apart) == [] and equal_lagging_table(apart) == ([], [])
    assert common_laggings([replace(lines[0], runs=[run("b", [curve_point(1, 9.0, 3000)])])]) == [3.0]
    assert common_laggings([replace(lines[0], runs=[run("b", [curve_point(None, 9.0, 3000)])])]) == []


# ---- the bootstrap

WORDS = "the cat , the dog and a very old mouse sat on one mat .".split()


def corpus(number: int, *, right: float, seed: int) -> tuple[list[str], list[str]]:
    """Predictions in which a share of the words is right, an empty one among them, and references."""
    of_references, own = random.Random(0), random.Random(seed)
    references = [[of_references.choice(WORDS) for _ in range(of_references.randint(2, 12))] for _ in range(number)]
    predictions = [[word if own.random() < right else own.choice(WORDS) for word in words] for words in references]
    predictions[0] = []
    return [" ".join(words) for words in predictions], [" ".join(words) for words in references]


def bleu_by_formula(pairs: list[tuple[str, str]]) -> float:
    """Corpus BLEU of texts whose words need no cutting, from its definition, without smoothing (Papineni et al.
    2002).
    """
    matched, total, lengths = Counter(), Counter(), [0, 0]
    for prediction, reference in pairs:
        found, wanted = prediction.split(), reference.split()
        lengths = [lengths[0] + len(found), lengths[1] + len(wanted)]
        for n in range(1, 5):
            grams, known = (Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in (found, wanted))
            matched[n] += (grams & known).total()
            total[n] += grams.total()
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return 100 * brevity * math.exp(sum(math.log(matched[n] / total[n]) for n in range(1, 5)) / 4)


def test_counts_give_corpus_bleu():
    predictions, references = corpus(50, right=0.8, seed=1)
    counts = sentence_counts(predictions, references)
    assert counts.counts.shape == (50, 10) and counts.counts[0].tolist()[2:] == [0] * 8
    assert counts.score() == pytest.approx(BLEU().corpus_score(predictions, [references]).score, abs=1e-9)
    assert counts.score() == pytest.approx(bleu_by_formula(list(zip(predictions, references, strict=True))), abs=1e-9)
    # Cut as sacrebleu cuts, with punctuation apart.
    assert sentence_counts(["A dog, a cat."], ["A dog, a cat!"]).counts.tolist() == [[6, 6, 5, 4, 3, 2, 6, 5, 4, 3]]
    assert sentence_counts(["a b"], ["a b"], tokenize="char").counts.tolist()[0][:2] == [2, 2]


def test_every_draw_is_the_score_of_sentences_drawn_again():
    predictions, references = corpus(40, right=0.8, seed=1)
    samples = bootstrap_bleu(sentence_counts(predictions, references), draws=5, seed=3)
    drawn = numpy.random.default_rng(3).integers(40, size=(5, 40))
    expected = [bleu_by_formula([(predictions[i], references[i]) for i in row]) for row in drawn]
    assert samples.tolist() == pytest.approx(expected, abs=1e-9)
    assert len(set(samples.tolist())) == 5
    one = sentence_counts(["a b c d e"], ["a b c d e"])
    assert bootstrap_bleu(one, draws=3).tolist() == pytest.approx([100.0] * 3)


def test_the_interval_is_sacrebleus(monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    predictions, references = corpus(60, right=0.8, seed=1)
    samples = bootstrap_bleu(sentence_counts(predictions, references))
    low, high = interval(samples)
    theirs = BLEU().corpus_score(predictions, [references], n_bootstrap=1000)
    assert samples.mean() == pytest.approx(theirs._mean, abs=1e-4)
    assert (high - low) / 2 == pytest.approx(theirs._ci, abs=1e-4)
    assert low < sentence_counts(predictions, references).score() < high
    assert interval(numpy.arange(80.0)[::-1]) == (2.0, 77.0)


def test_the_paired_difference_is_sacrebleus(monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    base, references = corpus(60, right=0.8, seed=1)
    # The same but for every other sentence, of which the last word is put right: better, and much alike.
    mended = [f"{text.rpartition(' ')[0]} {wanted.split()[-1]}" for text, wanted in zip(base, references, strict=True)]
    other = [texts[place % 2] for place, texts in enumerate(zip(base, mended, strict=True))]
    counts = [sentence_counts(texts, references) for texts in (base, other)]
    samples = [bootstrap_bleu(each) for each in counts]
    systems = [("base", base), ("other", other)]
    _, found = PairedTest(systems, {"BLEU": BLEU()}, [references], test_type="bs")()
    theirs = found["BLEU"][1]
    assert samples[1].mean() == pytest.approx(theirs.mean, abs=1e-4)
    differences = numpy.abs(samples[1] - samples[0])
    apart = numpy.sum(differences - differences.mean() > abs(counts[1].score() - counts[0].score()))
    assert (apart + 1) / 1001 == pytest.approx(theirs.p_value, abs=2e-3)
    # The same sentences in both draws: much narrower than the two intervals together.
    low, high = interval(samples[1] - samples[0])
    unpaired = interval(samples[1] - bootstrap_bleu(counts[0], seed=4))
    assert high - low < 0.5 * (unpaired[1] - unpaired[0])


def test_faults_of_the_bootstrap():
    with pytest.raises(ValueError, match="as many predictions as references, got 1 and 2"):
        sentence_counts(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        sentence_counts([], [])
    one, other = sentence_counts(["a"], ["b"]), sentence_counts(["a"], ["c"])
    check_paired({})
    check_paired({Path("x"): one, Path("y"): one})
    with pytest.raises(LeapformerError, match="^z: expected the 1 references of x, found 1 and not the same"):
        check_paired({Path("x"): one, Path("z"): other})


# ---- tables


def test_the_table_has_every_k_and_offline(lines):
    columns, rows = latency_table(lines)
    assert columns == ["model", "k", "BLEU", "chrF", "LAAL s", "AL s", "DAL s", "first word s", "AP"]
    assert [row[:2] for row in rows] == [[name, k] for name in ("softmax", "LeaPformer") for k in ("1", "3", "offline")]
    assert rows[0][2:] == ["20.00", "40.00", "1.00", "0.99", "1.01", "0.98", "0.625"]


def test_several_seeds_have_a_deviation_of_quality(lines):
    both = systems([run("a", SLOW, seed=0), run("b", FAST, seed=1)], split="validation")
    _, rows = latency_table(both)
    assert rows[0][2:5] == ["21.00 ± 1.41", "41.00 ± 1.41", "0.95"]


def test_text_is_in_words_and_has_no_sum_of_words_and_time():
    points = [curve_point(1, 20.0, 1.5, LAAL_CA=300.0), curve_point(3, 25.0, 3.25, LAAL_CA=400.0)]
    lines = systems([run("a", points, source="text")], split="validation")
    columns, rows = latency_table(lines)
    assert "LAAL words" in columns and not any("LAAL_CA" in column for column in columns)
    assert rows[0][columns.index("LAAL words")] == "1.50"
    assert len(quality_latency(lines).axes) == 1


def scores(lines: list[System], counts: list[SentenceCounts]) -> dict:
    """Draws in which each system writes the same with every k."""
    return {
        (run.folder, k): bootstrap_bleu(own, draws=200)
        for line, own in zip(lines, counts, strict=True)
        for run in line.runs
        for k in (1, 3, None)
    }


def test_tables_have_intervals_and_paired_differences(lines):
    texts = [corpus(30, right=right, seed=seed) for right, seed in ((0.8, 1), (0.86, 2))]
    draws = scores(lines, [sentence_counts(*each) for each in texts])
    base, own = draws[Path("slow"), 1], draws[Path("fast"), 1]
    columns, rows = latency_table(lines, draws)
    assert columns[2:5] == ["BLEU", "95 %", "against softmax"]
    low, high = interval(own - base)
    assert rows[3][3:5] == ["[{:.2f}, {:.2f}]".format(*interval(own)), f"+2.00 [{low:.2f}, {high:.2f}]"]
    assert rows[0][4] == "-"
    # All k write the same, so that the interpolated draws are the same too.
    _, rows = equal_lagging_table(lines, draws)
    assert all(row[3].endswith(f"[{low:.2f}, {high:.2f}]") for row in rows if row[0] == "LeaPformer")
    # Where a log is missing there is no interval, and the rest stays.
    del draws[Path("fast"), 3]
    _, rows = latency_table(lines, draws)
    assert rows[4][3:5] == ["-", "-"] and rows[3][4] != "-"
    _, rows = equal_lagging_table(lines, draws)
    assert not any("[" in row[3] for row in rows)


def test_seeds_are_averaged_within_a_draw():
    runs = [run("a", SLOW, "softmax"), run("b", FAST, seed=0), run("c", FAST, seed=1)]
    lines = systems(runs, split="validation")
    draws = {
        (Path(name), 1): numpy.array(values) for name, values in zip("abc", ([1.0, 2], [2.0, 5], [4.0, 9]), strict=True)
    }
    _, rows = latency_table(lines, draws)
    assert rows[3][3:5] == ["[3.00, 7.00]", "+2.00 [2.00, 5.00]"]


# ---- the picture


def labelled(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_the_picture_has_a_line_each_the_k_and_the_ceiling(lines):
    figure = quality_latency(lines)
    (axes,) = figure.axes
    drawn = labelled(axes)
    assert list(drawn) == ["softmax", "LeaPformer", "offline: the whole source first"]
    assert drawn["LeaPformer"].get_xdata().tolist() == pytest.approx([0.9, 1.9])
    assert drawn["LeaPformer"].get_ydata().tolist() == [22.0, 36.0]
    ceilings = [line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]
    assert ceilings == [40.0, 41.0]
    # 0.1 s apart is more than a twelfth of 1.1 s: each point has its k.
    assert sorted(text.get_text() for text in axes.texts) == ["k=1", "k=1", "k=3", "k=3"]
    assert axes.get_xlabel() == "lagging, LAAL (s)" and axes.get_ylabel() == "BLEU"
    assert figure_svg(figure).startswith("<svg")


def test_points_of_one_k_that_lie_together_share_its_name():
    near = [{**point, "LAAL": point["LAAL"] + 20, "BLEU": point["BLEU"] + 3} for point in SLOW]
    lines = systems([run("a", SLOW, "softmax"), run("b", near)], split="validation")
    (axes,) = quality_latency(lines).axes
    assert {text.get_text(): text.xy for text in axes.texts} == {"k=1": (1.02, 23.0), "k=3": (2.02, 33.0)}


def test_labels_that_would_cover_one_another_become_one():
    points = [(1, 1.0, 10.0), (3, 2.0, 20.0), (7, 2.9, 22.0), (9, 3.0, 22.5), (9, 3.01, 14.0)]
    assert k_labels(points) == [("k=1", 1.0, 10.0), ("k=3", 2.0, 20.0), ("k=7, k=9", 3.0, 22.5)]
    above = [(1, 1.0, 10.0), (3, 1.1, 20.0), (5, 2.0, 21.0)]
    assert k_labels(above) == [("k=1", 1.0, 10.0), ("k=3", 1.1, 20.0), ("k=5", 2.0, 21.0)]
    assert k_labels([]) == []


def test_computation_gets_a_panel_of_its_own_where_it_was_measured():
    timed = [{**point, "LAAL_CA": point["LAAL"] + 250.0} for point in SLOW]
    lines = systems([run("a", timed, "softmax"), run("b", FAST)], split="validation")
    _, below = quality_latency(lines).axes
    assert list(labelled(below)) == ["softmax"]
    assert labelled(below)["softmax"].get_xdata().tolist() == [1.25, 2.25]
    assert below.get_xlabel() == "lagging with computation, LAAL_CA (s)"
    columns, rows = latency_table(lines)
    place = columns.index("LAAL_CA s")
    assert [row[place] for row in rows] == ["1.25", "2.25", "4.25", "-", "-", "-"]


def test_seeds_have_bars_of_their_deviation():
    lines = systems([run("a", SLOW, seed=0), run("b", FAST, seed=1)], split="validation")
    (axes,) = quality_latency(lines).axes
    (line,) = (line for label, line in labelled(axes).items() if label == "LeaPformer")
    assert line.get_ydata().tolist() == [21.0, 33.0]
    ends = sorted(float(y) for collection in axes.collections for path in collection.get_segments() for y in path[:, 1])
    for expected in (21 - math.sqrt(2), 21 + math.sqrt(2), 33 - math.sqrt(18), 33 + math.sqrt(18)):
        assert any(y == pytest.approx(expected) for y in ends)
