"""Decoding with a cache equals the full forward, in constant memory."""

from __future__ import annotations

import pytest
import torch

from leapformer.models import LeapformerCache
from tests.models.builders import SETTINGS, tiny_model, tokens

settings = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())


@settings
@torch.no_grad()
def test_steps_and_chunks_equal_the_full_forward(fields):
    model, ids = tiny_model(**fields), tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    full = model(ids, attention_mask=mask).logits
    cache, parts = LeapformerCache(2), []
    for start, end in ((0, 3), (3, 4), (4, 10), (10, 11), (11, 12), (12, 17)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(output.logits)
    found = torch.cat(parts, dim=1)
    real = mask.bool()
    torch.testing.assert_close(found[real], full[real], atol=1e-10, rtol=1e-10)
    assert cache.get_seq_length() == 17
    assert cache.length.tolist() == [17, 13]


@settings
@torch.no_grad()
def test_a_snapshot_brings_the_state_back(fields):
    model, ids = tiny_model(**fields), tokens(2, 9)
    cache = model(ids[:, :5]).past_key_values
    kept = cache.snapshot()
    expected = model(ids[:, 5:], past_key_values=cache).logits
    for _ in range(2):
        cache.restore(kept)
        assert cache.get_seq_length() == 5
        torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, expected)


@settings
@torch.no_grad()
def test_rows_are_reordered_repeated_and_selected(fields):
    model, ids = tiny_model(**fields), tokens(2, 9)
    fresh = model(ids[:, :5]).past_key_values
    expected = model(ids[:, 5:], past_key_values=fresh.snapshot()).logits
    reordered, repeated = fresh.snapshot(), fresh.snapshot()
    reordered.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(model(ids[[1, 0], 5:], past_key_values=reordered).logits, expected[[1, 0]])
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([0, 3]))
    torch.testing.assert_close(model(ids[:, 5:], past_key_values=repeated).logits, expected)


@torch.no_grad()
def test_a_linear_state_has_constant_size_and_a_softmax_cache_grows():
    for fields in (SETTINGS["leap-paper"], SETTINGS["leap-gated"]):
        model = tiny_model(dtype=torch.float32, **fields)
        cache = model(tokens(1, 100)).past_key_values
        after_100 = cache.nbytes
        for _ in range(9):
            model.model(tokens(1, 1100), past_key_values=cache)
        assert cache.get_seq_length() == 10_000
        model.model(tokens(1, 1), past_key_values=cache)
        assert cache.nbytes == after_100 > 0
    softmax = tiny_model(**SETTINGS["softmax-paper"])
    assert softmax(tokens(1, 20)).past_key_values.nbytes > softmax(tokens(1, 10)).past_key_values.nbytes


@torch.no_grad()
def test_decoding_without_gradients_updates_at_fixed_addresses():
    model = tiny_model(variant="gated")
    cache = model(tokens(1, 5)).past_key_values
    state = cache.layers[0].state
    before = (state.linear.kv.data_ptr(), state.conv.data_ptr())
    model(tokens(1, 1), past_key_values=cache)
    state = cache.layers[0].state
    assert (state.linear.kv.data_ptr(), state.conv.data_ptr()) == before


def test_a_cache_resets_and_refuses_to_crop():
    model = tiny_model()
    cache = model(tokens(1, 5)).past_key_values
    with pytest.raises(ValueError, match="cannot forget tokens; use snapshot and restore"):
        cache.crop(-1)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.length) == (0, 0, None)
    with pytest.raises(TypeError, match="no keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
