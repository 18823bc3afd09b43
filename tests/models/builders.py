"""Tiny models for the tests of `leapformer.models`."""

from __future__ import annotations

import torch

from leapformer.models import LeapformerConfig, LeapformerForCausalLM

TINY = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
HYBRID = ["leap", "softmax"]
# Every attention kind with every variant that it has, and the single switches.
SETTINGS = {
    "leap-paper": {"attention": "leap"},
    "leap-gated": {"attention": "leap", "variant": "gated"},
    "running": {"attention": "leap", "variant": "gated", "proportion": "running", "clocks": 2},
    "running-grouped": {
        "attention": "leap",
        "variant": "gated",
        "proportion": "running",
        "num_key_value_heads": 1,
        "leap_places": True,
        "decay": False,
    },
    "leap-grouped": {"attention": "leap", "num_key_value_heads": 1, "leap_per_head": True, "leap_hidden": 1},
    "cosformer-paper": {"attention": "cosformer"},
    "cosformer-gated": {"attention": "cosformer", "variant": "gated"},
    "linear-paper": {"attention": "linear", "feature_map": "elu"},
    "linear-gated": {"attention": "linear", "variant": "gated"},
    "performer": {"attention": "performer", "attention_features": 8},
    "softmax-paper": {"attention": "softmax"},
    "softmax-conv": {"attention": "softmax", "conv_width": 4},
    "hybrid-gated": {"attention": HYBRID, "variant": "gated"},
    "hybrid-output-gate": {"attention": HYBRID, "variant": "gated", "output_gate": "silu"},
    "leap-rotary": {"attention": "leap", "variant": "gated", "rotary": True, "qk_norm": True, "positions": "none"},
    "hybrid-delta": {"attention": HYBRID, "variant": "gated", "attention_update": "delta", "output_gate": "silu"},
    "linear-channel": {"attention": "linear", "variant": "gated", "decay_per": "channel"},
    "leap-prior": {"attention": "leap", "variant": "gated", "proportion": "prior"},
    "softmax-rotary": {"attention": "softmax", "rotary": True, "qk_norm": True, "positions": "none"},
}


def tiny_config(**fields) -> LeapformerConfig:
    return LeapformerConfig(**(TINY | fields))


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> LeapformerForCausalLM:
    """A tiny model in evaluation mode, with large weights so that its predictions differ from place to place."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LeapformerForCausalLM(tiny_config(**fields)).to(dtype).eval()


def tokens(*shape: int, seed: int = 1, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, shape, generator=generator)
