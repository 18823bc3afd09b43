"""Adapters of PEFT: each method with each task, trained, saved, loaded and used for generation."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache

from leapformer.models import LeapformerForSequenceClassification
from tests.models.builders import SETTINGS, tiny_config, tiny_model, tokens
from tests.models.translation_builders import speech, targets, tiny_translator

pytestmark = [
    # PEFT reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]
METHODS = {
    "lora": lambda task: LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda task: IA3Config(
        task_type=task, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
}
methods = pytest.mark.parametrize("method", METHODS)
PREFIXES = ("leap-gated", "leap-grouped", "cosformer-gated", "performer", "softmax-conv")


def trained(model, batch, steps=4):
    """The losses of a few steps of training of the adapter alone."""
    base = [p for name, p in model.named_parameters() if not p.requires_grad]
    before, losses = [p.clone() for p in base], []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.equal(a, b) for a, b in zip(before, base, strict=True))
    return losses


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return mask


@pytest.mark.parametrize(
    ("kind", "method"), [*(("leap-paper", method) for method in METHODS), *((kind, "prefix") for kind in PREFIXES)]
)
def test_a_language_model(kind, method, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(dtype=torch.float32, **SETTINGS[kind]), METHODS[method]("CAUSAL_LM"))
    ids = tokens(2, 7)
    batch = {"input_ids": ids, "attention_mask": padded(ids), "labels": ids.masked_fill(padded(ids) == 0, -100)}
    losses = trained(model.train(), batch)
    assert losses[-1] < losses[0]
    model.eval()
    written = model.generate(input_ids=ids, attention_mask=padded(ids), max_new_tokens=4, do_sample=False)
    whole = torch.cat([padded(ids), torch.ones_like(written[:, 7:])], 1)
    assert written[:, 7:].tolist() == model(written, attention_mask=whole).logits[:, -5:-1].argmax(-1).tolist()
    if kind == "leap-paper":
        beams = {"num_beams": 2, "do_sample": False}
        assert model.generate(input_ids=ids, attention_mask=padded(ids), max_new_tokens=3, **beams).shape == (2, 10)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(dtype=torch.float32, **SETTINGS[kind]), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@methods
@pytest.mark.parametrize("fields", [{"variant": "gated", "pooling": "cls"}, {"attention": "softmax"}], ids=str)
def test_a_classifier(fields, method):
    torch.manual_seed(0)
    base = LeapformerForSequenceClassification(tiny_config(num_labels=3, **fields))
    model = get_peft_model(base, METHODS[method]("SEQ_CLS"))
    ids = tokens(2, 7)
    losses = trained(
        model.train(), {"input_ids": ids, "attention_mask": padded(ids), "labels": torch.tensor([0, 2])}, 6
    )
    assert losses[-1] < losses[0]
    adapter = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    assert adapter and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_translator(method):
    torch.manual_seed(0)
    model = get_peft_model(tiny_translator(dtype=torch.float32), METHODS[method]("SEQ_2_SEQ_LM"))
    batch = {"input_features": speech(2, 20, dtype=torch.float32), "labels": targets(2, 5), "k": 2}
    losses = trained(model.train(), batch)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"expected greedy_translation\(model, model.encode"):
        model.generate(input_features=batch["input_features"])


def test_a_prefix_needs_attention_with_a_state():
    base = LeapformerForSequenceClassification(tiny_config(num_labels=3, attention="nystromformer"))
    model = get_peft_model(base, METHODS["prefix"]("SEQ_CLS"))
    with pytest.raises(ValueError, match="NystromformerAttention: expected no prefix of keys and values") as error:
        model(input_ids=tokens(1, 4))
    assert "\n" not in str(error.value)


def test_keys_and_values_of_another_shape_are_refused():
    model, ids = tiny_model(), tokens(2, 3)
    with pytest.raises(ValueError, match="expected a LeapformerCache of 2 layers, found DynamicCache of 0 layers"):
        model(ids, past_key_values=DynamicCache())
    keys = torch.zeros(2, 4, 3, 8)
    with pytest.raises(ValueError, match=r"prefix: expected keys and values \[B, S, 2, 8\], got \[2, 3, 4, 8\]"):
        model(ids, past_key_values=DynamicCache([(keys, keys), (keys, keys)]))
