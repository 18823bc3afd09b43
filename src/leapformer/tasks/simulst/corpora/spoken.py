"""Speech made from text: pairs of texts, the first of each spoken by espeak-ng in many voices, with noise.

The rows of the index (see `prepared`) have voice, speed, pitch and snr (dB), and what the maker of the text knows of it
(the grammar: template, verb, object).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.files.checksums import sha256
from leapformer.files.showing import cut
from leapformer.tasks.card import SPLITS, read_card
from leapformer.tasks.files import decode_line, read_raw_lines
from leapformer.tasks.preparation import BadRows, Progress, as_json, check_general, is_there, silent
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE, resample
from leapformer.tasks.simulst.corpora import espeak
from leapformer.tasks.simulst.corpora.prepared import Utterance, draw, file_names, hold_out, write_prepared

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
SIZES = {"train": 8_000, "validation": 300, "test": 300}

_LEVELS = (0.15, 0.6)  # peak of the speech, 1 being full scale
_SILENCE = (0.05, 0.4)  # seconds before the speech
_END_SILENCE = (0.1, 0.4)
_COLOURS = (0.0, 2.0)  # power of the noise falls as 1 / f^colour: white, pink, brown
_MAX_CHARACTERS = 1_000  # of one text, more than a minute of speech


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
        sizes: sentences of each split; default: 8,000 for training, 300 each for validation and test.
        seed: of all that is drawn; the result does not depend on `workers`.
        workers: processes; default: as many as there are processors.

    Raises:
        LeapformerError: a fault of an argument, or other data in the folder.
        MissingExtra: espeakng-loader or soxr is not installed.
    """
    from leapformer.tasks.simulst.grammar.sentences import GRAMMAR, Grammar

    sizes = dict(SIZES if sizes is None else sizes)
    for split, count in sizes.items():
        if split not in SPLITS or count < 1:
            raise LeapformerError(
                f"speech-demo: sizes: expected 1 or more for {', '.join(SPLITS)}, found {split} {count}"
            )
    check_general(seed=seed, count=max(sizes.values(), default=1), workers=workers)
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
    held_out: Mapping[str, tuple[str | Path, str | Path]] | None = None,
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
        held_out: files like these of "validation" and "test"; of one that is missing: a tenth of the pairs each, at
            most 1,000, held out by a hash of the text, so that the same text is in one split alone.
        count: training pairs to take, drawn with the seed; default: all.
        speaking: the language of the source is one of its arguments.
        skip_bad: go on over lines that are empty or not UTF-8; the card lists them.

    Raises:
        LeapformerError: also: the files have not the same number of lines, or a line is bad (with file and row).
    """
    files = {"train": (source_file, target_file), **(held_out or {})}
    given = {split: (Path(pair[0]), Path(pair[1])) for split, pair in files.items()}
    check_general(seed=seed, count=count, workers=workers)
    made = {
        "source": {split: [_identity(file) for file in pair] for split, pair in given.items()},
        "count": count,
        "skip_bad": skip_bad,
    }

    def pairs(bad: BadRows) -> dict[str, list[Pair]]:
        read = {split: read_pairs(*pair, bad) for split, pair in given.items()}
        missing = [split for split in SPLITS if split not in read]
        read |= hold_out(read["train"], lambda pair: pair.text, missing, seed)
        read["train"] = draw(read["train"], count, seed)
        return {split: read[split] for split in SPLITS}

    return _prepare(
        Path(output), made, pairs, speaking or Speaking(), seed, workers, skip_bad=skip_bad, progress=progress
    )


def _identity(file: Path) -> str:
    """Name and content of a file: another content under the same name is another source."""
    try:
        if not file.is_file() and file.exists():  # a pipe would wait for ever
            raise OSError("no file")
        return f"{file.name} sha256 {sha256(file)}"
    except OSError as error:
        raise LeapformerError(f"data: cannot read {cut(file, 240)}: {error.strerror or error}") from None


def read_pairs(source_file: Path, target_file: Path, bad: BadRows) -> list[Pair]:
    """The pairs of two files, line by line.

    Raises:
        LeapformerError: the files have not the same number of lines, or a line is bad and bad ones are not skipped.
    """
    sources, targets = read_raw_lines(source_file), read_raw_lines(target_file)
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


def _checked_line(raw: bytes, where: str) -> str:
    text = decode_line(raw, where).strip()
    if not text:
        raise LeapformerError(f"data: {where}: expected text, found an empty line")
    if len(text) > _MAX_CHARACTERS:
        raise LeapformerError(f"data: {where}: expected at most {_MAX_CHARACTERS:,} characters, found {len(text):,}")
    return text


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
    """Speak all pairs of all splits."""
    speaking.check()
    made = {
        **made,
        "seed": seed,
        "speaking": as_json(asdict(speaking)),
        "maker": f"{SPEAKING}, espeak-ng {espeak.version()}",
    }
    if is_there(output, made, file_names(SPLITS)):
        return read_card(output)
    bad = BadRows(skip_bad)
    splits = {
        split: [_utterance(split, number, pair, speaking, seed) for number, pair in enumerate(pairs)]
        for split, pairs in make_pairs(bad).items()
    }
    facts = {"licence": LICENCE}
    return write_prepared(
        output, splits, render_line, made=made, facts=facts, bad=bad, workers=workers, progress=progress
    )


@dataclass(frozen=True)
class Line:
    """A text and how it is spoken."""

    text: str
    manner: Manner


def render_line(line: Line) -> np.ndarray:
    """`render` of a line."""
    return render(line.text, line.manner)


def _utterance(split: str, number: int, pair: Pair, speaking: Speaking, seed: int) -> Utterance:
    manner = draw_manner(speaking, split, number, seed)
    row = {
        "id": f"{split}-{number:06d}",
        "text": pair.text,
        "translation": pair.translation,
        "voice": manner.voice,
        "speed": manner.speed,
        "pitch": manner.pitch,
        "snr": manner.snr,
        **pair.notes,
    }
    return Utterance(row, Line(pair.text, manner))
