"""The kinds that a recipe can name."""

from __future__ import annotations

from leapformer.tasks.synthetic.kind import Kind, settings_of
from leapformer.tasks.synthetic.recalling import CopyAt, Recall, SelectiveCopy
from leapformer.tasks.synthetic.running import Addition, Brackets, Majority, Parity

KINDS: dict[str, type[Kind]] = {
    "recall": Recall,
    "copy-at": CopyAt,
    "selective-copy": SelectiveCopy,
    "parity": Parity,
    "addition": Addition,
    "majority": Majority,
    "brackets": Brackets,
}
# Of all kinds, each once; the section `data` of a recipe has a key for each.
SETTINGS = tuple(dict.fromkeys(name for kind in KINDS.values() for name in settings_of(kind)))
