"""Muon: what a step is, that it finds a minimum, and that its state can be saved and loaded."""

import copy

import pytest
import torch
from torch import Tensor, nn

from softprompt.train.optimizers import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(20, 64), (64, 20), (8, 8), (1, 16)])
def test_singular_values_come_close_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_gradient_of_zero_moves_nothing() -> None:
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    Muon(parameters, lr=1.0).step()
    assert all(bool((parameter == 1).all()) for parameter in parameters)


@pytest.mark.parametrize("shape", [(20, 64), (64,)])
def test_a_step_is_as_long_as_the_learning_rate(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e4
    Muon([parameter], lr=0.1).step()
    assert 0.07 < float(parameter.detach().pow(2).mean().sqrt()) < 0.13


def _descend(parameter: nn.Parameter, target: Tensor, optimizer: Muon, steps: int) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / steps)
        optimizer.zero_grad()
        (parameter - target).pow(2).mean().backward()
        optimizer.step()


def test_it_finds_the_minimum_of_a_bowl() -> None:
    target, parameter = torch.arange(12.0).view(3, 4), nn.Parameter(torch.zeros(3, 4))
    _descend(parameter, target, Muon([parameter]), 200)
    torch.testing.assert_close(parameter.detach(), target, atol=0.05, rtol=0)


def test_saved_state_goes_on_with_the_same_bits() -> None:
    target, first = torch.ones(3, 4), nn.Parameter(torch.zeros(3, 4))
    optimizer = Muon([first])
    _descend(first, target, optimizer, 3)
    second = nn.Parameter(first.detach().clone())
    other = Muon([second])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _descend(first, target, optimizer, 2)
    _descend(second, target, other, 2)
    assert torch.equal(first, second)
