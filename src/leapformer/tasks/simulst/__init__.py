"""Simultaneous translation: speech in, words out while it is still being spoken.

Each module is imported on its own; the names below are fetched from theirs on first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leapformer.tasks.simulst.processor import TranslationProcessor
    from leapformer.tasks.simulst.streaming.policies import AlignAtt, LocalAgreement, WaitK
    from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
    from leapformer.tasks.simulst.streaming.translator_batch import TranslatorBatch
    from leapformer.tasks.simulst.text.words import Word

__all__ = [
    "AlignAtt",
    "LocalAgreement",
    "StreamingTranslator",
    "TranslationProcessor",
    "TranslatorBatch",
    "WaitK",
    "Word",
    "simuleval_agent_path",
]

_HOME = {
    "AlignAtt": "streaming.policies",
    "LocalAgreement": "streaming.policies",
    "WaitK": "streaming.policies",
    "TranslationProcessor": "processor",
    "StreamingTranslator": "streaming.translator",
    "TranslatorBatch": "streaming.translator_batch",
    "Word": "text.words",
}


def simuleval_agent_path() -> Path:
    """The agent file for `simuleval --agent`."""
    return Path(__file__).with_name("simuleval_agent.py")


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
