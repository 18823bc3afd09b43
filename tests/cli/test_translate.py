"""``leapformer translate``: words while the audio is read, JSON, text from the standard input, odd and broken files."""

from __future__ import annotations

import io
import json
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from transformers.utils import logging as transformers_logging

from leapformer.cli import main
from leapformer.cli.translate import Report, audio_pieces, translate_audio
from leapformer.tasks.simulst.audio.reading import read_audio
from leapformer.tasks.simulst.streaming.policies import AlignAtt, LocalAgreement, WaitK
from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
from leapformer.tasks.simulst.text.words import Word
from tests.tasks.simulst.translators import (
    CHUNK_MS,
    noise,
    save_run,
    speech_model,
    speech_processor,
    text_model,
    text_processor,
)

RATE = 16_000


@pytest.fixture(autouse=True)
def _quiet():
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model():
    return speech_model(seed=2, dtype=torch.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    return save_run(tmp_path_factory.mktemp("speech"), model, speech_processor())


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("text"), text_model(seed=3, dtype=torch.float32), text_processor())


@pytest.fixture
def wav(tmp_path):
    """Writes audio and returns its path."""

    def write(samples, rate=RATE, subtype="FLOAT", name="speech.wav"):
        path = tmp_path / name
        soundfile.write(path, samples, rate, subtype=subtype)
        return str(path)

    return write


def expected(model, samples, policy, **options):
    with StreamingTranslator(model, speech_processor(), policy, **options) as translator:
        return translator.push(samples) + translator.finish()


def output(capsys, *arguments):
    assert main(["translate", *map(str, arguments)]) == 0
    return capsys.readouterr()


def one_line(capsys, *arguments):
    assert main(["translate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("leapformer: ")
    return captured.err


def test_words_and_how_it_went(run, model, wav, capsys):
    samples = noise(1.3, seed=1)
    words = expected(model, samples, WaitK(2))
    captured = output(capsys, run, wav(samples), "--k", "2")
    assert captured.out == " ".join(word.text for word in words) + "\n" and len(words) > 3
    assert captured.err.count("\n") == 1
    for part in ("1.30 s of audio; real-time factor 0.", "; state ", " bytes; first word after ", " with computation "):
        assert part in captured.err


def test_json_has_a_line_for_every_word_and_a_last_one(run, model, wav, capsys):
    samples = noise(1.3, seed=1)
    words = expected(model, samples, WaitK(1))
    *events, last = map(json.loads, output(capsys, run, wav(samples), "--k", "1", "--json").out.splitlines())
    assert [(e["word"], e["read_ms"], e["chunk"], e["index"]) for e in events] == [
        (word.text, word.read_ms, word.chunk, word.index) for word in words
    ]
    clocks = [event["elapsed_ms"] for event in events]
    assert clocks == sorted(clocks) and all(e["elapsed_ms"] >= e["read_ms"] for e in events)
    summary = last["summary"]
    assert summary["audio_seconds"] == 1.3 and summary["words"] == len(words)
    assert summary["first_word_ms"] == words[0].read_ms and summary["first_word_elapsed_ms"] == pytest.approx(
        clocks[0], abs=1e-3
    )
    assert 0 < summary["real_time_factor"] and 10_000 < summary["state_bytes"] < 60_000


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        (["--k", "0"], WaitK(None)),
        (["--policy", "local-agreement", "--agreement", "3"], LocalAgreement(3)),
        (["--policy", "align-att", "--frames", "2"], AlignAtt(2)),
    ],
)
def test_policies(run, model, wav, capsys, options, policy):
    samples = noise(1.0, seed=1)
    words = expected(model, samples, policy)
    assert output(capsys, run, wav(samples), *options).out == " ".join(word.text for word in words) + "\n"


def test_a_sentence_that_ends_early_is_told(tmp_path, wav, capsys):
    model = speech_model(seed=2, dtype=torch.float32)
    model.config.eos_token_id = list(range(2, model.config.vocab_size))
    run = save_run(tmp_path / "run", model, speech_processor())
    captured = output(capsys, run, wav(noise(1.2)), "--k", "2")
    assert captured.out == "\n" and "no word" in captured.err
    assert "the sentence ended at 0.24 s (--continuous goes on)" in captured.err
    assert "sentence ended" not in output(capsys, run, wav(noise(1.2)), "--k", "2", "--continuous").err


def test_words_are_printed_as_the_audio_is_read(model):
    """Each piece is asked for only when the words of those before it are out."""
    events, samples = [], noise(1.2, seed=1)
    size = RATE * CHUNK_MS // 1000

    def pieces():
        for start in range(0, len(samples), size):
            events.append(start / RATE * 1000 + CHUNK_MS)
            yield samples[start : start + size]

    def show(word: Word, clock: float) -> None:
        events.append(word)

    def begin():
        return StreamingTranslator(model, speech_processor(), WaitK(1))

    translate_audio(begin, pieces(), show, Report(), realtime=False)
    heard = 0.0
    for event in events:
        if isinstance(event, Word):
            assert event.read_ms == min(heard, 1200)
        else:
            heard = event
    assert isinstance(events[4], Word) or any(isinstance(event, Word) for event in events[:8])


def test_realtime_takes_as_long_as_the_audio(model, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    pieces = [noise(0.3, seed=number) for number in range(4)]

    def begin():
        return StreamingTranslator(model, speech_processor(), WaitK(3))

    report = Report()
    translate_audio(begin, iter(pieces), lambda word, clock: None, report, realtime=True)
    assert now[0] == pytest.approx(101.2) and report.audio_ms == 1200 and report.done
    translate_audio(begin, iter(pieces), lambda word, clock: None, Report(), realtime=False)
    assert now[0] == pytest.approx(101.2)


def test_a_long_file_is_read_block_by_block(wav):
    samples = noise(30.0)
    pieces = audio_pieces(wav(samples), 5760)
    first = next(pieces)
    rest = list(pieces)
    assert len(first) == 5760 and max(map(len, rest)) <= 5760
    np.testing.assert_array_equal(np.concatenate([first, *rest]), samples)


# ---- odd and broken audio


def test_other_formats(run, model, wav, capsys):
    stereo = np.stack([noise(0.6, seed=1, rate=48_000), noise(0.6, seed=2, rate=48_000)], axis=1)
    for path in (
        wav(stereo, 48_000, "PCM_24", "stereo.wav"),
        wav(noise(0.6, seed=1), RATE, "PCM_U8", "bits.wav"),
        wav(np.zeros(9000, np.float32), name="silence.wav"),
        wav(np.ones(1, np.float32), name="one.wav"),
    ):
        words = expected(model, read_audio(path), WaitK(1))
        captured = output(capsys, run, path, "--k", "1")
        assert captured.out == " ".join(word.text for word in words) + "\n"
        assert captured.err.count("\n") == 1


def test_broken_audio_is_one_line(run, text_run, wav, tmp_path, capsys):
    samples = noise(0.5)
    samples[700] = np.nan
    assert "sample 700 (0.044 s): expected a finite number, found nan" in one_line(capsys, run, wav(samples))
    path = wav(noise(0.5))
    whole = (tmp_path / "speech.wav").read_bytes()
    (tmp_path / "speech.wav").write_bytes(whole[:9000])
    assert "the file is cut off" in one_line(capsys, run, path)
    (tmp_path / "speech.wav").write_bytes(b"")
    assert "expected an audio file, found an empty one" in one_line(capsys, run, path)
    assert "expected an audio file, found No such file" in one_line(capsys, run, tmp_path / "none.wav")
    late = noise(8.0, seed=1)
    late[-1] = np.inf
    assert main(["translate", str(run), wav(late, name="late.wav"), "--k", "1"]) == 2
    captured = capsys.readouterr()  # what was written before stays, on a line of its own
    assert captured.out.endswith("\n") and captured.out.strip() and captured.err.startswith("leapformer: ")
    assert "FILE: expected an audio file, found -" in one_line(capsys, run, "-")
    assert "expected the folder of a run" in one_line(capsys, tmp_path, path)
    assert "--policy: expected one of wait-k, local-agreement, align-att, found 'x'" in one_line(
        capsys, run, path, "--policy", "x"
    )
    assert "expected a run that translates speech" in one_line(capsys, text_run, path, "--realtime")


# ---- text


def test_lines_of_text(text_run, tmp_path, capsys, monkeypatch):
    lines = ["der hund trinkt wasser", "", "morgen fahren wir im garten nach hause"]
    model, written = text_model(seed=3, dtype=torch.float32), []
    for line in lines:
        with StreamingTranslator(model, text_processor(), WaitK(2)) as translator:
            written.append(translator.push(line) + translator.finish())
    assert sum(map(len, written)) > 2 and written[1] == []
    text = "".join(" ".join(word.text for word in words) + "\n" for words in written)
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    captured = output(capsys, text_run, tmp_path / "lines.txt", "--k", "2")
    assert captured.out == text and captured.err.startswith("3 lines of 11 words; ")
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    *events, last = map(json.loads, output(capsys, text_run, "-", "--k", "2", "--json").out.splitlines())
    assert [(e["line"], e["index"], e["word"], e["read_words"]) for e in events] == [
        (number, word.index, word.text, word.read_ms) for number, words in enumerate(written, start=1) for word in words
    ]
    assert last["summary"]["lines"] == 3 and last["summary"]["source_words"] == 11


def test_broken_text_is_one_line(text_run, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    found = one_line(capsys, text_run, tmp_path / "latin.txt")
    assert "latin.txt:1: expected text in UTF-8, found byte 0xe9 at column 3" in found
    assert "expected a file of text, found No such file" in one_line(capsys, text_run, tmp_path / "none.txt")
