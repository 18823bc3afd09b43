"""card.json: what a folder of prepared data holds, and what made it.

This module, like all that a generator's processes load, does without torch, which would be most of their start.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.reading import read_json
from leapformer.files.showing import cut, shown

SPLITS = ("train", "validation", "test")
CARD = "card.json"
FORMAT = 1


def read_card(folder: Path) -> dict[str, Any]:
    """What card.json of a prepared folder says; every key that is read later has its type and range.

    Raises:
        LeapformerError: there is none, another version of leapformer wrote it in another format, or it says what no
            preparation does.
    """
    path = folder / CARD
    if not os.path.isfile(path):
        raise LeapformerError(
            f"{cut(folder, 240)}: expected prepared data, found no {CARD} in it (see leapformer data prepare --help)"
        )
    card = read_json(path)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise LeapformerError(f"{path}: expected format {FORMAT}; prepare the data again")
    _check(card, path)
    return card


def _check(card: dict[str, Any], path: Path) -> None:
    from pydantic import ValidationError

    spoken, classified = _types()
    try:
        (spoken if card.get("task") == "spoken" else classified).model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        key = cut(".".join(map(str, first["loc"])))
        found = "nothing" if first["type"] == "missing" else shown(first["input"])
        raise LeapformerError(
            f"{path}: {key}: {cut(first['msg'][:1].lower() + first['msg'][1:], 160)}, found {found}"
        ) from None


@cache
def _types() -> tuple[Any, Any]:
    """The layouts of speech with translations, and of the tasks of Long-Range Arena."""
    from typing import Annotated, Literal

    from pydantic import BaseModel, ConfigDict, Field, create_model

    make: Any = create_model  # whose overloads know no fields by name

    class Strict(BaseModel):
        model_config = ConfigDict(strict=True, extra="allow")

    def layout(name: str, **fields: Any) -> Any:
        return make(name, __base__=Strict, **{key: (kind, ...) for key, kind in fields.items()})

    count = Annotated[int, Field(ge=0, lt=2**48)]
    size = Annotated[int, Field(ge=1, lt=2**31)]
    both = {"made": dict[str, Any], "bad_rows": list[str]}
    utterances = layout(
        "Utterances", utterances=count, seconds=float, bytes=count, speakers=count, sha256=dict[str, str]
    )
    examples = layout(
        "Examples", examples=count, shortest=count, longest=count, mean_length=float, bytes=count, sha256=str
    )
    spoken = layout("SpokenCard", sample_rate=Literal[16_000], licence=str, splits=dict[str, utterances], **both)
    classified = layout(
        "ClassifiedCard",
        task=Literal["listops", "text", "retrieval", "image", "pathfinder"],
        vocab_size=Annotated[int, Field(ge=1, le=257)],
        num_classes=Annotated[int, Field(ge=1, le=256)],
        max_length=size,
        pad_id=Literal[0] | None,
        shift=Literal[0, 1],
        two_documents=bool,
        symbols=list[str],
        splits=dict[str, examples],
        **both,
    )
    return spoken, classified
