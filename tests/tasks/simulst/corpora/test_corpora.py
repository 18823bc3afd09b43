"""Corpora of recorded speech: tiny copies of the exact layouts, cut and decoded as they say, and one line for every
fault.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from leapformer.errors import LeapformerError, MissingExtra

sf = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from leapformer.tasks.simulst.audio.reading import read_audio  # noqa: E402
from leapformer.tasks.simulst.corpora import prepared  # noqa: E402
from leapformer.tasks.simulst.corpora.prepared import SpokenSplit, hold_out  # noqa: E402
from leapformer.tasks.simulst.corpora.preparing import CORPORA, prepare_corpus  # noqa: E402

RATE = 16_000


def talk(seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    """int16 [N] of noise, in which no two places are alike."""
    return np.random.default_rng(seed).integers(-9_000, 9_000, round(seconds * rate)).astype(np.int16)


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, samples, rate)


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def table(*rows: tuple) -> list[str]:
    return ["\t".join(map(str, row)) for row in rows]


def change_line(path: Path, row: int, line: str | bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[row - 1] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))


def prepare(name: str, folder: Path, output: Path, source: str = "en", target: str = "de", **options) -> dict:
    options = {"workers": 1, **options}
    return prepare_corpus(name, folder, output, source_language=source, target_language=target, **options)


def fails(message: str, *arguments, **options) -> None:
    with pytest.raises(LeapformerError, match=message) as caught:
        prepare(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert not (arguments[2] / "card.json").exists()


def rows(folder: Path, split: str) -> list[dict]:
    return [{key: row[key] for key in ("id", "text", "translation", "speaker")} for row in SpokenSplit(folder, split)]


# ---- MuST-C


def write_mustc(folder: Path) -> Path:
    """Two talks in training, whose segments overlap and are not in their order, and one talk in each other split."""
    data = folder / "en-de" / "data"
    for split, talks in (("train", (9, 10)), ("dev", (1,)), ("tst-COMMON", (2,)), ("tst-HE", (3,))):
        for number in talks:
            write_audio(data / split / "wav" / f"ted_{number}.wav", talk(4, number))
        segments = [(talks[0], 2.25, 1.5), (talks[-1], 0, 1), (talks[0], 0.5, 2)]
        write_lines(
            data / split / "txt" / f"{split}.yaml",
            *(
                f"- {{duration: {duration}, offset: {offset}, rW: 9, uW: 0, "
                f"speaker_id: spk.{number}, wav: ted_{number}.wav}}"
                for number, offset, duration in segments
            ),
        )
        write_lines(data / split / "txt" / f"{split}.en", "A: one.", 'He said "two', " three # ")
        write_lines(data / split / "txt" / f"{split}.de", "A: eins.", 'Er sagte "zwei', "drei")
    return folder


def test_mustc(tmp_path):
    card = prepare("mustc", write_mustc(tmp_path / "MUSTC"), tmp_path / "x")
    assert list(card["splits"]) == ["validation", "train", "test", "test-he"]
    assert rows(tmp_path / "x", "train") == [
        {"id": "ted_9_1", "text": "A: one.", "translation": "A: eins.", "speaker": "spk.9"},
        {"id": "ted_10_0", "text": 'He said "two', "translation": 'Er sagte "zwei', "speaker": "spk.10"},
        {"id": "ted_9_0", "text": "three #", "translation": "drei", "speaker": "spk.9"},
    ]
    train, held = SpokenSplit(tmp_path / "x", "train"), SpokenSplit(tmp_path / "x", "test-he")
    # The samples of a 16-bit file of this rate are kept as they are.
    for item, (number, offset, duration) in zip(train, [(9, 2.25, 1.5), (10, 0, 1), (9, 0.5, 2)], strict=True):
        expected = talk(4, number)[round(offset * RATE) : round((offset + duration) * RATE)]
        np.testing.assert_array_equal(item["audio"], expected)
    np.testing.assert_array_equal(held[1]["audio"], talk(4, 3)[:RATE])
    assert card["splits"]["train"]["speakers"] == 2 and card["splits"]["train"]["seconds"] == 4.5
    assert "CC BY-NC-ND" in card["licence"] and card["left_out"] == {}


def test_the_folder_of_the_pair_does_too(tmp_path):
    folder = write_mustc(tmp_path / "MUSTC")
    prepare("mustc", folder, tmp_path / "x")
    prepare("mustc", folder / "en-de", tmp_path / "y")
    assert (tmp_path / "x" / "train.int16").read_bytes() == (tmp_path / "y" / "train.int16").read_bytes()


def yaml_row(**changes: object) -> str:
    values = {"duration": 1, "offset": 0, "rW": 9, "uW": 0, "speaker_id": "spk.1", "wav": "ted_9.wav", **changes}
    return "- {" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


BAD_MUSTC: dict[str, tuple[str, int, str | bytes, str]] = {
    "beyond the end": (
        "yaml",
        2,
        yaml_row(offset=3.5),
        r"train.yaml:2: ted_9.wav: offset 3.5 s \+ duration 1 s: .*4.5",
    ),
    "no offset": ("yaml", 2, "- {duration: 1, wav: ted_9.wav}", "train.yaml:2: expected wav, offset and duration"),
    "no number": ("yaml", 3, yaml_row(offset="later"), "train.yaml:3: offset: expected seconds, found 'later'"),
    "not finite": ("yaml", 3, yaml_row(duration=".nan"), "train.yaml:3: duration: expected seconds, found nan"),
    "negative": (
        "yaml",
        1,
        yaml_row(offset=-1),
        "train.yaml:1: ted_9.wav: offset: expected seconds from 0 on, found -1",
    ),
    "empty": ("yaml", 1, yaml_row(duration=0), "train.yaml:1: ted_9.wav: duration: expected seconds above 0, found 0"),
    "missing": ("yaml", 2, yaml_row(wav="ted_8.wav"), "train.yaml:2: ted_8.wav: expected an audio file, found No such"),
    "escaping": ("yaml", 2, yaml_row(wav="../../../x.wav"), "train.yaml:2: expected the name of a file within"),
    "absolute": ("yaml", 2, yaml_row(wav="/etc/passwd"), "train.yaml:2: expected the name of a file within"),
    "empty reference": ("de", 2, "  ", "train.de:2: expected a translation, found none"),
    "bad byte": ("en", 3, b"caf\xe9", "train.en:3: expected UTF-8, found byte 0xe9 at offset 3"),
}


@pytest.mark.parametrize("fault", BAD_MUSTC)
def test_bad_rows_of_mustc(tmp_path, fault):
    suffix, row, line, message = BAD_MUSTC[fault]
    folder = write_mustc(tmp_path / "MUSTC")
    change_line(folder / "en-de" / "data" / "train" / "txt" / f"train.{suffix}", row, line)
    fails(f"data: .*{message}", "mustc", folder, tmp_path / "x")
    card = prepare("mustc", folder, tmp_path / "x", skip_bad=True)
    assert len(card["bad_rows"]) == 1 and f":{row}: " in card["bad_rows"][0]
    left = [each for place, each in enumerate(["A: eins.", 'Er sagte "zwei', "drei"], start=1) if place != row]
    assert [each["translation"] for each in rows(tmp_path / "x", "train")] == left


def test_files_of_mustc_that_do_not_fit(tmp_path):
    folder = write_mustc(tmp_path / "MUSTC")
    text = folder / "en-de" / "data" / "train" / "txt"
    whole = (text / "train.de").read_bytes()
    (text / "train.de").write_bytes(whole + b"vier\n")
    for skip_bad in (False, True):
        fails(
            "train.de: expected 3 lines, as train.yaml has, found 4", "mustc", folder, tmp_path / "x", skip_bad=skip_bad
        )
    (text / "train.de").write_bytes(whole)
    change_line(text / "train.yaml", 2, "- {duration: 1, offset")
    fails(r"train.yaml:[234]: expected YAML, found", "mustc", folder, tmp_path / "x")
    write_lines(text / "train.yaml", "a: 3")
    fails("train.yaml: expected a list of segments, found dict", "mustc", folder, tmp_path / "x")
    (text / "train.yaml").unlink()
    fails("cannot read .*train.yaml: No such file", "mustc", folder, tmp_path / "x")
    fails(
        "expected MuST-C with en-fr/data or data in it, found no such folder",
        "mustc",
        folder,
        tmp_path / "x",
        "en",
        "fr",
    )


# ---- CoVoST 2

CLIPS = {f"common_voice_fr_{number}": number for number in range(1, 7)}


def write_covost(folder: Path) -> Path:
    """Two clips of training, one of them of train_covost, one each of the rest, one that Common Voice does not have."""
    for name, number in CLIPS.items():
        write_audio(folder / "clips" / f"{name}.mp3", talk(0.5, number, 48_000), 48_000)
    write_lines(
        folder / "validated.tsv",
        *table(
            ("client_id", "path", "sentence", "up_votes", "age"),
            *((f"client{number % 2}", f"{name}.mp3", f'"Phrase {number}', 2, "") for name, number in CLIPS.items()),
        ),
    )
    splits = ("train", "train_covost", "dev", "test", "other")
    write_lines(
        folder / "covost_v2.fr_en.tsv",
        *table(
            ("path", "translation", "split"),
            *(
                (f"{name}.mp3", f'Sentence "{number}', split)
                for (name, number), split in zip(CLIPS.items(), splits, strict=False)
            ),
            ("common_voice_fr_9.mp3", "Sentence 9", "train"),
        ),
    )
    return folder


def check_covost(output: Path, card: dict) -> None:
    assert {split: facts["utterances"] for split, facts in card["splits"].items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert rows(output, "train")[1] == {
        "id": "common_voice_fr_2",
        "text": '"Phrase 2',
        "translation": 'Sentence "2',
        "speaker": "client0",
    }


def test_covost_with_one_file(tmp_path):
    folder = write_covost(tmp_path / "fr")
    card = prepare("covost", folder, tmp_path / "x", "fr", "en")
    check_covost(tmp_path / "x", card)
    assert card["left_out"] == {"split other": 1, "not in validated.tsv": 1}
    samples = read_audio(folder / "clips" / "common_voice_fr_3.mp3")
    found = SpokenSplit(tmp_path / "x", "validation")[0]["audio"]
    assert abs(len(found) - RATE // 2) < 3_000  # the rest is what mp3 puts in front and behind
    np.testing.assert_allclose(found / 32768, samples, atol=1 / 32768)


@pytest.mark.parametrize("with_sentences", [True, False])
def test_covost_split_beforehand(tmp_path, with_sentences):
    folder = write_covost(tmp_path / "CV" / "fr")
    (folder / "covost_v2.fr_en.tsv").unlink()
    for split, numbers in (("train", (1, 2)), ("dev", (3,)), ("test", (4,))):
        full = (("path", "sentence", "translation", "client_id"),) + tuple(
            (f"common_voice_fr_{number}.mp3", f'"Phrase {number}', f'Sentence "{number}', f"client{number % 2}")
            for number in numbers
        )
        short = [(row[0], row[2]) for row in full]
        write_lines(folder / f"covost_v2.fr_en.{split}.tsv", *table(*(full if with_sentences else short)))
    if with_sentences:
        (folder / "validated.tsv").unlink()
    check_covost(tmp_path / "x", prepare("covost", tmp_path / "CV", tmp_path / "x", "fr", "en"))


def test_bad_rows_of_covost(tmp_path):
    folder = write_covost(tmp_path / "fr")
    file = folder / "covost_v2.fr_en.tsv"
    change_line(file, 2, "common_voice_fr_1.mp3\tSentence 1")
    change_line(file, 3, "common_voice_fr_2.mp3\t \ttrain")
    change_line(file, 4, "../validated.tsv\tSentence\tdev")
    (folder / "clips" / "common_voice_fr_4.mp3").unlink()
    change_line(folder / "validated.tsv", 7, b"\xff")
    write_lines(
        folder / "validated.tsv",
        *folder.joinpath("validated.tsv").read_text(errors="replace").splitlines(),
        "c\t../validated.tsv\tx\t1\t",
    )
    fails(r"covost_v2.fr_en.tsv:2: expected 3 columns, found 2", "covost", folder, tmp_path / "x", "fr", "en")
    fails(
        "test: expected at least one good utterance, found none",
        "covost",
        folder,
        tmp_path / "x",
        "fr",
        "en",
        skip_bad=True,
    )
    write_audio(folder / "clips" / "common_voice_fr_4.mp3", talk(0.5, 4))
    change_line(file, 6, "common_voice_fr_5.mp3\tSentence 5\ttrain")
    card = prepare("covost", folder, tmp_path / "y", "fr", "en", skip_bad=True)
    for message, bad in zip(
        (
            "tsv:2: expected 3 columns, found 2",
            "validated.tsv:7: expected 5 columns, found 1",
            "tsv:3: expected a translation, found none",
            "tsv:4: expected the name of a file within",
        ),
        card["bad_rows"],
        strict=True,
    ):
        assert message in bad
    assert [row["id"] for row in rows(tmp_path / "y", "train")] == ["common_voice_fr_5"]


def test_files_of_covost_that_are_missing(tmp_path):
    folder = write_covost(tmp_path / "fr")
    fails(
        "expected covost_v2.fr_de.tsv or covost_v2.fr_de.train.tsv, found neither",
        "covost",
        folder,
        tmp_path / "x",
        "fr",
        "de",
    )
    (folder / "validated.tsv").unlink()
    fails("expected Common Voice's validated.tsv, found none", "covost", folder, tmp_path / "x", "fr", "en")
    write_lines(folder / "covost_v2.fr_en.tsv", "path\tsplit")
    fails(
        "fr_en.tsv:1: expected the columns path, translation, split, found path, split",
        "covost",
        folder,
        tmp_path / "x",
        "fr",
        "en",
    )
    write_lines(folder / "covost_v2.fr_en.tsv")
    fails("fr_en.tsv:1: .*, found an empty file", "covost", folder, tmp_path / "x", "fr", "en")


# ---- Europarl-ST


def write_europarl(folder: Path) -> Path:
    """Two speeches; the second is a flac file."""
    write_audio(folder / "en" / "audios" / "en.20081120.26.3-145.wav", talk(4, 1))
    write_audio(folder / "en" / "audios" / "en.20081120.26.3-146.flac", talk(3, 2))
    for split in ("train", "dev", "test"):
        part = folder / "en" / "de" / split
        write_lines(
            part / "segments.lst",
            "en.20081120.26.3-145 0.5 2.25",
            "en.20081120.26.3-145 2.25 4.0",
            "en.20081120.26.3-146 0.00 3.00",
        )
        write_lines(part / "segments.en", "One.", "Two.", "Three.")
        write_lines(part / "segments.de", "Eins.", "Zwei.", "Drei.")
        write_lines(part / "speakers.lst", "A", "A", "B")
    return folder


def test_europarl(tmp_path):
    folder = write_europarl(tmp_path / "v1")
    card = prepare("europarl", folder, tmp_path / "x")
    assert set(card["splits"]) == {"train", "validation", "test"}
    assert [tuple(row.values()) for row in rows(tmp_path / "x", "validation")] == [
        ("en.20081120.26.3-145_0", "One.", "Eins.", "A"),
        ("en.20081120.26.3-145_1", "Two.", "Zwei.", "A"),
        ("en.20081120.26.3-146_2", "Three.", "Drei.", "B"),
    ]
    train = SpokenSplit(tmp_path / "x", "train")
    for item, expected in zip(train, (talk(4, 1)[8_000:36_000], talk(4, 1)[36_000:], talk(3, 2)), strict=True):
        np.testing.assert_array_equal(item["audio"], expected)


def test_speakers_of_speeches(tmp_path):
    folder = write_europarl(tmp_path / "v1")
    for split in ("train", "dev", "test"):
        write_lines(folder / "en" / "de" / split / "speeches.lst", "en.20081120.26.3-146", "en.20081120.26.3-145")
        write_lines(folder / "en" / "de" / split / "speakers.lst", "B", "A")
    prepare("europarl", folder, tmp_path / "x")
    assert [row["speaker"] for row in rows(tmp_path / "x", "test")] == ["A", "A", "B"]


def test_bad_rows_of_europarl(tmp_path):
    folder = write_europarl(tmp_path / "v1")
    part, audios = folder / "en" / "de" / "train", folder / "en" / "audios"
    (part / "speakers.lst").unlink()
    for line, message in (
        ("en.20081120.26.3-145 3.5 4.5", "segments.lst:2: en.20081120.26.3-145.wav: offset 3.5 s .*within 4.000 s"),
        ("en.20081120.26.3-145 3.5 3.5", "segments.lst:2: .*duration: expected seconds above 0, found 0"),
        ("en.20081120.26.3-145 3.5", "segments.lst:2: expected audio, start and end, found 2 fields"),
        ("en.20081120.26.3-145 inf 2", "segments.lst:2: start: expected seconds, found 'inf'"),
        ("en.20081120.26.3-147 0 1", "segments.lst:2: expected en.20081120.26.3-147.wav in .*audios, found none"),
        ("en.20081120.26.3-148 0 1", "found en.20081120.26.3-148.m4a, which has to be converted to wav"),
        ("../../x 0 1", "segments.lst:2: expected the name of a file within"),
    ):
        (audios / "en.20081120.26.3-148.m4a").touch()
        change_line(part / "segments.lst", 2, line)
        fails(message, "europarl", folder, tmp_path / "x")
    card = prepare("europarl", folder, tmp_path / "x", skip_bad=True)
    assert len(card["bad_rows"]) == 1 and card["splits"]["train"]["utterances"] == 2
    folder = write_europarl(tmp_path / "v2")
    change_line(folder / "en" / "de" / "dev" / "speakers.lst", 2, "A\nA")
    fails("speakers.lst: expected 3 lines, as segments.lst has, found 4", "europarl", folder, tmp_path / "y")


# ---- fairseq S2T


def write_manifests(folder: Path) -> Path:
    """A plain file, a part of a zip, and a cut of a file by samples."""
    write_audio(folder / "wav" / "a.wav", talk(2, 1))
    write_audio(folder / "b.flac", talk(1, 2))
    with zipfile.ZipFile(folder / "audio.zip", "w") as archive:
        archive.write(folder / "b.flac", "b.flac")
        archive.writestr("c.npy", b"\x93NUMPY" + bytes(100))
        offsets = [entry.header_offset + 30 + len(entry.filename) for entry in archive.infolist()]
    size = (folder / "b.flac").stat().st_size
    (folder / "b.flac").unlink()
    head = ("id", "audio", "n_frames", "tgt_text", "speaker", "src_text", "src_lang", "tgt_lang")
    lines = table(
        head,
        ("a", "wav/a.wav", 200, 'Ganz "a', "s1", "All a", "en", "de"),
        ("b", f"audio.zip:{offsets[0]}:{size}", 100, "Ganz b", "s2", "All b", "en", "de"),
        ("c", "wav/a.wav:8000:4000", 25, "Teil a", "s1", "Part a", "en", "de"),
        ("d", "wav/a.wav", 200, "Tout a", "s1", "All a", "en", "fr"),
    )
    write_lines(folder / "train_st.tsv", *lines)
    write_lines(folder / "train_asr.tsv", *lines[:2])
    write_lines(folder / "tst-COMMON_st_en_de.tsv", *table(("id", "audio", "tgt_text"), ("a", "wav/a.wav", "Ganz a")))
    write_lines(folder / "tst-COMMON_st_en_fr.tsv", *table(("id", "audio", "tgt_text"), ("a", "wav/a.wav", "Tout a")))
    write_lines(folder / "words.tsv", "nothing of ours")
    (folder / "place.txt").write_text(str(offsets[1]))
    return folder


def test_manifests(tmp_path):
    folder = write_manifests(tmp_path / "s2t")
    card = prepare("manifest", folder, tmp_path / "x")
    assert {split: facts["utterances"] for split, facts in card["splits"].items()} == {"train": 3, "test": 1}
    assert card["left_out"] == {"other languages": 1}
    assert rows(tmp_path / "x", "train")[0] == {
        "id": "a",
        "text": "All a",
        "translation": 'Ganz "a',
        "speaker": "s1",
    }
    assert rows(tmp_path / "x", "test") == [{"id": "a", "text": "", "translation": "Ganz a", "speaker": ""}]
    expected = talk(2, 1), talk(1, 2), talk(2, 1)[8_000:12_000]
    for item, samples in zip(SpokenSplit(tmp_path / "x", "train"), expected, strict=True):
        np.testing.assert_array_equal(item["audio"], samples)


def test_bad_rows_of_manifests(tmp_path):
    folder = write_manifests(tmp_path / "s2t")
    array = int((folder / "place.txt").read_text())
    for audio, message in (
        (
            f"audio.zip:{array}:100",
            f"train_st.tsv:3: audio.zip:{array}:100: expected audio, found an array of features",
        ),
        ("audio.zip:40:99999999", "train_st.tsv:3: .*: expected 99,999,999 bytes from byte 40 on, found a file of"),
        ("audio.zip:0:0", "train_st.tsv:3: .*: expected 0 bytes from byte 0 on"),
        ("audio.zip:50:300", r"train_st.tsv:3: .*: expected audio \(wav, flac, ogg, mp3\), found"),
        ("other.zip:0:10", "train_st.tsv:3: .*: expected an audio file, found No such file"),
        ("../a.zip:0:10", "train_st.tsv:3: expected the name of a file within"),
        ("/etc/passwd", "train_st.tsv:3: expected the name of a file within"),
        ("wav/a.wav:31000:2000", r"train_st.tsv:3: wav/a.wav:31000:2000: offset .* within 2.000 s"),
        (" ", "train_st.tsv:3: expected the name of a file within"),
    ):
        change_line(folder / "train_st.tsv", 3, "\t".join(("b", audio, "1", "x", "s", "y", "en", "de")))
        fails(message, "manifest", folder, tmp_path / "x")
    card = prepare("manifest", folder, tmp_path / "x", skip_bad=True)
    assert len(card["bad_rows"]) == 1 and [row["id"] for row in rows(tmp_path / "x", "train")] == ["a", "c"]


def test_manifests_that_do_not_fit(tmp_path):
    folder = write_manifests(tmp_path / "s2t")
    write_lines(folder / "train.tsv", "id\taudio\ttgt_text")
    fails("expected one manifest for train, found train.tsv and train_st.tsv", "manifest", folder, tmp_path / "x")
    (folder / "train.tsv").unlink()
    fails("expected utterances from xx-yy, found none", "manifest", folder, tmp_path / "y", "xx", "yy")
    (tmp_path / "nothing").mkdir()
    fails("expected train.tsv or train_st.tsv, found no manifest", "manifest", tmp_path / "nothing", tmp_path / "x")


# ---- recordings of the same texts in several languages


def write_stamps(folder: Path, *, pack: bool = True) -> Path:
    """30 transcripts, the first ten of which were recorded twice, and one recording that is too short for its text."""
    folder.mkdir()
    numbers = [*range(30), *range(10)]
    lines, files = [("lang", "file", "stamp_id", "seconds", "transcript", "en", "de", "fr")], {}
    for take, number in enumerate([*numbers, 99]):
        text = f"Une image {number}." if number < 99 else "Une longue phrase qui ne fut pas dite en entier."
        lines.append(
            (
                "fr",
                f"fr/{take}.ogg",
                f"a/{take}",
                "1.000",
                text.upper() if take > 30 else text,
                f"Picture {number}.",
                "" if take == 3 else f"Bild {number}.",
                text,
            )
        )
        audio = io.BytesIO()
        sf.write(audio, talk(1, take), RATE, format="OGG", subtype="VORBIS")
        files[f"fr/{take}.ogg"] = audio.getvalue()
    lines.append(("en", "en/0.ogg", "a/0", "1.000", "Picture 0.", "Picture 0.", "Bild 0.", "Une image 0."))
    write_lines(folder / "manifest.tsv", *table(*lines))
    if pack:
        write_tar(folder / "fr.tar.xz", files)
    else:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] | None = None) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if extra is not None:
            extra(archive)


def test_stamps(tmp_path):
    folder = write_stamps(tmp_path / "tuxpaint")
    card = prepare("tuxpaint", folder, tmp_path / "x", "fr", "en")
    assert {split: facts["utterances"] for split, facts in card["splits"].items()}.keys() == {
        "train",
        "validation",
        "test",
    }
    assert card["left_out"] == {"more than 28 characters a second": 1} and "GPL-2" in card["licence"]
    texts = [{row["text"].lower() for row in rows(tmp_path / "x", split)} for split in card["splits"]]
    assert [len(each) for each in texts] == [24, 3, 3] and len(set.union(*texts)) == 30
    every = {row["id"]: row for split in card["splits"] for row in SpokenSplit(tmp_path / "x", split)}
    assert len(every) == 40 and every["fr/a/12"]["translation"] == "Picture 12."
    with tarfile.open(folder / "fr.tar.xz") as archive:
        samples = read_audio(io.BytesIO(archive.extractfile("fr/12.ogg").read()))  # type: ignore[union-attr]
    np.testing.assert_allclose(every["fr/a/12"]["audio"] / 32768, samples, atol=1 / 32768)


def test_unpacked_stamps_are_the_same(tmp_path):
    prepare("tuxpaint", write_stamps(tmp_path / "a"), tmp_path / "x", "fr", "de")
    card = prepare("tuxpaint", write_stamps(tmp_path / "b", pack=False), tmp_path / "y", "fr", "de")
    assert card["left_out"] == {"no translation": 1, "more than 28 characters a second": 1}
    assert (tmp_path / "x" / "train.int16").read_bytes() == (tmp_path / "y" / "train.int16").read_bytes()


def test_another_seed_holds_out_others(tmp_path):
    folder = write_stamps(tmp_path / "a")
    for seed in (0, 1):
        prepare("tuxpaint", folder, tmp_path / f"{seed}", "fr", "en", seed=seed)
    assert rows(tmp_path / "0", "test") != rows(tmp_path / "1", "test")


def test_prompts(tmp_path):
    folder = write_stamps(tmp_path / "a")
    text = (folder / "manifest.tsv").read_text(encoding="utf-8").replace("stamp_id", "prompt_id")
    (folder / "manifest.tsv").write_text(text, encoding="utf-8")
    card = prepare("asterisk", folder, tmp_path / "x", "fr", "en")
    assert sum(facts["utterances"] for facts in card["splits"].values()) == 41 and card["left_out"] == {}
    assert "CC BY-SA 3.0" in card["licence"]
    fails("expected en.tar.xz or a folder en, found neither", "asterisk", folder, tmp_path / "y", "en", "fr")
    fails("manifest.tsv:1: expected the columns .*, xx, found", "asterisk", folder, tmp_path / "y", "fr", "xx")


def test_nothing_of_an_archive_is_written_or_followed(tmp_path):
    folder = write_stamps(tmp_path / "a")
    with tarfile.open(folder / "fr.tar.xz") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    (tmp_path / "secret.ogg").write_bytes(files["fr/1.ogg"])

    def links(archive: tarfile.TarFile) -> None:
        for name, target in (("fr/1.ogg", str(tmp_path / "secret.ogg")), ("../outside", "/etc")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)

    files["../escaped.ogg"] = files.pop("fr/1.ogg")
    write_tar(folder / "fr.tar.xz", files, links)
    before = sorted(path for path in tmp_path.rglob("*"))
    fails(
        "manifest.tsv:3: expected fr/1.ogg in fr.tar.xz, found no such file in it",
        "tuxpaint",
        folder,
        tmp_path / "x",
        "fr",
        "en",
    )
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_damaged_archives_and_recordings(tmp_path):
    folder = write_stamps(tmp_path / "a")
    whole = (folder / "fr.tar.xz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive"):
        (folder / "fr.tar.xz").write_bytes(content)
        fails("fr.tar.xz: expected a whole tar archive, found", "tuxpaint", folder, tmp_path / "x", "fr", "en")
    folder = write_stamps(tmp_path / "b", pack=False)
    recording = folder / "fr" / "5.ogg"
    recording.write_bytes(recording.read_bytes()[:4_500])
    fails(
        r"manifest.tsv:7: fr/5.ogg: expected a last ogg page .*: the file is cut off",
        "tuxpaint",
        folder,
        tmp_path / "x",
        "fr",
        "en",
    )
    change_line(folder / "manifest.tsv", 3, "fr\tfr/1.ogg\ta/1\tsoon\tUne\tOne\tEins\tUne")
    card = prepare("tuxpaint", folder, tmp_path / "x", "fr", "en", skip_bad=True)
    assert "manifest.tsv:3: seconds: expected seconds, found 'soon'" in card["bad_rows"][0]
    assert "fr/5.ogg" in card["bad_rows"][1] and len(card["bad_rows"]) == 2


# ---- all corpora


def test_processes_and_interrupts_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_SHARD", 5)
    folder = write_stamps(tmp_path / "a")
    change_line(folder / "manifest.tsv", 3, "fr\tfr/1.ogg\ta/1\t1.0\tUne\t \tEins")
    prepare("tuxpaint", folder, tmp_path / "x", "fr", "en", skip_bad=True)
    prepare("tuxpaint", folder, tmp_path / "y", "fr", "en", skip_bad=True, workers=2)
    made, whole = [], prepared.make_shard

    def interrupted(path, *arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path.name)
        whole(path, *arguments)

    def counting(path, *arguments):
        made.append(path.name)
        whole(path, *arguments)

    monkeypatch.setattr(prepared, "make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("tuxpaint", folder, tmp_path / "z", "fr", "en", skip_bad=True)
    with pytest.raises(LeapformerError, match="found no card.json"):
        SpokenSplit(tmp_path / "z", "train")
    shard = tmp_path / "z" / ".parts" / made[2]
    shard.with_suffix(".int16").write_bytes(shard.with_suffix(".int16").read_bytes()[:-2])
    monkeypatch.setattr(prepared, "make_shard", counting)
    prepare("tuxpaint", folder, tmp_path / "z", "fr", "en", skip_bad=True)
    assert made[3] == made[2] and len(made) == len(set(made)) + 1  # the one that is cut off was made again
    for file in (tmp_path / "x").iterdir():
        assert (tmp_path / "y" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "z" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "z" / ".parts").exists()


def test_a_bad_row_in_a_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_SHARD", 5)
    folder = write_stamps(tmp_path / "a", pack=False)
    (folder / "fr" / "5.ogg").unlink()
    with pytest.raises(
        LeapformerError, match=r"^data: .*manifest.tsv:7: fr/5.ogg: expected an audio file, found No such"
    ):
        prepare("tuxpaint", folder, tmp_path / "x", "fr", "en", workers=2)


def test_shards_with_faults_are_not_taken_for_good_ones(tmp_path, monkeypatch):
    """Without --skip-bad, nothing is taken from a preparation with it."""
    folder = write_stamps(tmp_path / "a", pack=False)
    (folder / "fr" / "5.ogg").unlink()
    monkeypatch.setattr(prepared, "_put_together", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare("tuxpaint", folder, tmp_path / "x", "fr", "en", skip_bad=True)
    fails("fr/5.ogg: expected an audio file", "tuxpaint", folder, tmp_path / "x", "fr", "en")


def test_what_is_there_is_left_as_it_is(tmp_path):
    folder = write_stamps(tmp_path / "a")
    prepare("tuxpaint", folder, tmp_path / "x", "fr", "en")
    before = (tmp_path / "x" / "train.int16").stat().st_mtime_ns
    prepare("tuxpaint", folder.rename(tmp_path / "moved"), tmp_path / "x", "fr", "en")
    assert (tmp_path / "x" / "train.int16").stat().st_mtime_ns == before
    with pytest.raises(LeapformerError, match="holds data with source .*fr-en.*, expected .*fr-de"):
        prepare("tuxpaint", tmp_path / "moved", tmp_path / "x", "fr", "de")
    change_line(tmp_path / "moved" / "manifest.tsv", 2, "fr\tfr/0.ogg\ta/0\t1.0\tUne\tOther\tEins\tUne")
    with pytest.raises(LeapformerError, match="holds data with source"):
        prepare("tuxpaint", tmp_path / "moved", tmp_path / "x", "fr", "en")


def test_count_takes_some_of_the_training_utterances(tmp_path):
    folder = write_stamps(tmp_path / "a")
    for count in (5, 6):
        prepare("tuxpaint", folder, tmp_path / f"{count}", "fr", "en", count=count)
    prepare("tuxpaint", folder, tmp_path / "all", "fr", "en")
    five, six, every = ([row["id"] for row in rows(tmp_path / name, "train")] for name in ("5", "6", "all"))
    assert len(five) == 5 and set(five) < set(six) < set(every) and five == [id for id in every if id in five]
    assert rows(tmp_path / "5", "test") == rows(tmp_path / "all", "test")


def test_wrong_arguments(tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "x"
    fails("--from .*nowhere: expected a folder, found nothing", "mustc", tmp_path / "nowhere", output)
    fails("--from .*file: expected a folder, found a file", "mustc", tmp_path / "file", output)
    fails("--source-language: expected a code such as fr, found '../en'", "mustc", tmp_path, output, "../en")
    fails("--target-language: expected a code such as fr, found ''", "mustc", tmp_path, output, "en", "")
    fails(
        "--target-language: expected another than that of the speech, found en", "mustc", tmp_path, output, "en", "en"
    )
    fails("--count: expected 1 or more, found 0", "mustc", tmp_path, output, count=0)
    fails(f"speech: expected one of {', '.join(CORPORA)}, found 'must-c'", "must-c", tmp_path, output)


def test_a_missing_package_is_no_bad_row(tmp_path, monkeypatch):
    folder = write_stamps(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtra, match=r"'soundfile'.*leapformer\[speech\]"):
        prepare("tuxpaint", folder, tmp_path / "x", "fr", "en", skip_bad=True)


def test_holding_out():
    words = [f"{number % 50}" for number in range(200)]
    parts = hold_out(words, str, ["validation", "test"], 3)
    assert [len(set(part)) for part in parts.values()] == [40, 5, 5]
    assert sorted(each for part in parts.values() for each in part) == sorted(words)
    assert hold_out(words, str, [], 3) == {"train": words}
    with pytest.raises(LeapformerError, match="expected more than 2 texts to hold some out, found 2"):
        hold_out(["a", "b", "a"], str, ["validation", "test"], 0)


@pytest.mark.parametrize(
    ("name", "source", "target", "left_out", "utterances"),
    [
        ("tuxpaint", "fr", "en", {"more than 28 characters a second": 15}, 912),
        ("tuxpaint", "fr", "de", {"more than 28 characters a second": 15}, 912),
        ("asterisk", "en", "fr", {"no translation": 39}, 512),
        ("asterisk", "fr", "en", {"no translation": 1}, 508),
    ],
)
def test_real_recordings(tmp_path, name, source, target, left_out, utterances):
    """All rows of the two real sets are read, and eight training utterances and what is held out decoded."""
    data = os.environ.get("LEAPFORMER_DATA")
    folder = Path(data or "") / f"{name}_speech"
    if not data or not folder.is_dir():
        pytest.skip(f"needs LEAPFORMER_DATA/{name}_speech")
    card = prepare(name, folder, tmp_path / "x", source, target, count=8)
    assert card["left_out"] == left_out and card["bad_rows"] == []
    seconds = {
        f"{source}/{line.split(chr(9))[2]}": float(line.split("\t")[3])
        for line in (folder / "manifest.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
        if line.startswith(source)
    }
    for split, facts in card["splits"].items():
        for row in SpokenSplit(tmp_path / "x", split):
            assert row["samples"] / RATE == pytest.approx(seconds[row["id"]], abs=0.02)
        assert facts["utterances"] == (8 if split == "train" else len(rows(tmp_path / "x", split)))
    everything = json.loads((tmp_path / "x" / "card.json").read_text())
    assert everything["made"]["source"]["languages"] == f"{source}-{target}"
    assert utterances > sum(facts["utterances"] for facts in card["splits"].values())


# ---- bombs, and files that are none


def test_yaml_of_mustc_that_would_take_the_memory_or_the_process(tmp_path):
    folder = write_mustc(tmp_path / "MUSTC")
    index = next(folder.rglob("train.yaml"))
    bomb = "- &a0 {wav: x}\n" + "".join(f"- &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 30))
    for content, found in (
        (bomb, "expected YAML of at most 20,000,000 values, found more"),
        ("[" * 200_000, "expected YAML at most 64 deep, found more"),
        ("- &a [*a]\n", r"found a value that holds itself \(\*a\)"),
        ("- {wav: a, wav: b}\n", r"train.yaml:1: expected YAML, found the key 'wav' twice"),
        (
            "- !!python/object/apply:os.system [true]\n",
            "train.yaml:1: expected YAML, found could not determine a constructor",
        ),
    ):
        index.write_text(content)
        fails(found, "mustc", folder, tmp_path / "x")


def test_values_of_mustc_of_other_kinds(tmp_path):
    folder = write_mustc(tmp_path / "MUSTC")
    index = next(folder.rglob("train.yaml"))
    whole = index.read_text().splitlines()
    for row in (
        "- {duration: 1, offset: " + "9" * 400 + ", wav: a.wav}",
        "- {duration: [1], offset: 0, wav: a.wav}",
        "- {duration: 1, offset: 0, wav: [a.wav]}",
        "- {duration: 1, offset: 0, wav: " + "a" * 5000 + "}",
    ):
        index.write_text("\n".join([row, *whole[1:]]) + "\n")
        with pytest.raises(LeapformerError) as caught:
            prepare("mustc", folder, tmp_path / "x")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, caught.value


def test_hidden_files_are_no_corpus(tmp_path):
    folder = write_mustc(tmp_path / "MUSTC")
    (folder / "en-de" / "data" / "._train" / "txt").mkdir(parents=True)
    prepare("mustc", folder, tmp_path / "x")
    folder = write_manifests(tmp_path / "manifests")
    (folder / "._train.tsv").write_bytes(b"\0\5\x16\7")
    prepare("manifest", folder, tmp_path / "y")


def _tar(path: Path, content: bytes) -> None:
    import lzma

    path.write_bytes(lzma.compress(content))


def test_archives_that_would_take_the_memory(tmp_path):
    folder = write_stamps(tmp_path / "a")
    path = folder / "fr.tar.xz"
    sparse = tarfile.TarInfo("fr/0.ogg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410], header[483:495] = b"00000000000\0", b"00000001000\0", b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    _tar(path, bytes(header) + bytes(512 + 1024))
    fails(
        "fr.tar.xz: expected a whole tar archive, found 'fr/0.ogg', a sparse file",
        "tuxpaint",
        folder,
        tmp_path / "x",
        "fr",
        "en",
    )
    member = tarfile.TarInfo("fr/0.ogg")
    member.size = 6 << 30
    _tar(path, member.tobuf() + bytes(1024))
    fails("fr.tar.xz: expected a whole tar archive, found", "tuxpaint", folder, tmp_path / "x", "fr", "en")


def test_an_archive_that_ends_between_two_files(tmp_path):
    """tarfile takes it for a whole one, and a header it does not know for the end."""
    import lzma

    folder = write_stamps(tmp_path / "a")
    path = folder / "fr.tar.xz"
    whole = lzma.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        second = archive.getmembers()[1].offset
    for content in (whole[:second], whole[:second] + b"x" * 512 + whole[second + 512 :]):
        _tar(path, content)
        fails(
            "fr.tar.xz: expected a whole tar archive, found no end of the archive",
            "tuxpaint",
            folder,
            tmp_path / "x",
            "fr",
            "en",
        )


def test_parts_of_files_beyond_all_numbers(tmp_path):
    folder = write_manifests(tmp_path / "m")
    table_file = next(folder.glob("*train*.tsv"))
    head = table_file.read_text().splitlines()[0]
    cells = {name: "x" for name in head.split("\t")}
    for audio in (
        "a.zip:0:999999999999999",
        "a.zip:999999999999999999:1",
        "a.zip:" + "9" * 5000 + ":1",
        "b" * 5000,
        "\0",
    ):
        (folder / "a.zip").write_bytes(b"PK")
        row = {**cells, "audio": audio, "src_lang": "en", "tgt_lang": "de"}
        table_file.write_text(head + "\n" + "\t".join(row[name] for name in head.split("\t")) + "\n")
        with pytest.raises(LeapformerError) as caught:
            prepare("manifest", folder, tmp_path / "x")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, caught.value
