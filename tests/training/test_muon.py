"""Muon: what an update is, and that its state goes on."""

import copy

import pytest
import torch
from torch import nn

from imagerag.training.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (144, 16)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    scales = torch.logspace(0, -1, min(shape))
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = matrix * (scales if shape[1] == len(scales) else scales[:, None])
    before, after = (torch.linalg.svdvals(each) for each in (matrix, orthogonalized(matrix)))
    assert before.max() > 3 * before.min()
    assert ((after > 0.4) & (after < 1.4)).all()
    assert torch.allclose(orthogonalized(1000 * matrix), orthogonalized(matrix), atol=1e-4)


def stepped(optimizer: str, weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return a weight after a step with each gradient."""
    parameter = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    learner: torch.optim.Optimizer = (
        Muon([parameter], 0.1, 0.1, momentum=0.9)
        if optimizer == "ours"
        else torch.optim.Muon([parameter], 0.1, momentum=0.9, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
        if optimizer == "torch"
        else torch.optim.AdamW([parameter], 0.1, betas=(0.9, 0.99), weight_decay=1e-2)
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        learner.step()
    return parameter.detach()


def random(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_matrices_learn_as_by_torch(shape: tuple[int, int]) -> None:
    weight, *gradients = random(*shape)
    ours, theirs = (stepped(each, weight, gradients) for each in ("ours", "torch"))
    assert float((ours - theirs).std() / (theirs - weight).std()) < 0.02, "theirs computes in bfloat16"


def test_kernels_learn_as_the_matrices_that_they_are() -> None:
    weight, *gradients = random(16, 8, 3, 3)
    expected = stepped("ours", weight.flatten(1), [each.flatten(1) for each in gradients])
    nested = [each.contiguous(memory_format=torch.channels_last) for each in (weight, *gradients)]
    assert torch.allclose(stepped("ours", nested[0], nested[1:]).flatten(1), expected, atol=1e-5)


def test_the_rest_learns_as_by_adamw() -> None:
    weight, *gradients = random(16)
    assert torch.allclose(stepped("ours", weight, gradients), stepped("adamw", weight, gradients), atol=1e-5)


def test_its_state_goes_on() -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    optimizer = Muon(network.parameters(), 1e-2, 1e-2)

    def step() -> None:
        optimizer.zero_grad()
        network(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    step()
    weights, state = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    step()
    after = copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    optimizer.load_state_dict(state)
    step()
    assert all(torch.equal(after[name], value) for name, value in network.state_dict().items())
