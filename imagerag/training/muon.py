"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LIKE_ADAMW = 0.2
"""Root mean square of an update at a rate of 1, as AdamW's usually is (arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices and for kernels of convolutions, AdamW for everything else.

    `torch.optim.Muon` takes no kernels of convolutions, and computes in bfloat16, which many CPUs only emulate.
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
        """Args:
        parameters: the trainable weights.
        learning_rate: of matrices and kernels.
        rest_learning_rate: of biases, and of scales of normalisations.
        momentum: share of the gradients before, for matrices and kernels.
        betas: AdamW's, for everything else.
        weight_decay: of all.
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
        """Change the weights by their gradients."""
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
        ahead = gradient.lerp(average, group["momentum"])  # Nesterov's
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
    """Return about the nearest matrix (M, N) to `matrix` whose singular values are one, by Newton and Schulz."""
    first, second, third = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    result: torch.Tensor = matrix.T if tall else matrix
    result = result / (result.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = result @ result.T
        result = first * result + (second * gram + third * gram @ gram) @ result
    return result.T if tall else result
