"""Skyformer: all rows as landmarks and gamma to 0 give the Gaussian kernel itself."""

import pytest
import torch

from leapformer.nn import SkyformerAttention
from leapformer.nn.skyformer import gaussian
from tests.nn.oracles import close, heads, weighted


def layer_of(features, **arguments):
    return SkyformerAttention(16, 2, num_features=features, **arguments).double().eval()


def exact(q, k, v):
    distances = (q[:, :, None] - k[:, None]).square().sum(-1).movedim(-1, 1)  # [B, H, T, S]
    return weighted(torch.exp(-distances / (2 * 8**0.5)), v)


@torch.no_grad()
def test_all_landmarks_and_no_gamma_give_the_kernel():
    q, k, v = (heads(2, 12, 2, 8, seed=seed, scale=2.0) for seed in range(3))
    close(layer_of(24, gamma=1e-10, iterations=40).mix(q, k, v, None), exact(q, k, v), 1e-6)
    gammas = (1e-1, 1e-2, 1e-3)
    errors = [(layer_of(24, gamma=gamma, iterations=40).mix(q, k, v, None) - exact(q, k, v)).norm() for gamma in gammas]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # in proportion to gamma, at the end


@torch.no_grad()
def test_it_is_nystroms_method_at_its_landmarks():
    q, k, v = (heads(1, 12, 2, 8, seed=seed, scale=2.0) for seed in range(3))
    layer = layer_of(8, gamma=0.3, iterations=40)
    places, there = layer._places(torch.tensor([12]), 12)
    assert places.tolist() == [[1, 4, 7, 10]] and there.all()
    rows, columns = q.transpose(1, 2), k.transpose(1, 2)
    marks = torch.cat([rows[:, :, places[0]], columns[:, :, places[0]]], 2)
    inverse = torch.linalg.inv(gaussian(marks, marks) + 0.3 * torch.eye(8))
    c = gaussian(rows, marks) @ inverse @ gaussian(marks, columns)
    close(layer.mix(q, k, v, None), weighted(c, v), 1e-8)


@pytest.mark.parametrize("real", [1, 3, 4, 5, 11, 40])
def test_landmarks_are_one_of_each_segment(real):
    layer = layer_of(8).train()
    for _ in range(20):
        places, there = layer._places(torch.tensor([real]), 40)
        found = places[there].tolist()
        assert len(found) == min(4, real) == len(set(found)) and found == sorted(found) and found[-1] < real
    if real == 40:
        seen = {int(layer._places(torch.tensor([real]), 40)[0][0, 2]) for _ in range(400)}
        assert seen == set(range(20, 30))
