"""Spoken data sets: what a folder holds, that nothing of it depends on chance, and what is said of bad lines."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from leapformer.errors import LeapformerError

pytest.importorskip("espeakng_loader")
pytest.importorskip("soxr")

from leapformer.files.writing import write_json  # noqa: E402
from leapformer.tasks.preparation import BadRows  # noqa: E402
from leapformer.tasks.simulst.corpora import (
    espeak,  # noqa: E402
    prepared,  # noqa: E402
    spoken,  # noqa: E402
)
from leapformer.tasks.simulst.corpora.prepared import SpokenSplit  # noqa: E402
from leapformer.tasks.simulst.corpora.spoken import (  # noqa: E402
    Manner,
    Speaking,
    coloured_noise,
    draw_manner,
    prepare_grammar,
    prepare_text_pairs,
    render,
)

SIZES = {"train": 12, "validation": 3, "test": 3}
QUICK = Manner("en-us+m1", 170, 50, 100.0, 0.0, 0.5, 0.2, 0.3, 1)


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    patch = pytest.MonkeyPatch()
    patch.setattr(prepared, "_SHARD", 5)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("spoken") / "demo"
    prepare_grammar(output, sizes=SIZES, seed=1, workers=1)
    return output


# ---- audio


def test_speech_is_placed_scaled_and_resampled():
    samples = render("Hello world.", QUICK)
    assert samples.dtype == np.int16
    loud = np.flatnonzero(np.abs(samples.astype(int)) > 100)
    assert abs(loud[0] - 0.2 * 16_000) < 400 and abs(len(samples) - loud[-1] - 0.3 * 16_000) < 2_000
    assert np.abs(samples.astype(int)).max() == pytest.approx(0.5 * 32_767, rel=0.02)
    spoken_for = len(espeak.speak("Hello world.", voice="en-us+m1", speed=170, pitch=50)) / espeak.SAMPLE_RATE
    assert 0.5 < len(samples) / 16_000 < spoken_for + 0.5


@pytest.mark.parametrize("snr", [5.0, 20.0])
def test_noise_has_the_power_that_it_should_have(snr):
    clean = render("Hello world.", QUICK).astype(float)
    noisy = render("Hello world.", Manner(**{**vars(QUICK), "snr": snr, "level": 0.25})).astype(float)
    noise = noisy - clean / 2
    start, end = round(0.2 * 16_000), len(clean) - round(0.3 * 16_000)
    speech = (clean / 2)[start:end]
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.5)


@pytest.mark.parametrize("colour", [0.0, 1.0, 2.0])
def test_noise_falls_with_the_frequency(colour):
    noise = coloured_noise(1 << 16, colour, 3)
    assert np.mean(noise**2) == pytest.approx(1.0)
    power = np.abs(np.fft.rfft(noise)) ** 2
    frequency = np.fft.rfftfreq(1 << 16, 1 / 16_000)
    low, high = (power[(frequency > f) & (frequency < 2 * f)].mean() for f in (200, 1600))
    assert np.log2(low / high) / 3 == pytest.approx(colour, abs=0.15)  # three octaves apart


def test_manners_stay_in_their_ranges():
    speaking = Speaking(speeds=(100, 110), snr=(3.0, 4.0))
    manners = [draw_manner(speaking, "train", number, 0) for number in range(300)]
    assert {manner.speed for manner in manners} == set(range(100, 111))
    assert all(3.0 <= manner.snr <= 4.0 for manner in manners)
    assert len({manner.voice for manner in manners}) > 80
    assert manners[7] == draw_manner(speaking, "train", 7, 0) != draw_manner(speaking, "train", 7, 1)


def test_test_voices_are_not_training_voices():
    timbres = {split: {voice.split("+")[1] for voice in Speaking().voices(split)} for split in spoken.TIMBRES}
    assert not timbres["train"] & timbres["test"] and not timbres["train"] & timbres["validation"]
    assert not timbres["validation"] & timbres["test"]


def test_every_voice_speaks_in_its_own_way():
    sounds = [
        hashlib.sha256(espeak.speak("Hello.", voice=voice).tobytes()).hexdigest()
        for split in spoken.TIMBRES
        for voice in Speaking().voices(split)
    ]
    assert len(set(sounds)) == len(sounds)


# ---- the built-in grammar


def test_what_a_folder_holds(folder):
    assert sorted(file.name for file in folder.iterdir()) == [
        "card.json", "test.int16", "test.jsonl", "train.int16", "train.jsonl", "validation.int16", "validation.jsonl",
    ]  # fmt: skip
    triples = {}
    for split, count in SIZES.items():
        data = SpokenSplit(folder, split)
        facts = data.card["splits"][split]
        assert len(data) == facts["utterances"] == count
        assert facts["seconds"] == pytest.approx(sum(row["samples"] for row in data.rows) / 16_000, abs=0.05)
        for file, digest in facts["sha256"].items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
        for number, row in enumerate(data.rows):
            assert row["id"] == f"{split}-{number:06d}"
            assert row["voice"] in Speaking().voices(split)
            expected = render(row["text"], draw_manner(Speaking(), split, number, 1))
            np.testing.assert_array_equal(data[number]["audio"], expected)
        triples[split] = {(row["template"], row["verb"], row["object"]) for row in data.rows}
    assert not triples["train"] & triples["test"]
    card = data.card
    assert card["sample_rate"] == 16_000 and "GPL-3" in card["licence"] and card["bad_rows"] == []
    assert card["made"]["seed"] == 1 and "espeak-ng 1." in card["made"]["maker"]


def test_slices_and_the_end(folder):
    data = SpokenSplit(folder, "test")
    assert [row["id"] for row in data[1:]] == ["test-000001", "test-000002"]
    assert data[-1]["id"] == "test-000002" and len(list(data)) == 3
    with pytest.raises(IndexError):
        data[3]


def test_processes_change_nothing(folder, tmp_path):
    prepare_grammar(tmp_path / "x", sizes=SIZES, seed=1, workers=2)
    for file in folder.iterdir():
        assert (tmp_path / "x" / file.name).read_bytes() == file.read_bytes()


def test_what_is_there_is_left_as_it_is(folder):
    before = (folder / "train.int16").stat().st_mtime_ns
    card = prepare_grammar(folder, sizes=SIZES, seed=1)
    assert (folder / "train.int16").stat().st_mtime_ns == before and card["splits"]["train"]["utterances"] == 12
    with pytest.raises(LeapformerError, match="holds data with seed 1, expected 2; choose another --output"):
        prepare_grammar(folder, sizes=SIZES, seed=2)
    with pytest.raises(LeapformerError, match="holds data with speaking .*, expected .*; choose another --output"):
        prepare_grammar(folder, sizes=SIZES, seed=1, speaking=Speaking(snr=(1.0, 2.0)))


def test_an_interrupted_preparation_goes_on(folder, tmp_path, monkeypatch):
    made, whole = [], prepared.make_shard

    def interrupted(path, *arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        whole(path, *arguments)

    def counting(path, *arguments):
        made.append(path.name)
        whole(path, *arguments)

    monkeypatch.setattr(prepared, "make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_grammar(tmp_path / "x", sizes=SIZES, seed=1, workers=1)
    with pytest.raises(LeapformerError, match="expected prepared data, found no card.json"):
        SpokenSplit(tmp_path / "x", "train")
    (tmp_path / "x" / ".parts" / made[1]).write_bytes(b"cut off")
    monkeypatch.setattr(prepared, "make_shard", counting)
    prepare_grammar(tmp_path / "x", sizes=SIZES, seed=1, workers=1)
    assert len(made) == 6 and made[2] == made[1]  # of five shards; the whole one was kept, the damaged one made again
    for file in folder.iterdir():
        assert (tmp_path / "x" / file.name).read_bytes() == file.read_bytes()


def test_an_interrupt_between_the_files_goes_on(folder, tmp_path, monkeypatch):
    """When some files have their names already, and the card is not there."""

    def interrupted_at_the_card(path, content):
        if path.name == "card.json":
            raise KeyboardInterrupt
        write_json(path, content)

    monkeypatch.setattr(prepared, "write_json", interrupted_at_the_card)
    with pytest.raises(KeyboardInterrupt):
        prepare_grammar(tmp_path / "x", sizes=SIZES, seed=1, workers=1)
    with pytest.raises(LeapformerError, match="found no card.json"):
        SpokenSplit(tmp_path / "x", "test")
    monkeypatch.undo()
    monkeypatch.setattr(prepared, "_SHARD", 5)
    prepare_grammar(tmp_path / "x", sizes=SIZES, seed=1, workers=1)
    assert (tmp_path / "x" / "train.int16").read_bytes() == (folder / "train.int16").read_bytes()


def test_an_interrupt_ends_every_process(tmp_path):
    """As Ctrl-C does it, to all processes of the group."""
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from leapformer.tasks.simulst.corpora.spoken import prepare_grammar\n"
        "prepare_grammar(sys.argv[1], sizes={'train': 20000}, workers=2)"
    )
    output = tmp_path / "x"
    process = subprocess.Popen(
        [sys.executable, "-c", program, output], stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(output.glob(".parts/*.json")) and process.poll() is None:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) != 0 and not (output / "card.json").exists()
    _, left = psutil.wait_procs(children, timeout=10)
    assert len(children) >= 2 and [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def test_progress_is_told(tmp_path):
    told = []
    prepare_grammar(
        tmp_path / "x",
        sizes={"train": 6},
        workers=1,
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert told == [(0, 2, "shards"), (1, 2, "shards"), (2, 2, "shards")]


def test_damaged_folders(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(LeapformerError, match="expected the split dev, found train, validation, test"):
        SpokenSplit(copy, "dev")
    (copy / "train.int16").write_bytes((folder / "train.int16").read_bytes()[:-2])
    with pytest.raises(LeapformerError, match=r"train.int16: expected [\d,]+ bytes by train.jsonl, found"):
        SpokenSplit(copy, "train")
    (copy / "test.int16").unlink()
    with pytest.raises(LeapformerError, match="test.int16: expected prepared audio, found no such file"):
        SpokenSplit(copy, "test")


def test_wrong_arguments(tmp_path):
    output = tmp_path / "x"
    for sizes in ({"dev": 5}, {"train": 0}):
        with pytest.raises(LeapformerError, match="speech-demo: sizes: expected 1 or more for train, validation, test"):
            prepare_grammar(output, sizes=sizes)
    with pytest.raises(LeapformerError, match="--speeds: expected 80 <= slowest <= fastest <= 450, found 200 and 100"):
        prepare_grammar(output, sizes=SIZES, speaking=Speaking(speeds=(200, 100)))
    with pytest.raises(LeapformerError, match="--snr: expected"):
        prepare_grammar(output, sizes=SIZES, speaking=Speaking(snr=(float("nan"), 10)))
    with pytest.raises(LeapformerError, match="--language: expected one of espeak-ng's .*, found xx"):
        prepare_grammar(output, sizes=SIZES, speaking=Speaking(language="xx"))
    assert not output.exists()
    output.mkdir()
    (output / "letters.txt").touch()
    with pytest.raises(LeapformerError, match="expected an empty folder, found letters.txt"):
        prepare_grammar(output, sizes=SIZES)
    with pytest.raises(LeapformerError, match="letters.txt: expected a folder, found a file"):
        prepare_grammar(output / "letters.txt", sizes=SIZES)


# ---- pairs of texts


def write_pairs(folder: Path, changes: dict[str, bytes] | None = None, *, count: int = 20) -> tuple[Path, Path]:
    """a.en and a.de of as many lines; {"en3": b"..."} changes the third line of a.en."""
    lines = {
        "en": [f"This is sentence {number}.".encode() for number in range(1, count + 1)],
        "de": [f"Das ist Satz {number}.".encode() for number in range(1, count + 1)],
    }
    for place, line in (changes or {}).items():
        lines[place[:2]][int(place[2:]) - 1] = line
    for language, content in lines.items():
        (folder / f"a.{language}").write_bytes(b"\n".join(content) + b"\n")
    return folder / "a.en", folder / "a.de"


def texts(folder: Path, split: str) -> list[str]:
    return [row["text"] for row in SpokenSplit(folder, split).rows]


def test_pairs_of_text_are_spoken_and_held_out(tmp_path):
    pair = write_pairs(tmp_path)
    card = prepare_text_pairs(*pair, tmp_path / "x", workers=1)
    assert {split: facts["utterances"] for split, facts in card["splits"].items()} == {
        "train": 16, "validation": 2, "test": 2,
    }  # fmt: skip
    rows = [row for split in SIZES for row in SpokenSplit(tmp_path / "x", split).rows]
    assert sorted(row["text"] for row in rows) == sorted(f"This is sentence {number}." for number in range(1, 21))
    for row in rows:
        assert row["translation"] == row["text"].replace("This is sentence", "Das ist Satz")
        assert "template" not in row


def test_the_same_text_is_in_one_split_alone(tmp_path):
    same = {f"en{number}": b"This is sentence 1." for number in range(2, 11)}
    prepare_text_pairs(*write_pairs(tmp_path, same), tmp_path / "x", workers=1)
    held = [set(texts(tmp_path / "x", split)) for split in SIZES]
    assert sum(map(len, held)) == len(set.union(*held)) == 11


def test_splits_with_files_of_their_own(tmp_path):
    pair = write_pairs(tmp_path)
    for name in ("b.en", "b.de"):
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write("Good morning.\n" if name == "b.en" else "Guten Morgen.\n")
    other = (tmp_path / "b.en.gz", tmp_path / "b.de.gz")
    prepare_text_pairs(*pair, tmp_path / "x", held_out={"validation": other, "test": other}, count=3, workers=1)
    assert texts(tmp_path / "x", "test") == texts(tmp_path / "x", "validation") == ["Good morning."]
    assert len(texts(tmp_path / "x", "train")) == 3
    with pytest.raises(LeapformerError, match="holds data with count 3, expected 4"):
        prepare_text_pairs(*pair, tmp_path / "x", held_out={"validation": other, "test": other}, count=4)


def test_another_source_under_the_same_name(tmp_path):
    prepare_text_pairs(*write_pairs(tmp_path), tmp_path / "x", count=2, workers=1)
    with pytest.raises(LeapformerError, match="holds data with source"):
        prepare_text_pairs(*write_pairs(tmp_path, {"en1": b"Other words."}), tmp_path / "x", count=2)


def test_another_language_is_spoken_by_its_own_voices(tmp_path):
    english, german = write_pairs(tmp_path)
    prepare_text_pairs(german, english, tmp_path / "x", count=4, workers=1, speaking=Speaking(language="de"))
    assert {row["voice"].split("+")[0] for row in SpokenSplit(tmp_path / "x", "train").rows} == {"de"}


BAD = {
    "en3": (b"", r"a.en:3: expected text, found an empty line"),
    "de4": (b" \t", r"a.de:4: expected text, found an empty line"),
    "en5": (b"caf\xe9", r"a.en:5: expected UTF-8, found byte 0xe9 at offset 3"),
    "de6": (b"\xff", r"a.de:6: expected UTF-8, found byte 0xff at offset 0"),
    "en7": (b"- ... !", r"a.en:7: expected words to speak, found '- ... !'"),
    "en8": (b"a\0b", r"a.en:8: expected text, found a zero byte"),
    "en9": (b"very " * 250, r"a.en:9: expected at most 1,000 characters, found 1,249"),
}


@pytest.mark.parametrize("place", BAD)
def test_a_bad_line_is_named(tmp_path, place):
    line, message = BAD[place]
    with pytest.raises(LeapformerError, match=message) as caught:
        prepare_text_pairs(*write_pairs(tmp_path, {place: line}), tmp_path / "x", workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x" / "card.json").exists()


def test_bad_lines_are_skipped_counted_and_listed(tmp_path):
    pair = write_pairs(tmp_path, {place: line for place, (line, _) in BAD.items()})
    card = prepare_text_pairs(*pair, tmp_path / "x", skip_bad=True, workers=1)
    assert sum(facts["utterances"] for facts in card["splits"].values()) == 20 - len(BAD)
    listed = json.loads((tmp_path / "x" / "card.json").read_text())["bad_rows"]
    assert len(listed) == len(BAD) and all(f":{place[2:]}: " in row for place, row in zip(BAD, listed, strict=True))


def test_files_that_do_not_fit(tmp_path):
    source, target = write_pairs(tmp_path)
    target.write_bytes(target.read_bytes() + b"Noch einer.\n")
    for skip_bad in (False, True):
        with pytest.raises(LeapformerError, match="expected as many lines in both, found 20 and 21"):
            prepare_text_pairs(source, target, tmp_path / "x", skip_bad=skip_bad)
    with pytest.raises(LeapformerError, match="cannot read .*nothing.en: No such file"):
        prepare_text_pairs(tmp_path / "nothing.en", target, tmp_path / "x")
    source.write_bytes(b"")
    target.write_bytes(b"")
    with pytest.raises(LeapformerError, match="expected lines of text, found no good one"):
        prepare_text_pairs(source, target, tmp_path / "x")
    (tmp_path / "cut.en.gz").write_bytes(gzip.compress(b"Hello.\n" * 50)[:-9])
    with pytest.raises(LeapformerError, match="cut.en.gz is not a whole .gz file"):
        prepare_text_pairs(tmp_path / "cut.en.gz", target, tmp_path / "x")
    with pytest.raises(LeapformerError, match="expected more than 2 texts to hold some out, found 2"):
        prepare_text_pairs(*write_pairs(tmp_path, count=2), tmp_path / "x")
    with pytest.raises(LeapformerError, match="--count: expected 1 or more, found 0"):
        prepare_text_pairs(*write_pairs(tmp_path), tmp_path / "x", count=0)


def test_windows_line_ends(tmp_path):
    source, target = write_pairs(tmp_path)
    source.write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))
    prepare_text_pairs(source, target, tmp_path / "x", count=1, workers=1)
    assert all(text.endswith(".") for split in SIZES for text in texts(tmp_path / "x", split))


def test_real_pairs(tmp_path):
    data = os.environ.get("LEAPFORMER_DATA")
    if not data or not (Path(data) / "multi30k").is_dir():
        pytest.skip("needs LEAPFORMER_DATA/multi30k")
    multi = Path(data) / "multi30k"
    held = (multi / "val.en.gz", multi / "val.de.gz")
    pairs = spoken.read_pairs(multi / "train.en.gz", multi / "train.de.gz", BadRows())
    assert len(pairs) == 29_000
    assert len(spoken.read_pairs(*held, BadRows())) == 1_014
