"""The report page: complete, escaped, self-contained."""

import re
from html.parser import HTMLParser

import pytest
import torch

from leapformer.analysis.proportions import LayerProportions
from leapformer.analysis.report import GeneratedSample, TextProportions, render_report, write_report
from leapformer.analysis.runs import load_run
from tests.analysis.builders import write_run

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
    for expected in ("Demo & more", "The <with> statement & so on", "<b>\n", "A processor <x86>", "One recipe for all.",
                     "Best on the validation text: softmax with 1.238 bits per byte (a bigram counted from the training text: 1.398).", "Layer 2", "0123456789ab"):  # fmt: skip
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
