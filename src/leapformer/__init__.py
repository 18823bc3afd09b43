"""LeaPformers: transformers with linear attention whose re-weighting is learned instead of tied to positions.

Importing this package loads nothing but itself. The names below are fetched on first use: those of `ops` and `nn`
need torch alone, those of `models` need transformers (`pip install 'leapformer[lm]'`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leapformer.errors import LeapformerError, MissingExtra

if TYPE_CHECKING:
    from leapformer.models import (
        LeapformerConfig,
        LeapformerForCausalLM,
        LeapformerForConditionalGeneration,
        LeapformerForMaskedLM,
        LeapformerForSequenceClassification,
        LeapformerModel,
        LeapformerTranslationConfig,
    )
    from leapformer.nn import LinearAttention, SoftmaxAttention, build_attention
    from leapformer.ops import (
        AttentionOutput,
        LeapWeights,
        LinearState,
        Staircase,
        leap_attention,
        linear_attention,
        linear_state,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "AttentionOutput",
    "LeapWeights",
    "LeapformerConfig",
    "LeapformerError",
    "LeapformerForCausalLM",
    "LeapformerForConditionalGeneration",
    "LeapformerForMaskedLM",
    "LeapformerForSequenceClassification",
    "LeapformerModel",
    "LeapformerTranslationConfig",
    "LinearAttention",
    "LinearState",
    "MissingExtra",
    "SoftmaxAttention",
    "Staircase",
    "__version__",
    "build_attention",
    "leap_attention",
    "linear_attention",
    "linear_state",
]

_HOME = {
    "AttentionOutput": "ops",
    "LeapWeights": "ops",
    "LinearState": "ops",
    "Staircase": "ops",
    "leap_attention": "ops",
    "linear_attention": "ops",
    "linear_state": "ops",
    "LinearAttention": "nn",
    "SoftmaxAttention": "nn",
    "build_attention": "nn",
    "LeapformerConfig": "models",
    "LeapformerForCausalLM": "models",
    "LeapformerForConditionalGeneration": "models",
    "LeapformerForMaskedLM": "models",
    "LeapformerForSequenceClassification": "models",
    "LeapformerModel": "models",
    "LeapformerTranslationConfig": "models",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from its subpackage on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
