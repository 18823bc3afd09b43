"""Tiny translation models for the tests."""

from __future__ import annotations

import torch

from leapformer.models.translation import LeapformerForConditionalGeneration
from leapformer.models.translation_configuration import LeapformerTranslationConfig

FEATURES, CHUNK, VOCABULARY = 6, 3, 23
TINY = {
    "num_features": FEATURES, "conv_channels": 3, "pre_decision": CHUNK, "vocab_size": VOCABULARY, "hidden_size": 16,
    "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_dropout": 0.0,
    "initializer_range": 0.3, "leap_hidden": 6,
}  # fmt: skip
MAXIMA = {"max_source_positions": 40, "max_target_positions": 30}
# Each place with each mechanism, the rest LeaPformer; then the switches.
SETTINGS = {
    "leap": {},
    **{
        f"{place}-{kind}": {f"{place}_attention": kind, **(MAXIMA if kind == "cosformer" else {})}
        for place in ("encoder", "decoder", "cross")
        for kind in ("softmax", "linear", "cosformer")
    },
    "leap-conv": {"conv_width": 4},
    "gated": {"variant": "gated"},
    "running": {"variant": "gated", "proportion": "running"},
    "running-places": {"variant": "gated", "proportion": "running", "clocks": 2, "leap_places": True, "decay": True},
    "gated-cosformer": {"variant": "gated", "cross_attention": "cosformer", **MAXIMA},
    "softmax-conv": {"cross_attention": "softmax", "encoder_attention": "softmax", "conv_width": 3},
    "grouped": {"num_key_value_heads": 1, "leap_per_head": True, "leap_hidden": 1},
    "output-gate": {"variant": "gated", "output_gate": "silu", "cross_attention": "softmax"},
    "leap-rotary": {"variant": "gated", "rotary": True, "qk_norm": True},
    "linear-normed": {"cross_attention": "linear", "decoder_attention": "linear", "qk_norm": True},
    "delta": {"variant": "gated", "attention_update": "delta", "delta_range": 2},
    "channel": {"variant": "gated", "decay_per": "channel"},
    "prior": {"proportion": "prior"},
    "softmax-rotary": {
        **{f"{place}_attention": "softmax" for place in ("encoder", "decoder", "cross")},
        **{"rotary": True, "qk_norm": True, "position_scale": 0},
    },
    "quadratic-elu": {"reweighting": "quadratic", "feature_map": "elu"},
}


def tiny_translator(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, **fields
) -> LeapformerForConditionalGeneration:
    """A tiny model in evaluation mode, with large weights so that its predictions differ from place to place."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LeapformerTranslationConfig(**(TINY | fields))
        return LeapformerForConditionalGeneration(config).to(dtype).eval()


def speech(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Features [*shape, FEATURES]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, FEATURES, dtype=torch.float64, generator=generator).to(dtype)


def targets(*shape: int, seed: int = 2) -> torch.Tensor:
    """Labels without special symbols."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
