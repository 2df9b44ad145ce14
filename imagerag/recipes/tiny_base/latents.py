"""Latents of the drawings, and the coupling of noise and drawings for one-step training."""

from dataclasses import dataclass

import torch

from imagerag.recipes.tiny_base.data import Pictures


@dataclass(frozen=True)
class Latents:
    """Latents of drawings with concept and style."""

    values: torch.Tensor
    """Latents (N, 4, 16, 16)."""
    concepts: torch.Tensor
    """Concept of each drawing (N,)."""
    of_style: torch.Tensor
    """Drawing by concept and style (concepts, styles); -1 if there is none."""

    @classmethod
    def of(cls, values: torch.Tensor, pictures: Pictures) -> "Latents":
        """Combine latents (N, 4, 16, 16) with the concepts and styles of their pictures."""
        of_style = torch.full((len(pictures.codepoints), int(pictures.styles.max()) + 1), -1)
        of_style[pictures.concepts, pictures.styles] = torch.arange(len(values))
        return cls(values=values, concepts=pictures.concepts, of_style=of_style)

    def chosen_by(self, noise: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Return the target drawing (B,) for each noise (B, 4, 16, 16) and its concept (B,).

        A concept has several drawings, one per style. With independent noise and drawings, the best one-step prediction
        is the blurred mean of all. So noise and data are coupled (arXiv 2304.14772), in a way that a network can
        detect: the noise's channel mean of largest magnitude, with its sign, selects the style. All styles are equally
        likely.
        """
        half = (self.of_style.shape[1] + 1) // 2
        means = noise.mean((2, 3))[:, :half]
        scores = torch.cat([means, -means], dim=1)[:, : self.of_style.shape[1]]
        drawings = self.of_style[concepts]
        best = scores.masked_fill(drawings < 0, -torch.inf).argmax(1, keepdim=True)
        return drawings.gather(1, best).squeeze(1)
