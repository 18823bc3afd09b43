"""BigBird: a pattern that covers all gives softmax; otherwise it is softmax under the pattern, as transformers has
it.
"""

import pytest
import torch
from transformers import BigBirdConfig, BigBirdModel

from leapformer.nn import BigBirdAttention
from tests.nn.oracles import close, heads, softmax


def layer_of(block=4, random=2, seed=0):
    return BigBirdAttention(16, 2, block_size=block, random_blocks=random, seed=seed).double().eval()


def seen_by(layer, tokens):
    """bool [H, T, T]: which key each query sees, written out from the pattern."""
    W = layer.block_size
    C = -(-tokens // W)
    blocks, there = layer.pattern(C, torch.tensor([C]))
    seen = torch.zeros(2, C, C, dtype=torch.bool)
    for head in range(2):
        for row in range(C):
            seen[head, row, blocks[0, head, row][there[0, head, row]]] = True
    seen[:, [0, C - 1]] = True
    return seen.repeat_interleave(W, 1).repeat_interleave(W, 2)[:, :tokens, :tokens]


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "random"), [(20, 2), (17, 2), (4, 2), (3, 2), (12, 0), (40, 10)])
def test_a_pattern_that_covers_all_gives_softmax(tokens, random):
    q, k, v = (heads(2, tokens, 2, 8, seed=seed) for seed in range(3))
    layer = layer_of(random=random)
    assert seen_by(layer, tokens).all()
    close(layer.mix(q, k, v, None), softmax(q, k, v))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [48, 45])
def test_it_is_softmax_under_its_pattern(tokens):
    q, k, v = (heads(2, tokens, 2, 8, seed=seed) for seed in range(3))
    layer = layer_of()
    seen = seen_by(layer, tokens)
    assert not seen.all()
    close(layer.mix(q, k, v, None), softmax(q, k, v, seen))


def test_a_row_has_its_window_both_ends_and_others_at_random():
    layer = layer_of(random=3)
    blocks, there = layer.pattern(12, torch.tensor([12]))
    for head in range(2):
        for row in range(12):
            found = blocks[0, head, row][there[0, head, row]].tolist()
            assert len(found) == len(set(found))
            fixed = {0, 11, *range(max(row - 1, 0), min(row + 2, 12))}
            assert fixed <= set(found) and len(set(found) - fixed) == 3
    assert not torch.equal(blocks[0, 0], blocks[0, 1])


def test_the_pattern_depends_on_the_seed_alone():
    first, again, other = layer_of(), layer_of().train(), layer_of(seed=1)
    again.pattern(20, torch.tensor([20]))  # a longer one first
    used = torch.tensor([12])
    assert torch.equal(first.pattern(12, used)[0], again.pattern(12, used)[0])
    assert not torch.equal(first.pattern(12, used)[0], other.pattern(12, used)[0])
    counts = torch.zeros(12)
    for seed in range(200):
        blocks, there = layer_of(seed=seed).pattern(12, used)
        counts += torch.bincount(blocks[0, 0, 5, 5:], minlength=12)
    assert (counts[[0, 4, 5, 6, 11]] == 0).all()
    # 400 drawn from 7 blocks: 57 each, standard deviation at most 7.
    assert (counts[[1, 2, 3, 7, 8, 9, 10]] - 400 / 7).abs().max() < 5 * 7


@torch.no_grad()
def test_equals_transformers_with_the_same_random_blocks(monkeypatch):
    config = BigBirdConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, block_size=4,
        num_random_blocks=2, attention_type="block_sparse", max_position_embeddings=64, use_bias=True,
    )  # fmt: skip
    attention = BigBirdModel(config, add_pooling_layer=False).double().eval().encoder.layer[0].attention.self
    layer, C = layer_of(), 12
    for ours, theirs in ((layer.q_proj, "query"), (layer.k_proj, "key"), (layer.v_proj, "value")):
        ours.load_state_dict(getattr(attention, theirs).state_dict())
    drawn = layer.pattern(C, torch.tensor([C]))[0][0, :, 1:-1, 5:].numpy()
    monkeypatch.setattr(attention, "_bigbird_block_rand_mask_with_head", lambda *_, **__: list(drawn))
    monkeypatch.setattr(attention, "_bigbird_block_rand_mask", lambda *_, **__: list(drawn)[0])
    x, ones = heads(2, 4 * C, 16, seed=3), torch.ones(2, 4 * C, dtype=torch.float64)
    masks = {
        "band_mask": torch.ones(2, 1, C - 4, 4, 12, dtype=torch.float64),
        "from_mask": ones[:, None, :, None],
        "to_mask": ones[:, None, None, :],
        "from_blocked_mask": ones.view(2, C, 4),
        "to_blocked_mask": ones.view(2, C, 4),
    }
    theirs = attention(x, **masks)[0]
    close(layer(x)[0], layer.o_proj(theirs))
