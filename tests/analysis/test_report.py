"""The report page: complete, escaped, self-contained."""

import re
from html.parser import HTMLParser

import pytest
import torch

from leapformer.analysis.proportions import LayerProportions
from leapformer.analysis.report import GeneratedSample, TextProportions, render_report, write_report
from leapformer.analysis.runs import load_run
from leapformer.errors import LeapformerError
from tests.analysis.builders import curve_point, write_run, write_translation_run

TOKENS = ["<", "b", ">", "\n"]


class Page(HTMLParser):
    """Table cells, ids, links and the balance of tags of a page."""

    VOID = {"meta", "link", "br", "img", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loaded, self.rows, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loaded += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def runs(tmp_path):
    names = (("leap", 310.0), ("cosformer", 322.0), ("softmax", 305.0))
    return [load_run(write_run(tmp_path, name, perplexity=value)) for name, value in names]


@pytest.fixture
def page(runs):
    layers = [LayerProportions(name, torch.rand(4, 2), torch.rand(4, 2)) for name in ("one", "two")]
    return render_report(
        runs,
        title="Demo & more",
        samples=[GeneratedSample("LeaPformer", "The <with>", " statement & so on", "greedy")],
        text_proportions=TextProportions("LeaPformer", TOKENS, layers),
        command="leapformer demo",
        note="One recipe for all.",
    )


def test_the_table_has_every_run_and_the_counted_baselines(page):
    rows = {row[0]: row[1:] for row in Page(page).rows}
    assert list(rows) == ["model", "LeaPformer", "cosFormer", "softmax", "bigram, counted", "unigram, counted"]
    assert rows["LeaPformer"] == ["310.0", "1.241", "10,310", "1:33", "412,345", "0.27%"]
    assert rows["bigram, counted"][:2] == ["640.2", "1.398"]
    assert rows["unigram, counted"][0] == "3,211"
    assert '<tr class="best"><td><span class="key" style="background: var(--series-3)"></span>softmax</td>' in page


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))


def test_the_page_loads_nothing(page):
    assert all(reference.startswith("#") for reference in Page(page).loaded)
    assert "http" not in page and "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_text_is_escaped_and_shown(page):
    assert "<with>" not in page
    text = Page(page).text
    for expected in (
        "Demo & more",
        "The <with> statement & so on",
        "<b>\n",
        "A processor <x86>",
        "One recipe for all.",
        "Best on the validation text: softmax with 1.238 bits per byte (a bigram counted from the training text: "
        "1.398).",
        "Layer 2",
        "0123456789ab",
    ):
        assert expected in text


def test_parts_without_data_are_left_out(tmp_path):
    run = load_run(write_run(tmp_path, "leap", perplexity_by_position=[], baselines={}, machine={}, git=None))
    text = Page(render_report([run], title="One run")).text
    for absent in ("Learned proportions", "Generated text", "number of tokens before", "bigram, counted", "revision"):
        assert absent not in text


def test_perplexities_of_a_poor_model_stay_readable(tmp_path):
    run = load_run(write_run(tmp_path, "leap", perplexity=2.26e6))
    assert Page(render_report([run], title="One run")).rows[1][1] == "2.3 × 10⁶"


def test_written_whole(tmp_path, runs):
    path = write_report(tmp_path / "new" / "report.html", runs, title="Demo")
    assert path.read_text(encoding="utf-8") == render_report(runs, title="Demo")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_wrong_arguments(runs):
    with pytest.raises(ValueError, match="runs: expected at least one"):
        render_report([], title="Demo")
    layers = [LayerProportions("one", torch.rand(3, 2), torch.rand(3, 2))]
    with pytest.raises(ValueError, match="tokens: expected 3, one per proportion, found 4"):
        render_report(runs, title="Demo", text_proportions=TextProportions("LeaPformer", TOKENS, layers))


@pytest.fixture
def translations(tmp_path):
    points = {
        "softmax": [curve_point(1, 20.0, 900), curve_point(5, 30.0, 1900), curve_point(None, 36.0, 4000)],
        "softmax/softmax/leap": [curve_point(1, 19.0, 900), curve_point(5, 31.5, 1900), curve_point(None, 35.0, 4000)],
    }
    runs = [write_translation_run(tmp_path, f"r{n}", name, points=own) for n, (name, own) in enumerate(points.items())]
    return [load_run(folder) for folder in [*runs, write_translation_run(tmp_path, "r2", "leap")]]


def test_translation_runs_have_quality_and_lagging(translations):
    page = render_report(translations, title="Translation")
    parsed = Page(page)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids))
    assert all(reference.startswith("#") for reference in parsed.loaded)
    rows = parsed.rows
    assert rows[0][:4] == [
        "model",
        "BLEU, k = 5higher is better",
        "BLEU, offlinehigher is better",
        "lagging, k = 5LAAL",
    ]
    assert rows[1] == ["softmax", "30.00", "36.00", "1.90 s", "1.250", "3.49", "8,771", "1:33", "412,345", "–"]
    assert rows[2][:4] == ["softmax, cross LeaPformer", "31.50", "35.00", "1.90 s"]
    assert rows[3][:5] == ["LeaPformer", "–", "–", "–", "1.250"]
    assert '<tr class="best"><td><span class="key" style="background: var(--series-2)"></span>softmax, cross' in page
    assert [row[:3] for row in rows if row[1] in ("5", "offline")] == [
        ["softmax", "5", "30.00"],
        ["softmax", "offline", "36.00"],
        ["softmax, cross LeaPformer", "5", "31.50"],
        ["softmax, cross LeaPformer", "offline", "35.00"],
    ]
    assert ["softmax, cross LeaPformer", "1.4", "25.25", "+0.25"] in rows
    assert (
        "Best on the validation text: softmax, cross LeaPformer with BLEU 31.50 at k = 5 (offline: 35.00)."
        in parsed.text
    )
    assert "offline: the whole source first" in parsed.text and "k=5" in parsed.text
    assert "Bits per byte" not in parsed.text and "bits per byte" not in parsed.text


def test_translation_runs_without_curves_and_of_another_split(translations, tmp_path):
    parsed = Page(render_report(translations[2:], title="One run"))
    assert "Quality and lagging" not in parsed.text
    assert "Best on the validation text: LeaPformer with a loss of 1.250 nats per token." in parsed.text
    curves = {"test": [curve_point(5, 33.0, 1900)]}
    tested = load_run(write_translation_run(tmp_path, "tested", curves=curves))
    parsed = Page(render_report([tested], title="Test", split="test"))
    assert "Best on the test text: LeaPformer with BLEU 33.00 at k = 5." in parsed.text
    assert "Quality and lagging" in parsed.text and "on straight lines" not in parsed.text
    assert "perplexity" not in parsed.text  # nothing is known of losses on that split


def test_speech_beside_text_is_refused(translations, tmp_path):
    points = [curve_point(5, 33.0, 4.5)]
    text = load_run(write_translation_run(tmp_path, "text", points=points, source="text"))
    with pytest.raises(LeapformerError, match="expected a source of speech as in .*, found text"):
        render_report([*translations, text], title="Both")


def test_other_kinds_of_runs_have_a_page_too(tmp_path):
    """A run of Long-Range Arena has neither words nor bytes."""
    splits = {"validation": {"loss": 1.5, "accuracy": 0.4, "majority_accuracy": 0.2, "examples": 100}}
    run = load_run(write_run(tmp_path, "leap", splits=splits, baselines={}, perplexity_by_position=[]))
    assert Page(render_report([run], title="ListOps")).rows[1][0] == "LeaPformer"
