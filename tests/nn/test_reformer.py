"""Reformer: one chunk gives softmax with shared queries and keys; with more it is what its oracles compute."""

import pytest
import torch
from reformer_pytorch import LSHAttention
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from leapformer.nn import ReformerAttention
from leapformer.nn.reformer import ALONE, NORM_EPS
from tests.nn.oracles import close, heads


def layer_of(block, hashes=1, *, tokens_heads=2):
    return ReformerAttention(16, tokens_heads, block_size=block, num_hashes=hashes, bias=False).double().eval()


def shared_scores(q):
    """q . k_j with unit keys, and ALONE on the diagonal: [B, H, T, T] of q [B, H, T, K]."""
    keys = q * (q.square().sum(-1, keepdim=True) + NORM_EPS * q.shape[-1]).rsqrt()
    found = q @ keys.transpose(-1, -2)
    return found.masked_fill(torch.eye(q.shape[2], dtype=torch.bool), ALONE)


@torch.no_grad()
@pytest.mark.parametrize(("block", "tokens"), [(20, 20), (32, 20), (10, 20)])
def test_one_chunk_or_two_give_softmax_with_shared_queries_and_keys(block, tokens):
    q, v = heads(2, tokens, 2, 8, seed=0), heads(2, tokens, 2, 8, seed=1)
    wanted = shared_scores(q.transpose(1, 2)).softmax(-1) @ v.transpose(1, 2)
    for hashes in (1, 3):
        close(layer_of(block, hashes).mix(q, q, v, None), wanted.transpose(1, 2))


@torch.no_grad()
def test_rounds_are_merged_by_their_normalisers():
    q, v = heads(1, 24, 2, 8, seed=2), heads(1, 24, 2, 8, seed=3)
    layer, W = layer_of(4, 3), 4
    order = layer._order(q.transpose(1, 2), torch.tensor([24]))
    scores, wanted, total = shared_scores(q.transpose(1, 2))[0], 0, 0
    for head in range(2):
        for round_ in range(3):
            chunks = order[0, head, round_].view(-1, W)
            seen = torch.zeros(24, 24, dtype=torch.bool)
            for number, chunk in enumerate(chunks):
                seen[chunk[:, None], torch.cat([chunk, chunks[number - 1]])[None]] = True
            weights = torch.zeros(2, 24, 24, dtype=q.dtype)
            weights[head] = scores[head].masked_fill(~seen, -torch.inf).exp()
            wanted, total = wanted + weights @ v[0].transpose(0, 1), total + weights.sum(-1, keepdim=True)
    close(layer.mix(q, q, v, None)[0].transpose(0, 1), wanted / total)


@torch.no_grad()
def test_alike_tokens_share_a_bucket_and_padding_is_last():
    layer = layer_of(4, 5)
    q = heads(1, 2, 6, 8, seed=4).repeat_interleave(4, 2)  # each vector four times
    order = layer._order(q, torch.tensor([24]))
    kinds = (order // 4).unflatten(-1, (-1, 4))
    assert (kinds == kinds[..., :1]).all(-1).float().mean() > 0.5  # else two kinds share a bucket
    padded = layer._order(torch.cat([q, heads(1, 2, 8, 8, seed=5)], 2), torch.tensor([24]))
    assert torch.equal(padded[..., :24], order) and (padded[..., 24:] >= 24).all()


@torch.no_grad()
def test_equals_transformers_with_the_same_rotations(monkeypatch):
    layer = layer_of(4)
    config = ReformerConfig(
        hidden_size=16,
        num_attention_heads=2,
        attention_head_size=8,
        num_hashes=1,
        lsh_attn_chunk_length=4,
        num_buckets=12,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=False,
    )
    oracle = LSHSelfAttention(config).double().eval()
    oracle.query_key.weight.copy_(layer.q_proj.weight)
    oracle.value.weight.copy_(layer.v_proj.weight)
    generator = layer.generator()
    rotations = torch.stack([torch.randn(1, 2, 8, generator=generator) for _ in range(6)], -1)
    x = heads(2, 24, 16, seed=6, scale=2.0)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: rotations.movedim(0, 2).double().view(shape))
    wanted = oracle(x).hidden_states
    monkeypatch.undo()
    close(layer(x)[0], layer.o_proj(wanted))


@torch.no_grad()
def test_equals_the_oracle_package_up_to_its_scale():
    """It divides the scores by sqrt(K); one bucket for all makes its sorting ours."""
    oracle = LSHAttention(
        bucket_size=12, n_hashes=1, attend_across_buckets=True, allow_duplicate_attention=True
    ).double()
    q, v = heads(2, 24, 8, seed=7), heads(2, 24, 8, seed=8)
    theirs = oracle(8**0.5 * q, v)[0]
    ours = layer_of(12, tokens_heads=2).mix(*(t[:, :, None].expand(-1, -1, 2, -1) for t in (q, q, v)), None)
    torch.testing.assert_close(ours[:, :, 0], theirs, atol=1e-5, rtol=1e-5)  # its norm has no guard
    torch.testing.assert_close(ours[:, :, 1], theirs, atol=1e-5, rtol=1e-5)
