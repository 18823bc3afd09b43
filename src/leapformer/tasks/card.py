"""card.json: what a folder of prepared data holds, and what made it.

This module, like all that a generator's processes load, does without torch, which would be most of their start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError

SPLITS = ("train", "validation", "test")
CARD = "card.json"
FORMAT = 1


def read_card(folder: Path) -> dict[str, Any]:
    """What card.json of a prepared folder says.

    Raises:
        LeapformerError: there is none, or another version of leapformer wrote it in another format.
    """
    path = folder / CARD
    if not path.is_file():
        raise LeapformerError(
            f"{folder}: expected prepared data, found no {CARD} in it (see leapformer data prepare --help)"
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise LeapformerError(f"{path}: expected JSON, found {error}") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise LeapformerError(f"{path}: expected format {FORMAT}; prepare the data again")
    return card
