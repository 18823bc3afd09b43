"""Saving and loading: a round trip, the Auto classes, and one clear error for a damaged or foreign checkpoint."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import leapformer.models
from leapformer.models import CheckpointError, LeapformerConfig, LeapformerForCausalLM, LeapformerModel
from tests.models.builders import SETTINGS, tiny_model, tokens


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_is_the_same_model(tmp_path, fields, tied):
    model, ids = tiny_model(tie_word_embeddings=tied, **fields), tokens(2, 7)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is LeapformerForCausalLM
    for (name, saved), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(saved, loaded), name
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    body = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(body) is LeapformerModel
    torch.testing.assert_close(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LeapformerConfig


def test_importing_again_registers_nothing_twice():
    importlib.reload(leapformer.models)
    assert type(AutoConfig.for_model("leapformer")) is LeapformerConfig


def save(folder, **fields):
    tiny_model(**fields).save_pretrained(folder)
    return folder


def test_a_file_that_is_cut_off(tmp_path):
    weights = save(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="expected whole safetensors weights") as caught:
        LeapformerForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "its weights have other shapes than its config says"),
        ({"num_hidden_layers": 3}, "found [0-9]+ missing"),
        ({"num_hidden_layers": 1}, "and [0-9]+ others"),
        ({"attention": "linear"}, "found 0 missing .* and [0-9]+ others"),
        ({"model_type": "gpt2"}, "expected model_type 'leapformer', found 'gpt2'"),
    ],
)
def test_weights_of_another_model(tmp_path, change, message):
    path = save(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        LeapformerForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_config(tmp_path):
    with pytest.raises(CheckpointError, match="expected a config.json, found none"):
        LeapformerForCausalLM.from_pretrained(tmp_path)
    (save(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected safetensors weights, found none"):
        LeapformerForCausalLM.from_pretrained(tmp_path)
