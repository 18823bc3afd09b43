"""The paper's WikiText-103 model, built on the meta device: its size and what LeaP adds to it."""

from __future__ import annotations

import torch

from leapformer.models import LeapformerConfig, LeapformerForCausalLM

PAPER = {
    "vocab_size": 267_744,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "intermediate_size": 4096,
    "hidden_act": "relu",
    "adaptive_cutoffs": [20_000, 60_000],
    "adaptive_factor": 4,
    "hidden_dropout": 0.3,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "final_norm": False,
}


def build(**fields) -> LeapformerForCausalLM:
    with torch.device("meta"):
        return LeapformerForCausalLM(LeapformerConfig(**PAPER, **fields))


def test_leap_adds_133152_of_about_247_million_parameters():
    leap, cosformer = build(attention="leap", leap_hidden=32), build(attention="cosformer")
    assert leap.num_parameters_added_by_leap() == 133_152 == 16 * 2 * (128 * 32 + 32 + 32 + 1)
    assert leap.num_parameters() - cosformer.num_parameters() == 133_152
    assert 246e6 < leap.num_parameters() < 248e6
    assert build(attention="leap").num_parameters() == leap.num_parameters()


def test_its_bands_are_those_of_baevski_and_auli():
    shapes = [tuple(band.shape) for band, _ in build().model.embed_tokens.weights()]
    assert shapes == [(20_000, 1024), (40_000, 256), (207_744, 64)]
