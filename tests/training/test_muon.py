"""Muon: the orthogonal step against a singular value decomposition, one step by hand, and what it leaves to AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from leapformer.models import LeapformerConfig, LeapformerForCausalLM
from leapformer.training.arguments import build_optimizer
from leapformer.training.muon import COEFFICIENTS, ROUNDS, Muon, hidden_matrices, orthogonalize
from leapformer.training.recipes import TrainingSection


def polynomial(values: torch.Tensor) -> torch.Tensor:
    """What the rounds make of singular values that were divided by their root of the sum of squares."""
    a, b, c = COEFFICIENTS
    values = values / values.square().sum().sqrt()
    for _ in range(ROUNDS):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_only_the_singular_values_change(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    expected = u @ torch.diag(polynomial(values)) @ vt
    # Five rounds of float32 products of unit size.
    torch.testing.assert_close(orthogonalize(matrix.float()).double(), expected, rtol=0, atol=1e-4)
    assert orthogonalize(matrix).dtype == torch.float64


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 3, 4, 6)])
def test_a_batch_is_its_matrices_one_by_one(shape):
    matrices = torch.randn(shape)
    flat = matrices.reshape(-1, *shape[-2:])
    expected = torch.stack([orthogonalize(matrix) for matrix in flat]).reshape(shape)
    # Five rounds of float32 products of unit size.
    torch.testing.assert_close(orthogonalize(matrices), expected, rtol=0, atol=1e-4)


def test_matrices_of_one_shape_do_not_touch_each_other():
    def stepped(shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
        matrices = [nn.Parameter(torch.full(shape, 0.1)) for shape in shapes]
        optimizer = Muon(matrices, [{"params": [nn.Parameter(torch.ones(2))]}], lr=0.1)
        for number, matrix in enumerate(matrices):
            generator = torch.Generator().manual_seed(number)
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
        return [matrix.detach() for matrix in matrices]

    first, *_, last = stepped([(4, 6), (4, 6), (6, 4), (4, 6)])
    torch.testing.assert_close(first, stepped([(4, 6)])[0])
    torch.testing.assert_close(last, stepped([(5, 5), (2, 7), (3, 3), (4, 6)])[3])


def test_singular_values_come_near_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(64, 128)))
    assert 0.5 < values.min() and values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_two_steps_follow_the_formula():
    start, first, second = torch.randn(3, 4, 6)
    matrix = nn.Parameter(start.clone())
    other = nn.Parameter(torch.ones(2))
    optimizer = Muon([matrix], [{"params": [other], "weight_decay": 0.0}], lr=0.1, weight_decay=0.5, momentum=0.9)
    expected, momentum = start, torch.zeros(4, 6)
    for grad in (first, second):
        matrix.grad, other.grad = grad.clone(), torch.ones(2)
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = orthogonalize(0.1 * grad + 0.9 * momentum)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * update
    torch.testing.assert_close(matrix.detach(), expected)
    torch.testing.assert_close(other.detach(), torch.full((2,), 1 - 0.1 - 0.1))  # AdamW's steps under equal gradients


def test_a_loaded_state_goes_on_as_if_nothing_had_been():
    def made() -> tuple[list[nn.Parameter], Muon]:
        parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))]
        return parameters, Muon(parameters[:1], [{"params": parameters[1:], "weight_decay": 0.0}], lr=0.1)

    def steps(parameters: list[nn.Parameter], optimizer: Muon, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole, optimizer = made()
    steps(whole, optimizer, range(6))
    first, optimizer = made()
    steps(first, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    second, optimizer = made()
    for target, source in zip(second, first, strict=True):
        target.data.copy_(source.data)
    optimizer.load_state_dict(state)
    steps(second, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_tables_vectors_and_leap_modules_are_left_to_adamw(tied):
    config = LeapformerConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, variant="gated", tie_word_embeddings=tied
    )
    model = LeapformerForCausalLM(config)
    section = TrainingSection.model_validate({"optimizer": "muon", "weight_decay": 0.3})
    optimizer = build_optimizer(model, section)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert set.union(*groups) == set(names.values()) and sum(map(len, groups)) == len(names)
    assert {name.split(".")[-2] for name in groups[0]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    }
    assert len(groups[0]) == len(hidden_matrices(model)) == 12
    assert all("embed" not in name and "head" not in name for name in groups[0])


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"expected matrices, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.ones(3))], [{"params": [nn.Parameter(torch.ones(2))]}], lr=0.1)
