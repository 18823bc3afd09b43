"""Typed views of what a run writes about itself: results.json, the rows of metrics.jsonl, and progress.json.

A file may be of an older version, so keys may be missing and further ones there; what is there has the types and ranges
below, on which tables and pictures rely. NaN and infinity, which older versions wrote, are None.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leapformer.errors import LeapformerError
from leapformer.files.reading import LARGEST, parse_json, read_json_object, read_text
from leapformer.files.showing import cut, shown

MOST = 10**15  # of what is counted
Count = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Whole = Annotated[int, Field(strict=True, ge=-MOST, le=MOST)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e100, le=1e100)]
Number = Whole | Real
Positive = Annotated[int, Field(strict=True, gt=0, le=MOST)] | Annotated[float, Field(strict=True, gt=0, le=1e100)]
NotNegative = Count | Annotated[float, Field(strict=True, ge=0, le=1e100)]
Share = Annotated[float | int, Field(ge=0, le=1)]
Text = Annotated[str, Field(strict=True, max_length=300, pattern=r"^[^\x00-\x1f\x7f]*$")]
K = Annotated[int, Field(strict=True, ge=1, le=MOST)]


class Record(BaseModel):
    """Keys that it doesn't know are kept."""

    model_config = ConfigDict(extra="allow")


class Figures(Record):
    """Keys that it doesn't know are numbers."""

    __pydantic_extra__: dict[str, Number | None]  # type: ignore[reportIncompatibleVariableOverride]


class SplitRecord(Figures):
    """Figures of one split of the data; those without a line here are numbers too."""

    loss: Number | None = None
    perplexity: Positive | None = None
    word_perplexity: Positive | None = None
    bits_per_byte: Number | None = None
    accuracy: Share | None = None
    majority_accuracy: Share | None = None
    root_operator_accuracy: Share | None = None
    examples: K | None = None
    words: Count | None = None
    bytes: Count | None = None
    k: K | None = None


class CurvePoint(Figures):
    """Scores of a translation model at one k of wait-k, or with the whole source read first (None)."""

    k: K | None
    sentences: Count | None = None
    BLEU: Number | None = None


class PolicyPoint(Figures):
    """Scores at one value of a policy's option."""


class PolicyCurve(Record):
    """Scores of a policy other than wait-k at each value of its option, which is "" where it has none."""

    label: Text
    option: Text
    points: list[PolicyPoint]


class PositionRecord(Record):
    """Perplexity of the tokens with a past of `start` to `end` tokens."""

    start: Count
    end: K
    tokens: Positive
    perplexity: Positive | None


class ResultsRecord(Record):
    """results.json."""

    splits: dict[Text, SplitRecord]
    curves: dict[Text, list[CurvePoint]] = Field(default_factory=dict)
    policy_curves: dict[Text, list[PolicyCurve]] = Field(default_factory=dict)
    name: Text | None = None
    task: Text | None = None
    recipe: Text | None = None
    recipe_fingerprint: Text | None = None
    attention: Text | list[Text] = ""
    variant: Text | None = None
    conv_width: Count | None = None
    source: Text | None = None
    context: Text | Whole | list[Text | Whole] | None = None
    seed: Whole | None = None
    parameters: Count = 0
    parameters_leap: Count = 0
    steps: Count | None = None
    tokens: Count | None = None
    examples: Count | None = None
    seconds: NotNegative | None = None
    tokens_per_second: NotNegative | None = None
    examples_per_second: NotNegative | None = None
    inference_examples_per_second: NotNegative | None = None
    state_bytes: Count | None = None
    peak_memory_mib: NotNegative | None = None
    impl: Text | None = None
    perplexity_by_position: list[PositionRecord] | None = None
    baselines: dict[Text, Positive | None] | None = None
    machine: dict[Text, Text | Number | None] | None = None
    versions: dict[Text, Text | None] | None = None
    git: Text | None = None


class EventRecord(Record):
    """A row of metrics.jsonl: what was logged after a step."""

    __pydantic_extra__: dict[str, bool | Number | Text | None]  # type: ignore[reportIncompatibleVariableOverride]
    step: Count


class ProgressRecord(Record):
    """progress.json of a checkpoint: what it says beside what the Trainer keeps.

    Attributes:
        targets: tokens or examples so far.
        seconds: of training steps.
        loss_sum, loss_steps: the losses since the last logged row, and of how many steps; None in older checkpoints.
    """

    targets: Count
    seconds: NotNegative
    loss_sum: Number | None = None
    loss_steps: Count | None = None


Kind = TypeVar("Kind", bound=BaseModel)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a results.json.

    Raises:
        LeapformerError: it can't be read, or is none.
    """
    content = read_json_object(path, numbers="null")
    check(ResultsRecord, content, where=cut(os.fspath(path), 240))
    return content


def read_events(path: str | os.PathLike[str], *, largest: int = 16 * LARGEST) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; none where there is no such file. A row that is damaged, or cut off by a
    crash, is left out, and it alone.

    Raises:
        LeapformerError: the file can't be read.
    """
    if not os.path.lexists(path):
        return []
    # Bytes that are no text spoil their own row: they are no JSON outside of strings, and are refused inside.
    rows = read_text(path, largest=largest, errors="surrogateescape").split("\n")
    return [event for event in map(parse_event, rows) if event is not None]


def last_event(path: str | os.PathLike[str], *, tail: int = 16_384) -> dict[str, Any] | None:
    """The last whole row of a metrics.jsonl that may be in the middle of being written; None where there is none.

    Arguments:
        tail: only so many bytes at its end are looked at.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            rows = file.read(tail).decode("utf-8", "surrogateescape").split("\n")
    except OSError:
        return None
    return next((event for row in reversed(rows) if (event := parse_event(row)) is not None), None)


def parse_event(row: str) -> dict[str, Any] | None:
    """The event in a row of metrics.jsonl; None where the row is damaged."""
    try:
        event = parse_json(row, where="row", numbers="null")
        check(EventRecord, event, where="row")
    except LeapformerError:
        return None
    return event


def read_progress(path: str | os.PathLike[str]) -> ProgressRecord:
    """The content of a progress.json.

    Raises:
        LeapformerError: it can't be read, or is none.
    """
    return check(ProgressRecord, read_json_object(path), where=cut(os.fspath(path), 240))


def check(kind: type[Kind], content: Any, *, where: str) -> Kind:
    """Content as one of the kinds above.

    Raises:
        LeapformerError: names the first key with a wrong value, in one line.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise LeapformerError(f"{where}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """The first of the faults that pydantic found, with its key: "seed: expected a valid integer, found 'x'"."""
    faults = error.errors(include_url=False, include_context=False)
    place = _place(faults[0]["loc"])
    key = cut(".".join(place), 120)
    if faults[0]["type"] == "missing":
        return f"expected the key {key}, found none"
    # The branches of a union are told as one.
    branches = dict.fromkeys(expected(fault) for fault in faults if _place(fault["loc"]) == place)
    return f"{key + ': ' if key else ''}expected {' or '.join(branches)}, found {shown(faults[0]['input'])}"


def expected(fault: Mapping[str, Any]) -> str:
    """What pydantic expected where it found a fault."""
    return cut(fault["msg"].removeprefix("Input should be ").replace("String should", "text that should"), 160)


def _place(parts: Sequence[Any]) -> list[str]:
    """The keys on the way to a fault; pydantic adds the branches of unions, which no file has."""
    return [str(part) for part in parts if not (isinstance(part, str) and _BRANCH.fullmatch(part))]


_BRANCH = re.compile(r"(constrained|function|nullable)-.*|int|float|str|bool|none|(list|dict|tuple|literal)\[.*\]")


def without_unknown(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those of some figures that are known, so not None."""
    return {key: value for key, value in (values or {}).items() if value is not None}
