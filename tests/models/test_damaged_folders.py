"""A folder that is damaged or hostile: one line, no memory taken, no code run."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leapformer.models import (
    CheckpointError,
    LeapformerConfig,
    LeapformerForCausalLM,
    LeapformerForConditionalGeneration,
    LeapformerTranslationConfig,
)
from leapformer.models.fields import MOST_PARAMETERS
from tests.models.builders import tiny_config, tiny_model
from tests.models.translation_builders import tiny_translator


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(folder, message=None, kind=LeapformerForCausalLM, **keywords):
    with pytest.raises(CheckpointError, match=message) as caught:
        kind.from_pretrained(folder, **keywords)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 900
    return line


WRONG = {
    "hidden_size": ["x", True, 1.5, -2, 0, 10**9, 10**30, None, [16], {"a": 1}],
    "num_hidden_layers": [10**9, 0, "2", 2.0, None],
    "vocab_size": [10**12, -1, "29"],
    "num_attention_heads": [0, 10**9, None],
    "num_key_value_heads": [3, 0, -1, "1"],
    "head_dim": [0, -8, 10**9],
    "intermediate_size": [-1, 10**18],
    "conv_width": [1, -1, 10**6],
    "output_gate": ["foo", 3],
    "qk_norm": ["yes", 1],
    "decay_per": ["token", None],
    "rotary": ["yes", None],
    "rotary_base": [0, -1, "x", 1e300],
    "attention_update": ["foo", None],
    "delta_range": [0, 3, "1", 1.5],
    "leap_hidden": [0, -1, 10**9, True],
    "leap_share": [0, 1.5, -0.1, "x"],
    "leap_bins": [1, -3],
    "attention_eps": [0, -1e-6, "small", 2],
    "layer_norm_eps": [-1, "x"],
    "hidden_dropout": [-0.1, 1.5, "x", True],
    "initializer_range": [0, -1, 1e9],
    "embedding_scale": [1e300, "x"],
    "position_scale": [1e30],
    "max_position_embeddings": [0, -1, "x", 10**30],
    "attention_features": [0, 10**9],
    "reweighting": ["foo", 3, None],
    "feature_map": ["foo"],
    "hidden_act": ["foo", None],
    "leap_start": ["foo"],
    "attention_impl": ["foo", "cuda"],
    "attention": ["foo", [], ["leap"], {"leap": 1}, 7],
    "variant": ["foo"],
    "pooling": ["foo", None],
    "eos_token_id": [10**9, "x", [1, "x"], True],
    "pad_token_id": [29, -7],
    "use_cache": ["yes", 1],
    "adaptive_cutoffs": [["a"], 3, list(range(1, 28)) * 9, [0]],
    "num_labels": [-1, 10**9, "x"],
    "id2label": [[1], {"a": "b"}, 3],
    "dtype": ["x", "nn", 3, "int32"],
    "torch_dtype": ["x"],
    "problem_type": ["foo"],
    "return_dict": ["no"],
    "architectures": [3],
    "per_layer_config": [3],
    "use_return_dict": [True],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field(folder, name):
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    for value in WRONG[name]:
        path.write_text(json.dumps(whole | {name: value}))
        line = refused(folder)
        assert "config" in line, line
        with pytest.raises(ValueError, match="config"):
            AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"expected a JSON object, found list \[\]"),
        ("", "expected JSON, found"),
        ('{"model_type": "leapformer", ', "expected JSON, found"),
        ("[" * 100_000, "config.json: expected JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "config.json: expected JSON"),
        ('{"model_type": NaN}', "found NaN, which JSON doesn't have"),
        ("\udcff", "expected UTF-8"),
        ("{}", "expected model_type 'leapformer', found None"),
        (
            '{"model_type": "leapformer", "attention_eps": {"__float__": "NaN"}}',
            "attention_eps: expected a finite number",
        ),
    ],
)
def test_a_damaged_configuration(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, message)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"max_length": "x"}', '{"num_beams": []}', '{"cache_implementation": {}}', "\x00" * 9]
)
def test_damaged_settings_of_generation(folder, text):
    (folder / "generation_config.json").write_text(text)
    refused(folder, "generation_config.json: .*expected")


def test_a_subfolder(folder, tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "inner" / "x")
    found = LeapformerForCausalLM.from_pretrained(tmp_path / "inner", subfolder="x")
    assert found.num_parameters() == tiny_model().num_parameters()
    refused(folder, "nothing-here: expected a config.json, found none", subfolder="nothing-here")


@pytest.mark.parametrize("kind", [LeapformerForCausalLM, LeapformerForConditionalGeneration])
def test_sizes_that_the_weights_do_not_have_take_no_memory(tmp_path, kind):
    translation = kind is LeapformerForConditionalGeneration
    (tiny_translator if translation else tiny_model)(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    layers = "encoder_layers" if translation else "num_hidden_layers"
    for change, message in (
        ({"vocab_size": 10**8}, r"lm_head|embed_tokens.weight: expected \[100000000, 16\]"),
        ({"intermediate_size": 10**7}, "its weights have other shapes than its config says"),
        ({layers: 40}, "found [0-9]+ missing"),
    ):
        path.write_text(json.dumps(whole | change))
        refused(tmp_path, message, kind)


def test_code_beside_a_model_never_runs(folder, monkeypatch):
    (folder / "evil.py").write_text("import sys; sys.evil_ran = True\nclass Evil: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("import sys; sys.evil_ran = True\n")
    path = folder / "config.json"
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {name: "evil.Evil" for name in names}}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    models = [LeapformerForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)]
    assert [type(model) for model in models] == [LeapformerForCausalLM] * 2
    assert type(AutoConfig.from_pretrained(folder)) is LeapformerConfig
    assert not hasattr(sys, "evil_ran") and sys.stdin.read() == "y\n" * 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_layers": 10**9}, "config encoder_layers: expected at most 1024, found 1000000000"),
        ({"label_smoothing": math.nan}, "config label_smoothing: expected a finite number, found nan"),
        ({"label_smoothing": -0.1}, "config label_smoothing: expected a number from 0 to below 1"),
        ({"ctc_weight": -1}, "config ctc_weight: expected at least 0, found -1"),
        ({"reweighting": "foo"}, "config reweighting: expected one of cosine, quadratic, found 'foo'"),
        ({"source": 3}, "config source: expected text, found 3"),
        ({"max_source_positions": "x"}, "config max_source_positions: expected an integer or null, found 'x'"),
        (
            {"hidden_size": 2**24, "head_dim": 2**10},
            f"expected a model of at most {MOST_PARAMETERS:,} parameters, found about",
        ),
        ({"attention_impl": "foo"}, "config attention_impl: expected one of auto, .*, found 'foo'"),
    ],
)
def test_a_wrong_value_of_a_translation(fields, message):
    with pytest.raises(ValueError, match=message):
        LeapformerTranslationConfig(**fields)


def test_a_model_that_no_machine_holds_is_refused():
    with pytest.raises(ValueError, match="expected a model of at most .* found about 1.4e"):
        tiny_config(hidden_size=2**17, num_hidden_layers=1000, intermediate_size=2**18)
    tiny_config(hidden_size=2**14, num_attention_heads=128, num_hidden_layers=30)  # 96e9, which some do hold
