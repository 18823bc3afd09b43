"""The log of an evaluation, one sentence a row, and its scores.

The layout is that of SimulEval 1.1.4's `instances.log` with words as the unit of latency, so that SimulEval
(`--score-only`) and OmniSTEval (`shortform --word_level`) read what is written here, and the other way round. A row is
a JSON object:

index              int, the sentence's number
prediction         str, its words with single spaces between
delays             [number], one a word: source read when it was written, in ms (speech) or words (text)
elapsed            [number], one a word: the same plus the computation up to there, in ms; [] if not measured
prediction_length  int, number of words
reference          str
source             [str], lines that describe the audio, its path first; or str, the source text
source_length      number, of the whole source in the unit of the delays
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.showing import cut, shown
from leapformer.files.writing import json_text, staged_file
from leapformer.tasks.files import read_json_rows
from leapformer.tasks.simulst.scoring.latency import Emissions, corpus_latency, mean, reference_words

LOG_NAME = "instances.log"

_LARGEST = 1e15  # a number of a log: beyond it sums lose their milliseconds
_FIELDS = ("index", "prediction", "delays", "elapsed", "reference", "source", "source_length")


@dataclass(frozen=True)
class Instance:
    """One translated sentence; the fields as above.

    Raises:
        ValueError: a type is wrong, a number is not finite or negative, or delays or times are not one a word.
    """

    index: int
    prediction: str
    delays: Sequence[float]
    elapsed: Sequence[float]
    reference: str
    source: Sequence[str] | str
    source_length: float

    def __post_init__(self) -> None:
        for name in ("prediction", "reference"):
            _expect(isinstance(getattr(self, name), str), name, "text", getattr(self, name))
        _expect(_is_whole(self.index), "index", "an integer from 0 on", self.index)
        _expect(_is_number(self.source_length), "source_length", "a finite number from 0 on", self.source_length)
        is_text = isinstance(self.source, str)
        is_lines = isinstance(self.source, list | tuple) and all(isinstance(line, str) for line in self.source)
        _expect(is_text or is_lines, "source", "text or a list of texts", self.source)
        for name in ("delays", "elapsed"):
            values = getattr(self, name)
            is_numbers = isinstance(values, list | tuple) and all(map(_is_number, values))
            _expect(is_numbers, name, "a list of finite numbers from 0 on", values)
        words = len(self.prediction.split())
        if len(self.delays) != words:
            raise ValueError(f"delays: expected {words}, one a word of the prediction, found {len(self.delays)}")
        if len(self.elapsed) not in (0, words):
            raise ValueError(f"elapsed: expected {words}, one a word of the prediction, found {len(self.elapsed)}")

    @property
    def prediction_length(self) -> int:
        return len(self.delays)

    def as_row(self) -> dict[str, Any]:
        """The JSON object, keys in SimulEval's order."""
        return {
            "index": self.index,
            "prediction": self.prediction,
            "delays": list(self.delays),
            "elapsed": list(self.elapsed),
            "prediction_length": self.prediction_length,
            "reference": self.reference,
            "source": self.source if isinstance(self.source, str) else list(self.source),
            "source_length": self.source_length,
        }


def write_instances(path: str | Path, instances: Iterable[Instance]) -> None:
    """Write a log; it gets its name only when it is whole."""
    with staged_file(path) as file:
        for instance in instances:
            file.write((json_text(instance.as_row()) + "\n").encode())


def read_instances(path: str | Path) -> list[Instance]:
    """Read a log, ours or SimulEval's, in the order of its rows; other keys than the above are passed over.

    Raises:
        LeapformerError: the file is missing or empty, or a row is not of this layout or repeats an index.
    """
    instances: dict[int, Instance] = {}
    for row, where in read_json_rows(Path(path)):
        missing = [name for name in _FIELDS if name not in row]
        if missing:
            raise LeapformerError(
                f"{where}: expected the key {missing[0]!r}, found {cut(', '.join(sorted(row))) or 'none'}"
            )
        try:
            instance = Instance(**{name: row[name] for name in _FIELDS})
        except ValueError as error:
            raise LeapformerError(f"{where}: {error}") from None
        if instance.index in instances:
            raise LeapformerError(f"{where}: expected each index once, found {instance.index} again")
        instances[instance.index] = instance
    if not instances:
        raise LeapformerError(f"{path}: expected at least one row, found none")
    return list(instances.values())


def score(instances: Sequence[Instance], *, bleu_tokenize: str = "13a") -> dict[str, float]:
    """Quality and latency of a corpus.

    Arguments:
        instances: all sentences, also those of which nothing was written: they count for quality, not for latency.
        bleu_tokenize: sacrebleu's name of a tokenizer.

    Returns:
        `BLEU` and `chrF` (0 to 100, sacrebleu's defaults, Post 2018); `AL`, `LAAL`, `DAL` and `StartOffset` (when the
        first word comes) in the unit of the delays; `AP`. All but the first two also from `elapsed`, named with `_CA`,
        where every sentence has its times, none below its delay (SimulEval writes 0 for text sources).

    Raises:
        ValueError: there are no instances.
        MissingExtra: sacrebleu is not installed.
    """
    if not instances:
        raise ValueError("instances: expected at least one, got none")
    scores = _quality(instances, bleu_tokenize) | _latency(instances, computation_aware=False)
    if all(map(_has_times, instances)):
        scores |= {f"{name}_CA": value for name, value in _latency(instances, computation_aware=True).items()}
    return scores


def _quality(instances: Sequence[Instance], tokenize: str) -> dict[str, float]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise MissingExtra("speech", package="sacrebleu", purpose="BLEU and chrF") from None
    predictions = [instance.prediction for instance in instances]
    references = [[instance.reference for instance in instances]]
    return {
        "BLEU": BLEU(tokenize=tokenize).corpus_score(predictions, references).score,
        "chrF": CHRF().corpus_score(predictions, references).score,
    }


def _latency(instances: Sequence[Instance], *, computation_aware: bool) -> dict[str, float]:
    sentences = [
        Emissions(
            instance.elapsed if computation_aware else instance.delays,
            instance.source_length,
            reference_words(instance.reference),
        )
        for instance in instances
    ]
    first = [sentence.delays[0] for sentence in sentences if sentence.delays]
    return {**corpus_latency(sentences), "StartOffset": mean(first)}


def _has_times(instance: Instance) -> bool:
    if len(instance.elapsed) != len(instance.delays):
        return False
    return all(time >= delay for time, delay in zip(instance.elapsed, instance.delays, strict=True))


def _expect(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, found {shown(found)}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LARGEST
