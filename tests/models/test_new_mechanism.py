"""A mechanism of one file and one line: language models, classifiers and simultaneous translation take it as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leapformer.models import (
    DecoderStream,
    EncoderStream,
    LeapformerConfig,
    LeapformerForCausalLM,
    LeapformerForSequenceClassification,
)
from leapformer.nn import REGISTRY, Call, Capabilities, LayerState, Mechanism
from leapformer.nn.sums import SummingAttention
from leapformer.ops import linear_attention
from tests.models.translation_builders import CHUNK, speech, targets, tiny_translator


class Scaled(SummingAttention):
    """Attention by the exponential of each feature, with a weight of its own."""

    capabilities = Capabilities(causal=True, cross=True, streaming=True, arbitrary_length=True)
    eps = 1e-6

    def __init__(self, hidden_size, num_heads, *, taps: int = 2, **shared):
        super().__init__(hidden_size, num_heads, **shared)
        self.feature_width, self.taps = self.head_dim, taps
        self.scale = nn.Parameter(torch.empty(self.head_dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.scale, 0.5)

    def features(self, x: Tensor) -> Tensor:
        return (x * self.scale).clamp(max=5).exp()

    def attend(self, q, k, v, x, call: Call):
        state = call.state
        output, linear = linear_attention(
            self.features(q), self.features(k), v, visible=call.visible, key_mask=call.key_mask,
            initial_state=None if state is None else state.linear, return_state=call.return_state, eps=self.eps,
        )  # fmt: skip
        return output, None if linear is None else LayerState(length=q.new_zeros(0), linear=linear)

    def key_features(self, k, places):
        return self.features(k), None

    def query_features(self, q, position_ids):
        return self.features(q), None


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entry = Mechanism(name="scaled", layer=Scaled, label="Scaled", options={"taps": None}, translates=True)
    monkeypatch.setitem(REGISTRY, "scaled", entry)


def test_models_of_language_and_classes_take_it(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config, ids = LeapformerConfig(**sizes, attention=["scaled", "leap"]), torch.arange(12)[None]
    model = LeapformerForCausalLM(config).eval()
    assert model.model.blocks[0].attention.scale.eq(0.5).all()  # its own start, not that of a projection
    tokens = model.generate(ids[:, :4], max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1]).logits[:, 3:].argmax(-1), tokens[:, 4:])
    model.save_pretrained(tmp_path)
    again = LeapformerForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert LeapformerForSequenceClassification(config)(ids).logits.shape == (1, 2)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"conv_width": 3}], ids=["plain", "conv"])
def test_it_translates_step_by_step_as_all_at_once(fields):
    places = dict.fromkeys(("encoder_attention", "decoder_attention", "cross_attention"), "scaled")
    model, k = tiny_translator(**places, **fields), 2
    x, labels = speech(2, 70), targets(2, 6)
    expected = model(x, labels=labels, k=k).logits
    encoder, decoder = EncoderStream.begin(model, 2), DecoderStream.begin(model, 2, k=k, keep_mass=True)
    for part in x.split(4 * CHUNK, dim=1):
        decoder.feed(encoder.push(part))
    decoder.feed(encoder.finish())
    decoder.finish()
    inputs, found = model.shift_right(labels), []
    for i in range(6):
        halves = decoder.split()
        decoder = DecoderStream.join(halves[::-1]).reorder(torch.tensor([1, 0]))
        found.append(decoder.step(inputs[:, i]))
        assert decoder.mass is not None
        torch.testing.assert_close(decoder.mass.sum(-1), torch.ones_like(decoder.mass[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(found, 1), expected, atol=1e-6, rtol=1e-6)
