"""Loading the model of a folder that somebody handed over: the right model, or one line; never its code."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from leapformer.errors import LeapformerError
from leapformer.models import LeapformerConfig, LeapformerForCausalLM, LeapformerForSequenceClassification
from leapformer.tasks.lm.tokenizers import build_tokenizer
from leapformer.training.loading import load_model, load_tokenizer, load_with_tokenizer, one_line


@pytest.fixture
def folder(tmp_path):
    model = LeapformerForCausalLM(
        LeapformerConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "model")
    build_tokenizer("bytes").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(load, folder) -> str:
    with pytest.raises(LeapformerError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 900
    return line


@pytest.mark.parametrize(
    "fields", [{"attention": "cosformer"}, {"attention": "softmax", "tie_word_embeddings": False}, {"variant": "gated"},
               {"adaptive_cutoffs": [20, 60]}, {"positions": "learned"}],
)  # fmt: skip
def test_a_model_comes_back_as_it_was_saved(tmp_path, fields):
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LeapformerForCausalLM(LeapformerConfig(max_position_embeddings=32, **sizes, **fields)).eval()
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = load_model(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    ids = torch.arange(20)[None]
    assert not loaded.training and torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.name_or_path == str(tmp_path)
    for name in sizes | fields:
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_a_model_keeps_its_dtype(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 5}
    LeapformerForSequenceClassification(LeapformerConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.dtype == torch.bfloat16 and model.config.num_labels == 5


def test_no_code_of_a_folder_runs(folder, monkeypatch, capfd):
    """With a `y` on the standard input, which transformers' own loader asks for."""
    code = f"open({str(folder / 'executed')!r}, 'w').close()\nclass Evil:\n    pass\n"
    (folder / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    capfd.readouterr()
    load_with_tokenizer(folder)
    evil = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    change(folder / "tokenizer_config.json", auto_map=evil)
    assert "tokenizer_config.json: auto_map: expected none" in refusal(load_tokenizer, folder)
    change(folder / "config.json", auto_map=evil)
    assert "config.json: auto_map: expected none" in refusal(load_model, folder)
    assert not (folder / "executed").exists() and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("config.json", "attn_implementation", "kernels-community/flash-attn"),
        ("config.json", "transformers_weights", "../other.safetensors"),
        ("config.json", "fusion_config", {"a": True}),
        ("config.json", "architectures", ["Evil"]),
        ("config.json", "architectures", 3),
        ("config.json", "model_type", ["leapformer"]),
        ("config.json", "num_labels", 10**9),
        ("config.json", "num_hidden_layers", 10**9),
        ("config.json", "hidden_size", 10**9),
        ("config.json", "hidden_size", "16"),
        ("config.json", "vocab_size", 256),
        ("config.json", "id2label", 3),
        ("tokenizer_config.json", "tokenizer_class", "Evil"),
        ("tokenizer_config.json", "tokenizer_class", []),
        ("tokenizer_config.json", "eos_token", "<none>"),
        ("tokenizer_config.json", "pad_token", 3),
        ("tokenizer_config.json", "padding_side", "up"),
        ("tokenizer_config.json", "model_input_names", ["x"]),
        ("tokenizer.json", "model", {"type": "Evil"}),
        ("tokenizer.json", "model", None),
    ],
)
def test_what_a_folder_asks_for_is_refused(folder, name, key, value):
    change(folder / name, **{key: value})
    line = refusal(load_with_tokenizer, folder)
    assert str(folder) in line


def test_what_is_passed_over(folder):
    """Other keys would become attributes of the configuration, in place of methods too; and files that nothing asks
    for.
    """
    change(folder / "config.json", length_limit=3, to_dict=None, forward="x", dtype="manual_seed", name_or_path="a/b")
    change(
        folder / "tokenizer_config.json", chat_template="{{ 1/0 }}", tokenizer_file="/etc/passwd", name_or_path="a/b"
    )
    (folder / "generation_config.json").write_text('{"penalty_alpha": 0.6, "top_k": 4, "max_length": "x"}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')
    (folder / "special_tokens_map.json").write_text("[")
    model, tokenizer = load_with_tokenizer(folder)
    assert model.config.length_limit() is None and tokenizer("ab")["input_ids"] == [97, 98]
    assert model.generation_config.penalty_alpha is None


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    assert "expected a whole model, found an adapter" in refusal(load_model, folder)


def test_a_link_that_leads_out_of_the_folder(folder):
    (folder / "tokenizer.json").rename(folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to("../tokenizer.json")
    assert "expected no link that leads out of" in refusal(load_tokenizer, folder)
    assert "expected no link that leads out of" in refusal(load_model, folder)


def test_weights_of_another_model(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.norm.weight"
    cases = [
        ({key: value for key, value in weights.items() if key != name}, f"missing {name}"),
        (weights | {"extra": torch.zeros(1)}, "unexpected extra"),
        (weights | {name: torch.zeros(3)}, rf"{name}: expected the shape [16], found [3]"),
        (weights | {name: torch.zeros(16, dtype=torch.int64)}, f"{name}: expected floating numbers, found I64"),
    ]
    for content, found in cases:
        save_file(content, path)
        assert found in refusal(load_model, folder)


def test_a_tokenizer_of_another_model(folder):
    build_tokenizer("bpe", vocab_size=300, documents=["the cat sat on the mat and the dog ran"]).save_pretrained(folder)
    assert "expected a tokenizer of the model's 257 tokens, found one with the id" in refusal(
        load_with_tokenizer, folder
    )
    build_tokenizer("bytes").save_pretrained(folder)
    change(folder / "tokenizer_config.json", pad_token=None)
    assert "expected the key pad_token, found none" in refusal(load_with_tokenizer, folder)


def test_a_panic_of_a_library_is_one_line(tmp_path):
    class PanicException(BaseException):
        """As the one of tokenizers, which is no Exception."""

    with (
        pytest.raises(LeapformerError, match=r"model: no tokenizer could be loaded \(first\)"),
        one_line("model", "no tokenizer could be loaded"),
    ):
        raise PanicException("first\nsecond")
    with pytest.raises(KeyboardInterrupt), one_line("model", "x"):
        raise KeyboardInterrupt
