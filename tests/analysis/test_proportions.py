"""Learned proportions of a model on a text."""

import pytest
import torch

from leapformer.analysis.proportions import learned_proportions
from leapformer.errors import LeapformerError
from leapformer.models import LeapformerConfig, LeapformerForCausalLM

TEXT = list(b"with open(path) as file:")


def tiny_model(**changes):
    torch.manual_seed(0)
    return LeapformerForCausalLM(LeapformerConfig(**{"hidden_size": 32, "num_hidden_layers": 2, **changes}))


def test_one_entry_per_layer_with_a_column_per_head():
    layers = learned_proportions(tiny_model(num_key_value_heads=2), TEXT)
    assert [layer.layer.split(".")[2] for layer in layers] == ["0", "1"]
    for layer in layers:
        assert layer.queries.shape == (len(TEXT), 4)
        assert layer.keys.shape == (len(TEXT), 2)
        for values in (layer.queries, layer.keys):
            assert values.dtype == torch.float32
            assert 0 < values.min() < values.max() < 1


def test_they_are_what_the_layer_computes():
    model = tiny_model(num_hidden_layers=1)
    (layer,) = learned_proportions(model, torch.tensor([TEXT]))
    captured = {}
    attention = model.get_submodule(layer.layer)
    attention.q_proj.register_forward_hook(lambda module, inputs, output: captured.update(q=output))
    with torch.no_grad():
        model(input_ids=torch.tensor([TEXT]))
    x = captured["q"].relu().unflatten(-1, (4, 8))
    w1, b1, w2, b2 = attention.q_proportion.weights()
    hidden = (torch.einsum("bthk,rk->bthr", x, w1[0]) + b1[0]).relu()
    expected = torch.sigmoid(hidden @ w2[0] + b2[0])[0]
    torch.testing.assert_close(layer.queries, expected)


def test_a_hybrid_has_them_where_it_has_leap():
    layers = learned_proportions(tiny_model(attention=["softmax", "leap"]), TEXT)
    assert [layer.layer.split(".")[2] for layer in layers] == ["1"]


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    learned_proportions(model, TEXT)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_them_is_refused():
    with pytest.raises(LeapformerError, match=r"expected a model with learned proportions \(attention=leap\), found"):
        learned_proportions(tiny_model(attention="cosformer"), TEXT)


@pytest.mark.parametrize("ids", [[], [[1, 2], [3, 4]]])
def test_not_one_text(ids):
    with pytest.raises(ValueError, match="input_ids: expected the tokens of one text"):
        learned_proportions(tiny_model(), ids)


def test_clocks_have_steps_and_turns():
    fields = {"variant": "gated", "proportion": "running", "clocks": 2, "num_key_value_heads": 2, "leap_places": True}
    model = tiny_model(**fields)
    layers = learned_proportions(model, TEXT)
    assert len(layers) == 2
    for layer in layers:
        assert layer.steps is not None and layer.steps.shape == (len(TEXT), 2) and layer.keys.shape == (len(TEXT), 4)
        assert 0 < layer.steps.min() < layer.steps.max() < 1
        rates = model.get_submodule(f"{layer.layer}.clocks").log_rates.detach().exp().flatten()
        expected = layer.steps.sum(0).repeat_interleave(2) * rates / (2 * torch.pi)
        torch.testing.assert_close(layer.keys[-1], expected, rtol=1e-5, atol=0)
        assert torch.equal(layer.queries, layer.keys)
