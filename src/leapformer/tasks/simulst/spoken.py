"""Data sets of spoken sentences: pairs of texts, the first of each spoken by espeak-ng in many voices, with noise.

A folder holds, for each split,

SPLIT.int16   the samples of all utterances one after another: int16, little-endian, mono, 16,000 Hz
SPLIT.jsonl   one row each: id, text, translation, start and samples (where it is in the file), voice, speed, pitch, snr
              (dB), and what the maker of the text knows of it (the grammar: template, verb, object)

and card.json, which is written last. The samples are not compressed: training reads them again in every epoch, at random
places and through a memory map, while both processors are busy with the model; FLAC would save about 40 % of the disk.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leapformer import __version__
from leapformer.errors import LeapformerError
from leapformer.tasks.files import _decompress, parse_json_row, read_lines
from leapformer.tasks.lra.card import CARD, FORMAT, SPLITS, read_card
from leapformer.tasks.lra.preparation import (
    PARTS,
    BadRows,
    Job,
    Progress,
    make_shards,
    parts_key,
    silent,
)
from leapformer.tasks.lra.storage import SplitWriter, read_arrays
from leapformer.tasks.simulst import espeak
from leapformer.tasks.simulst.audio import SAMPLE_RATE, resample
from leapformer.training.saving import write_json, write_text

SPEAKING = "spoken 1"  # a change of the audio needs a new version
LICENCE = (
    "The audio was spoken by espeak-ng (GPL-3), an optional program, which this folder does not contain; "
    "the texts have the licence of their source."
)

# Test and validation have timbres of their own, which training never hears, in the same accents.
ACCENTS = {"en": ("en-us", "en", "en-gb-scotland", "en-gb-x-rp")}
TIMBRES = {
    "train": (
        "m1 m2 m3 m4 m6 m8 f1 f2 f4 Andy Denis Gene Hugo Lee Mike adam anika belinda ed linda paul robert steph zac"
    ).split(),
    "validation": "m7 f3 max".split(),
    "test": "m5 f5 Annie david".split(),
}
SPEEDS = (150, 190)  # words a minute
PITCHES = (35, 65)
SNR = (15.0, 40.0)  # dB
SIZES = {"train": 4_000, "validation": 300, "test": 300}

_SHARD = 100  # utterances: a few seconds of work
_LEVELS = (0.15, 0.6)  # peak of the speech, 1 being full scale
_SILENCE = (0.05, 0.4)  # seconds before the speech
_END_SILENCE = (0.1, 0.4)
_COLOURS = (0.0, 2.0)  # power of the noise falls as 1 / f^colour: white, pink, brown
_MAX_CHARACTERS = 1_000  # of one text, more than a minute of speech
_HELD_OUT = 1_000  # pairs for validation and for the test, where they have no files of their own: at most so many
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Pair:
    """A text, its translation, and what is known of it besides."""

    text: str
    translation: str
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Speaking:
    """How sentences are spoken.

    Arguments:
        language: of the text, as espeak-ng calls it; "en" is spoken in four accents.
        speeds: range of words a minute.
        snr: range of the ratio of speech to noise in dB.
    """

    language: str = "en"
    speeds: tuple[int, int] = SPEEDS
    snr: tuple[float, float] = SNR

    def check(self) -> None:
        """Raises LeapformerError where a range or the language is none."""
        low, high = self.speeds
        if not espeak.SPEEDS[0] <= low <= high <= espeak.SPEEDS[1]:
            raise LeapformerError(f"--speeds: expected 80 <= slowest <= fastest <= 450, found {low} and {high}")
        if not -20 <= self.snr[0] <= self.snr[1] <= 100:
            raise LeapformerError(f"--snr: expected -20 <= lowest <= highest <= 100 dB, found {self.snr}")
        known = espeak.voices()
        if self.language not in known:
            raise LeapformerError(
                f"--language: expected one of espeak-ng's ({', '.join(known)}), found {self.language}"
            )

    def voices(self, split: str) -> list[str]:
        """The voices of a split."""
        accents = ACCENTS.get(self.language, (self.language,))
        return [f"{accent}+{timbre}" for accent in accents for timbre in TIMBRES[split]]


@dataclass(frozen=True)
class Manner:
    """How one sentence is spoken; all of it is drawn from the seed, the split and the sentence's number.

    Arguments:
        voice, speed, pitch: see `espeak.speak`.
        snr: dB, of the speech between its first and last sound.
        colour, level, before, after: see the ranges above.
        noise_seed: of the noise.
    """

    voice: str
    speed: int
    pitch: int
    snr: float
    colour: float
    level: float
    before: float
    after: float
    noise_seed: int


def draw_manner(speaking: Speaking, split: str, number: int, seed: int) -> Manner:
    """How the sentence of this number is spoken."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), number)))
    voices = speaking.voices(split)
    return Manner(
        voice=voices[rng.integers(len(voices))],
        speed=int(rng.integers(speaking.speeds[0], speaking.speeds[1] + 1)),
        pitch=int(rng.integers(PITCHES[0], PITCHES[1] + 1)),
        snr=round(float(rng.uniform(*speaking.snr)), 1),
        colour=float(rng.uniform(*_COLOURS)),
        level=float(rng.uniform(*_LEVELS)),
        before=float(rng.uniform(*_SILENCE)),
        after=float(rng.uniform(*_END_SILENCE)),
        noise_seed=int(rng.integers(2**32)),
    )


def render(text: str, manner: Manner) -> np.ndarray:
    """The sentence as it would be recorded: int16 [N] at 16,000 Hz."""
    spoken = espeak.speak(text, voice=manner.voice, speed=manner.speed, pitch=manner.pitch)
    speech = resample(spoken.astype(np.float32) / 32768, espeak.SAMPLE_RATE, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(speech) > 1e-3)
    speech = speech[loud[0] : loud[-1] + 1]
    speech = speech * (manner.level / np.abs(speech).max())
    sides = (round(manner.before * SAMPLE_RATE), round(manner.after * SAMPLE_RATE))
    noise = coloured_noise(len(speech) + sum(sides), manner.colour, manner.noise_seed)
    loudness = np.sqrt(np.mean(np.square(speech, dtype=np.float64)))
    samples = np.pad(speech, sides) + noise * (loudness * 10 ** (-manner.snr / 20))
    return np.clip(np.round(samples * 32767), -32768, 32767).astype(np.int16)


def coloured_noise(samples: int, colour: float, seed: int) -> np.ndarray:
    """Noise of mean power 1 that falls as 1 / f^colour from 50 Hz on: float64 [samples]."""
    white = np.random.default_rng(seed).standard_normal(samples)
    spectrum = np.fft.rfft(white)
    frequencies = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), 50.0)
    noise = np.fft.irfft(spectrum * frequencies ** (-colour / 2), samples)
    return noise / np.sqrt(np.mean(noise**2))


# ---- reading


class SpokenSplit(Sequence[dict[str, Any]]):
    """The utterances of one split, as rows of its index with "audio": int16 [N] at 16,000 Hz, a read-only memory map.

    Arguments:
        folder: of prepared data.
        split: "train", "validation" or "test".

    Raises:
        LeapformerError: the folder is not complete, has no such split, or its files do not fit each other.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        folder = Path(folder)
        self.card = read_card(folder)
        if split not in self.card["splits"]:
            raise LeapformerError(f"{folder}: expected the split {split}, found {', '.join(self.card['splits'])}")
        index, audio = _split_files(folder, split)
        self.rows = [parse_json_row(line, where) for line, where in read_lines(index)]
        if not audio.is_file():
            raise LeapformerError(f"{audio}: expected prepared audio, found no such file")
        samples = sum(row["samples"] for row in self.rows)
        if audio.stat().st_size != 2 * samples:
            raise LeapformerError(
                f"{audio}: expected {2 * samples:,} bytes by {index.name}, found {audio.stat().st_size:,}"
            )
        self._audio = np.memmap(audio, dtype="<i2", mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        row = self.rows[number]
        return {**row, "audio": self._audio[row["start"] : row["start"] + row["samples"]]}


def _split_files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}.jsonl", folder / f"{split}.int16"


# ---- preparing


def prepare_grammar(
    output: str | Path,
    *,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    speaking: Speaking | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Speak sentences of the built-in grammar, and return the card of the folder.

    Arguments:
        output: the folder to fill; what is complete there and was made the same way is left as it is.
        sizes: sentences of each split; default: 4,000 for training, 300 each for validation and test.
        seed: of all that is drawn; the result does not depend on `workers`.
        workers: processes; default: as many as there are processors.

    Raises:
        LeapformerError: a fault of an argument, or other data in the folder.
        MissingExtra: espeakng-loader or soxr is not installed.
    """
    from leapformer.tasks.simulst.grammar import GRAMMAR, Grammar

    sizes = dict(SIZES if sizes is None else sizes)
    for split, count in sizes.items():
        if split not in SPLITS or count < 1:
            raise LeapformerError(
                f"speech-demo: sizes: expected 1 or more for {', '.join(SPLITS)}, found {split} {count}"
            )
    made = {"source": GRAMMAR, "sizes": sizes}

    def pairs(_: BadRows) -> dict[str, list[Pair]]:
        grammar = Grammar(seed)
        return {
            split: [
                Pair(each.english, each.german, {"template": each.template, "verb": each.verb, "object": each.object})
                for each in grammar.sentences(split, count, seed=seed)
            ]
            for split, count in sizes.items()
        }

    return _prepare(Path(output), made, pairs, speaking or Speaking(), seed, workers, skip_bad=False, progress=progress)


def prepare_text_pairs(
    source_file: str | Path,
    target_file: str | Path,
    output: str | Path,
    *,
    validation: tuple[str | Path, str | Path] | None = None,
    test: tuple[str | Path, str | Path] | None = None,
    count: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    speaking: Speaking | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Speak the lines of a text whose translations are the lines of another, and return the card of the folder.

    Arguments:
        source_file, target_file: as many lines in both, UTF-8, also .gz, .xz or .zst.
        output: as in `prepare_grammar`; so are seed, workers and what is raised.
        validation, test: files like these; default: a tenth of the pairs each, at most 1,000, held out by a hash of the
            text, so that the same text is in one split alone.
        count: training pairs to take, drawn with the seed; default: all.
        speaking: the language of the source is one of its arguments.
        skip_bad: go on over lines that are empty or not UTF-8; the card lists them.

    Raises:
        LeapformerError: also: the files have not the same number of lines, or a line is bad (with file and row).
    """
    files = {"train": (source_file, target_file), "validation": validation, "test": test}
    given = {split: (Path(pair[0]), Path(pair[1])) for split, pair in files.items() if pair is not None}
    if count is not None and count < 1:
        raise LeapformerError(f"--count: expected 1 or more, found {count}")
    made = {
        "source": {split: [_identity(file) for file in pair] for split, pair in given.items()},
        "count": count,
        "skip_bad": skip_bad,
    }

    def pairs(bad: BadRows) -> dict[str, list[Pair]]:
        read = {split: read_pairs(*pair, bad) for split, pair in given.items()}
        read = _hold_out(read, seed)
        if count is not None and count < len(read["train"]):
            chosen = np.random.default_rng(seed).permutation(len(read["train"]))[:count]
            read["train"] = [read["train"][number] for number in np.sort(chosen)]
        return read

    return _prepare(
        Path(output), made, pairs, speaking or Speaking(), seed, workers, skip_bad=skip_bad, progress=progress
    )


def _identity(file: Path) -> str:
    """Name and content of a file: another content under the same name is another source."""
    try:
        return f"{file.name} sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    except OSError as error:
        raise LeapformerError(f"data: cannot read {file}: {error.strerror or error}") from None


def read_pairs(source_file: Path, target_file: Path, bad: BadRows) -> list[Pair]:
    """The pairs of two files, line by line.

    Raises:
        LeapformerError: the files have not the same number of lines, or a line is bad and bad ones are not skipped.
    """
    sources, targets = _read_raw_lines(source_file), _read_raw_lines(target_file)
    if len(sources) != len(targets):
        raise LeapformerError(
            f"data: {source_file} and {target_file}: expected as many lines in both, "
            f"found {len(sources):,} and {len(targets):,}"
        )
    pairs = []
    for row, (source, target) in enumerate(zip(sources, targets, strict=True), start=1):
        with bad.guard():
            text = _checked_line(source, f"{source_file}:{row}")
            if not any(character.isalnum() for character in text):
                raise LeapformerError(f"data: {source_file}:{row}: expected words to speak, found {text[:40]!r}")
            pairs.append(Pair(text, _checked_line(target, f"{target_file}:{row}"), {}))
    if not pairs:
        raise LeapformerError(f"data: {source_file}: expected lines of text, found no good one")
    return pairs


def _read_raw_lines(path: Path) -> list[bytes]:
    """The lines of a file before they are decoded, so that a bad byte has a row."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise LeapformerError(f"data: cannot read {path}: {error.strerror or error}") from None
    try:
        lines = _decompress(path, raw).split(b"\n")
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise LeapformerError(f"data: {path} is not a whole {path.suffix} file: {error}") from None
    return lines if lines[-1] else lines[:-1]


def _checked_line(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise LeapformerError(
            f"data: {where}: expected UTF-8, found byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None
    if not text:
        raise LeapformerError(f"data: {where}: expected text, found an empty line")
    if "\0" in text:
        raise LeapformerError(f"data: {where}: expected text, found a zero byte")
    if len(text) > _MAX_CHARACTERS:
        raise LeapformerError(f"data: {where}: expected at most {_MAX_CHARACTERS:,} characters, found {len(text):,}")
    return text


def _hold_out(read: dict[str, list[Pair]], seed: int) -> dict[str, list[Pair]]:
    """Fill the splits that have no files with pairs of the training files; the same text goes the same way."""
    missing = [split for split in SPLITS if split not in read]
    texts = sorted({pair.text for pair in read["train"]}, key=lambda text: _hash_of(seed, text))
    share = min(_HELD_OUT, max(1, round(len(texts) * _HELD_OUT_SHARE)))
    if missing and len(texts) <= len(missing) * share:
        raise LeapformerError(f"data: expected more than {len(missing)} texts to hold some out, found {len(texts)}")
    split_of = {text: split for place, split in enumerate(missing) for text in texts[place * share :][:share]}
    parts: dict[str, list[Pair]] = {split: [] for split in ("train", *missing)}
    for pair in read["train"]:
        parts[split_of.get(pair.text, "train")].append(pair)
    return {split: parts.get(split) or read[split] for split in SPLITS}


def _hash_of(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}|{text}".encode()).digest()


def _prepare(
    output: Path,
    made: Mapping[str, Any],
    make_pairs: Any,
    speaking: Speaking,
    seed: int,
    workers: int | None,
    *,
    skip_bad: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Speak all pairs, shard by shard in processes, put the shards together, and write the card last."""
    speaking.check()
    made = {
        **made,
        "seed": seed,
        "speaking": _plain(asdict(speaking)),
        "maker": f"{SPEAKING}, espeak-ng {espeak.version()}",
    }
    if _is_there(output, made):
        return read_card(output)
    bad = BadRows(skip_bad)
    pairs = make_pairs(bad)
    parts = output / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    job = Job(output, None, seed, workers or _processors(), None, {}, bad, progress)
    shards = {split: _shards(parts, split, pairs[split], speaking, seed, made["maker"]) for split in pairs}
    calls = [call for split_shards in shards.values() for call in split_shards]
    make_shards(make_shard, [path for path, *_ in calls], [tuple(rest) for _, *rest in calls], job)
    splits = {split: _put_together(parts, split, shards[split], pairs[split]) for split in pairs}
    for split in splits:
        for file in _split_files(parts, split):
            os.replace(file, output / file.name)
    card = {
        "format": FORMAT,
        "task": "spoken",
        "made": made,
        "leapformer": __version__,
        "sample_rate": SAMPLE_RATE,
        "licence": LICENCE,
        "splits": splits,
        "bad_rows": bad.found,
    }
    write_json(output / CARD, card)
    shutil.rmtree(parts)
    return card


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that it can be compared with what a card says."""
    return json.loads(json.dumps(value))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_there(output: Path, made: Mapping[str, Any]) -> bool:
    """Whether the folder is complete already.

    Raises:
        LeapformerError: it holds data that were made otherwise, or files that are not ours.
    """
    if output.exists() and not output.is_dir():
        raise LeapformerError(f"--output {output}: expected a folder, found a file")
    if (output / CARD).is_file():
        found = read_card(output).get("made", {})
        for key, value in made.items():
            if found.get(key) != _plain(value):
                raise LeapformerError(
                    f"--output {output}: holds data with {key} {found.get(key)}, expected {value}; choose another --output"
                )
        return True
    ours = {PARTS, *(file.name for split in SPLITS for file in _split_files(output, split))}
    others = [file.name for file in output.iterdir() if file.name not in ours] if output.is_dir() else []
    if others:
        raise LeapformerError(
            f"--output {output}: expected an empty folder, found {min(others)}; choose another --output"
        )
    return False


Shard = tuple[Path, list[str], list[Manner]]


def _shards(parts: Path, split: str, pairs: Sequence[Pair], speaking: Speaking, seed: int, maker: str) -> list[Shard]:
    """Path, texts and manners of each shard; the path names all that the audio depends on."""
    shards = []
    for first in range(0, len(pairs), _SHARD):
        texts = [pair.text for pair in pairs[first : first + _SHARD]]
        manners = [draw_manner(speaking, split, first + number, seed) for number in range(len(texts))]
        key = parts_key(maker, texts, [asdict(manner) for manner in manners])
        shards.append((parts / f"{split}-{first // _SHARD:05d}-{key}.safetensors", texts, manners))
    return shards


def make_shard(path: Path, texts: Sequence[str], manners: Sequence[Manner]) -> None:
    """Write the audio of these texts, as the documents of a shard, byte by byte."""
    with SplitWriter(path) as writer:
        for text, manner in zip(texts, manners, strict=True):
            writer.add(render(text, manner).astype("<i2").tobytes(), 0)


def _put_together(parts: Path, split: str, shards: Sequence[Shard], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Audio file and index of a split, and what the card says of them."""
    index, audio = _split_files(parts, split)
    rows, start, digest = [], 0, hashlib.sha256()
    with audio.open("wb") as file:
        for path, _, manners in shards:
            arrays = read_arrays(path)
            content = arrays["tokens"].tobytes()
            file.write(content)
            digest.update(content)
            for size, manner in zip(np.diff(arrays["offsets"]) // 2, manners, strict=True):
                rows.append(_row(split, len(rows), pairs[len(rows)], manner, start, int(size)))
                start += int(size)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(index, text)
    return {
        "utterances": len(rows),
        "seconds": round(start / SAMPLE_RATE, 1),
        "bytes": 2 * start,
        "voices": sorted({row["voice"] for row in rows}),
        "sha256": {audio.name: digest.hexdigest(), index.name: hashlib.sha256(text.encode()).hexdigest()},
    }


def _row(split: str, number: int, pair: Pair, manner: Manner, start: int, samples: int) -> dict[str, Any]:
    return {
        "id": f"{split}-{number:06d}",
        "text": pair.text,
        "translation": pair.translation,
        "start": start,
        "samples": samples,
        "voice": manner.voice,
        "speed": manner.speed,
        "pitch": manner.pitch,
        "snr": manner.snr,
        **pair.notes,
    }
