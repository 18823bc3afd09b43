"""Nystromformer: as many landmarks as tokens give softmax, and it is what its two oracles compute."""

import pytest
import torch
from nystrom_attention import NystromAttention
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from leapformer.nn import NystromformerAttention
from leapformer.nn.nystromformer import pseudo_inverse
from tests.nn.oracles import close, heads, softmax


def layer_of(landmarks, *, heads=2, iterations=6, conv_kernel=0, bias=False):
    arguments = {"num_features": landmarks, "iterations": iterations, "conv_kernel": conv_kernel, "bias": bias}
    return NystromformerAttention(16, heads, **arguments).double().eval()


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "landmarks"), [(20, 20), (13, 20)])
def test_as_many_landmarks_as_tokens_give_softmax(tokens, landmarks):
    q, k, v = (heads(2, tokens, 2, 8, seed=seed) for seed in range(3))
    close(layer_of(landmarks, iterations=40).mix(q, k, v, None), softmax(q, k, v), 1e-8)


@torch.no_grad()
def test_the_pseudo_inverse_is_one():
    a = heads(3, 6, 6, seed=0).softmax(-1)
    a[2, 4:], a[2, :, 4:] = 0, 0  # of rank 4
    inverse = pseudo_inverse(a, 40)
    torch.testing.assert_close(inverse, torch.linalg.pinv(a), atol=1e-8, rtol=1e-8)
    alone = pseudo_inverse(a[2:, :4, :4], 6)
    torch.testing.assert_close(pseudo_inverse(a, 6)[2:, :4, :4], alone)
    assert (pseudo_inverse(a, 6)[2, 4:] == 0).all()


@torch.no_grad()
def test_equals_the_oracle_package():
    """With one head and one sample: it scales the start of the inverse by the largest norm of the batch, we by each
    one's.
    """
    layer = layer_of(5, heads=1)
    oracle = (
        NystromAttention(16, dim_head=16, heads=1, num_landmarks=5, pinv_iterations=6, residual=False).double().eval()
    )
    oracle.to_qkv.weight.copy_(torch.cat([f.weight for f in (layer.q_proj, layer.k_proj, layer.v_proj)]))
    oracle.to_out[0].weight.copy_(layer.o_proj.weight)
    oracle.to_out[0].bias.zero_()
    x = heads(1, 20, 16, seed=3)
    close(layer(x)[0], oracle(x))


@torch.no_grad()
def test_equals_transformers_with_its_convolution():
    layer = layer_of(5, conv_kernel=7, iterations=40)
    config = NystromformerConfig(
        hidden_size=16, num_attention_heads=2, num_landmarks=5, segment_means_seq_len=20, conv_kernel_size=7
    )  # fmt: skip
    oracle = NystromformerSelfAttention(config).double().eval()
    for ours, theirs in ((layer.q_proj, oracle.query), (layer.k_proj, oracle.key), (layer.v_proj, oracle.value)):
        theirs.weight.copy_(ours.weight)
        theirs.bias.zero_()
    oracle.conv.weight.copy_(layer.value_conv.weight)
    few = oracle.iterative_inv
    oracle.iterative_inv = lambda matrix: few(matrix.double(), 40)
    x = heads(2, 20, 16, seed=4)
    close(layer(x)[0], layer.o_proj(oracle(x)[0]), 1e-7)


@torch.no_grad()
def test_segments_of_odd_lengths_are_means_over_their_tokens():
    layer, x = layer_of(3), heads(1, 7, 2, 8, seed=5)
    marks, there = layer._landmarks(x, None)
    wanted = torch.stack([x[:, a:b].mean(1) for a, b in ((0, 3), (3, 5), (5, 7))], 2)
    close(marks, wanted)
    assert there.all()


def test_an_even_convolution_is_refused():
    with pytest.raises(ValueError, match="expected an odd conv_kernel or 0, got 4"):
        layer_of(5, conv_kernel=4)
