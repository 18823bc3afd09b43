"""The demo, with models of a few steps on a short text in place of the built-in one."""

import json
import sys

import pytest

from leapformer.cli import demo, main

TINY = [
    "data.source=text", "block_size=16", "kind=bytes", "hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2",
    "max_steps=4", "batch_size=2", "warmup_steps=1", "log_every=1", "eval_every=2", "save_every=2", "eval_tokens=64",
]  # fmt: skip


TINY_TRANSLATION = [
    "data.limit=150", "vocabulary.size=100", "vocabulary.source_size=100", "hidden_size=16", "num_attention_heads=2",
    "intermediate_size=16", "encoder_layers=1", "decoder_layers=1", "max_steps=3", "batch_size=4", "warmup_steps=1",
    "log_every=1", "eval_every=2", "save_every=2", "eval_tokens=64",
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A demo of seconds; returns the folder it writes to."""
    text = tmp_path / "text.txt"
    text.write_text("The with statement is used to wrap the execution of a block.\n" * 80)
    for name, overrides in demo.OVERRIDES.items():
        monkeypatch.setitem(demo.OVERRIDES, name, [*overrides, f"data.path={text}", *TINY])
    monkeypatch.setitem(demo.SAMPLE, "tokens", 8)
    for name, overrides in demo.TRANSLATION_OVERRIDES.items():
        monkeypatch.setitem(demo.TRANSLATION_OVERRIDES, name, [*overrides, *TINY_TRANSLATION])
    monkeypatch.setattr(demo, "KS", (2, None))
    monkeypatch.setattr("leapformer.tasks.simulst.sentences.HELD_OUT", 6)
    monkeypatch.setenv("COLUMNS", "220")
    return tmp_path / "demo"


def test_demo_trains_compares_and_writes_the_page(tiny, capsys):
    assert main(["demo", "--output", str(tiny)]) == 0
    printed = capsys.readouterr().out
    page = (tiny / "report.html").read_text()
    for name in ("LeaPformer", "cosFormer", "softmax"):
        assert name in printed and name in page
    assert demo.PROMPT in printed
    assert "counted bigram" in printed
    assert "Layer 1" in page and "Generated text" in page
    results = json.loads((tiny / "softmax" / "results.json").read_text())
    assert results["conv_width"] == 4

    translated = json.loads((tiny / "translation-softmax" / "results.json").read_text())
    assert translated["attention"] == "softmax" and [point["k"] for point in translated["curves"]["test"]] == [2, None]
    page = (tiny / "translation.html").read_text()
    assert "LAAL" in page and "wait-k with k = 3" in page and "wait-k with k = 3" in printed

    # What is there is not trained again, and what was interrupted is gone on with.
    (tiny / "report.html").unlink()
    (tiny / "softmax" / "results.json").unlink()
    assert main(["demo", "--output", str(tiny)]) == 0
    printed = capsys.readouterr().out
    assert f"{tiny / 'leapformer'} is trained already." in printed
    assert f"{tiny / 'softmax'} is trained already." not in printed
    assert json.loads((tiny / "softmax" / "results.json").read_text())["splits"] == results["splits"]
    assert (tiny / "report.html").is_file()


def test_without_the_extra_for_speech_the_rest_is_done(tiny, capsys, monkeypatch):
    monkeypatch.setattr(demo, "OVERRIDES", {"leapformer": demo.OVERRIDES["leapformer"]})
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert main(["demo", "--output", str(tiny)]) == 0
    printed = capsys.readouterr().out
    assert "Simultaneous translation is left out: " in printed and "sentencepiece" in printed
    assert (tiny / "report.html").is_file() and not (tiny / "translation.html").exists()


def test_a_finished_run_of_another_recipe_is_refused(tiny, capsys, monkeypatch):
    monkeypatch.setattr(demo, "OVERRIDES", {"leapformer": demo.OVERRIDES["leapformer"]})
    assert main(["demo", "--output", str(tiny)]) == 0
    monkeypatch.setitem(demo.OVERRIDES, "leapformer", [*demo.OVERRIDES["leapformer"], "seed=1"])
    assert main(["demo", "--output", str(tiny)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "found one of another recipe; choose another --output" in line
