"""The bytes that a language model keeps of a text, as results.json has them."""

from __future__ import annotations

import pytest

from tests.training.builders import tiny_recipe

FLOAT, LENGTH = 4, 8  # bytes of a number, and of the count of tokens that each layer keeps


@pytest.mark.parametrize("tokens", [8, 16])
def test_the_state_of_softmax_grows_with_the_text_and_that_of_linear_attention_does_not(tmp_path, tokens):
    found = {}
    for attention in ("softmax", "linear"):
        recipe, task = tiny_recipe(tmp_path, f"attention={attention}", f"block_size={tokens}")
        data = task.prepare(recipe, cache=tmp_path / ".cache")
        model = data.build_model().train()
        found[attention] = data.evaluate(model, split="validation")["state_bytes"]
        assert model.training
    # One layer of 2 heads of 8: a key and a value for each token, or kv [8, 8] and z [8] for each head.
    assert found == {"softmax": tokens * 2 * 16 * FLOAT + LENGTH, "linear": 2 * (8 * 8 + 8) * FLOAT + LENGTH}
