"""Muon: momentum with orthogonalised updates (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LIKE_ADAMW = 0.2
"""RMS of an update at learning rate 1, matching AdamW's (arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels, AdamW for all other parameters.

    `torch.optim.Muon` does not support convolution kernels, and computes in bfloat16, which many CPUs emulate.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        rest_learning_rate: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
    ) -> None:
        """Initialise the optimizer.

        Args:
            parameters: trainable parameters.
            learning_rate: learning rate of matrices and convolution kernels.
            rest_learning_rate: learning rate of biases and normalisation scales.
            momentum: momentum of matrices and convolution kernels.
            betas: AdamW's betas for the other parameters.
            weight_decay: decoupled weight decay of all parameters.
        """
        parameters = list(parameters)
        groups = [
            {"params": [each for each in parameters if each.ndim > 1], "lr": learning_rate, "orthogonal": True},
            {"params": [each for each in parameters if each.ndim <= 1], "lr": rest_learning_rate, "orthogonal": False},
        ]
        defaults = {"momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters. Closures are not supported."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            update = self._orthogonal if group["orthogonal"] else self._adaptive
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(group["lr"] * update(weight.grad, self.state[weight], group))

    @staticmethod
    def _orthogonal(gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average: torch.Tensor = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(average, group["momentum"])  # Nesterov momentum
        matrix = orthogonalized(ahead.flatten(1))
        scale: float = _LIKE_ADAMW * max(matrix.shape) ** 0.5
        return (matrix * scale).view_as(gradient)

    @staticmethod
    def _adaptive(gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        if not state:
            state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        first, second = group["betas"]
        mean: torch.Tensor = state["mean"].lerp_(gradient, 1 - first) / (1 - first ** state["step"])
        square: torch.Tensor = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second ** state["step"])
        return mean / (square.sqrt() + 1e-8)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return the approximate nearest semi-orthogonal matrix (M, N) to `matrix`, by Newton-Schulz iteration."""
    first, second, third = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    result: torch.Tensor = matrix.T if tall else matrix
    result = result / (result.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = result @ result.T
        result = first * result + (second * gram + third * gram @ gram) @ result
    return result.T if tall else result
