"""The configuration: defaults, variants, hybrids, and one clear line for what is wrong."""

from __future__ import annotations

import pytest

from leapformer.models import (
    LeapformerConfig,
    LeapformerForCausalLM,
    LeapformerForSequenceClassification,
    NotCausal,
)
from tests.models.builders import SETTINGS, tiny_config, tiny_model


def test_defaults_follow_from_the_sizes():
    config = LeapformerConfig(hidden_size=64, num_attention_heads=4)
    assert (config.head_dim, config.intermediate_size, config.num_key_value_heads) == (16, 256, 4)
    assert config.eos_token_id is None
    assert (config.embedding_initializer_range, config.embedding_scale) == (0.02, 50.0)


def test_a_variant_sets_the_switches_and_a_switch_wins_over_it():
    paper, gated, own, softmax = (
        tiny_model(**fields).model.blocks[0].attention
        for fields in (
            {},
            {"variant": "gated"},
            {"variant": "gated", "output_norm": "sum", "decay": False, "conv_width": 3},
            {"variant": "gated", "attention": "softmax", "conv_width": 3},
        )
    )
    assert (paper.decay, paper.conv, paper.output_norm) == (None, None, None)
    assert gated.decay is not None and gated.conv.width == 4 and gated.output_norm is not None
    assert own.decay is None and own.conv.width == 3 and own.output_norm is None
    assert softmax.conv.width == 3


def test_a_hybrid_names_one_kind_per_block(tmp_path):
    config = tiny_config(attention=("leap", "softmax"))
    config.save_pretrained(tmp_path)
    assert LeapformerConfig.from_pretrained(tmp_path).attention_kinds == ["leap", "softmax"]


def test_a_configuration_survives_saving(tmp_path):
    config = tiny_config(variant="gated", decay=False, leap_share=0.01, positions="learned")
    config.save_pretrained(tmp_path)
    assert LeapformerConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention": "lepa"},
            "config attention: expected one of leap, cosformer, linear, .*, informer, found 'lepa'",
        ),
        ({"attention": ["leap"]}, r"config attention: expected one kind per block \(2\), found 1"),
        ({"variant": "best"}, "config variant: expected one of paper, gated, found 'best'"),
        ({"positions": "rotary"}, "config positions: expected one of sinusoidal, learned, none, found 'rotary'"),
        ({"output_gate": "tanh"}, "config output_gate: expected one of silu, sigmoid, found 'tanh'"),
        ({"output_norm": "max"}, "config output_norm: expected one of sum, rmsnorm, found 'max'"),
        ({"hidden_size": 15}, "config hidden_size: expected a multiple of num_attention_heads=2"),
        ({"num_key_value_heads": 3}, "config num_key_value_heads: expected a divisor of num_attention_heads=2"),
        ({"vocab_size": 0}, "config vocab_size: expected at least 1, found 0"),
        ({"leap_hidden": 2, "leap_share": 0.1}, "config leap_hidden and leap_share: expected at most one"),
        ({"adaptive_cutoffs": [20, 10]}, r"config adaptive_cutoffs: expected rising limits .* found \[20, 10\]"),
        (
            {"adaptive_cutoffs": [29]},
            "config adaptive_cutoffs: expected rising limits between 1 and vocab_size - 1 = 28",
        ),
        ({"adaptive_cutoffs": [9], "tie_word_embeddings": False}, "expected tie_word_embeddings=True, found False"),
    ],
)
def test_a_wrong_value_gets_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_switches_that_do_not_fit_a_model_are_refused():
    delta = {"attention": ["softmax", "leap"], "attention_update": "delta"}
    LeapformerForCausalLM(tiny_config(**delta))
    message = "config attention_update: expected 'sum' where later tokens are seen, found 'delta'"
    with pytest.raises(ValueError, match=message):
        LeapformerForSequenceClassification(tiny_config(**delta))
    message = "config decay_per: expected 'head' where later tokens are seen, found 'channel'"
    with pytest.raises(ValueError, match=message):
        LeapformerForSequenceClassification(tiny_config(decay=True, decay_per="channel"))
    with pytest.raises(ValueError, match="config head_dim: expected an even number with rotary positions, found 3"):
        tiny_config(rotary=True, head_dim=3)


@pytest.mark.parametrize("kind", ["linformer", "nystromformer", "skyformer", "reformer", "bigbird", "informer"])
def test_a_language_model_refuses_a_bidirectional_kind(kind):
    message = f"config attention: expected a kind that can be causal, found '{kind}' .it is bidirectional."
    with pytest.raises(NotCausal, match=message):
        LeapformerForCausalLM(tiny_config(attention=["leap", kind]))


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_configuration_knows_about_how_many_parameters_there_are(fields):
    """A model that is refused for its size is one that would have it: the matrices are all counted."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "leap_hidden": 2, "classifier_hidden_size": 1}
    model = tiny_model(**{**fields, **sizes})
    assert model.config._about_parameters() == pytest.approx(model.num_parameters(), rel=0.1)
