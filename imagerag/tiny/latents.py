"""The drawings as latents, and which of a concept's drawings belongs to which noise."""

from dataclasses import dataclass

import torch

from imagerag.tiny.data import Pictures


@dataclass(frozen=True)
class Latents:
    """Drawings behind the autoencoder."""

    values: torch.Tensor
    """(N, 4, 16, 16)."""
    concepts: torch.Tensor
    """(N,)."""
    of_style: torch.Tensor
    """(concepts, styles): a concept's drawing in a style, -1 where it has none."""

    @classmethod
    def of(cls, values: torch.Tensor, pictures: Pictures) -> "Latents":
        """Pair `values` with what is known of their pictures."""
        of_style = torch.full((len(pictures.codepoints), int(pictures.styles.max()) + 1), -1)
        of_style[pictures.concepts, pictures.styles] = torch.arange(len(values))
        return cls(values=values, concepts=pictures.concepts, of_style=of_style)

    def chosen_by(self, noise: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Return for each noise (B, 4, 16, 16) which drawing (B,) of its concept (B,) it is to become in one step.

        A concept has a drawing in each style. Were noise and drawing independent, the best answer of one step would be
        the blurred mean of all. So the noise chooses: each style has a direction among the means of the noise's
        channels, all equally likely. A coupling of noise and data, as in arXiv 2304.14772, that a network can see.
        """
        half = (self.of_style.shape[1] + 1) // 2
        means = noise.mean((2, 3))[:, :half]
        scores = torch.cat([means, -means], dim=1)[:, : self.of_style.shape[1]]
        drawings = self.of_style[concepts]
        best = scores.masked_fill(drawings < 0, -torch.inf).argmax(1, keepdim=True)
        return drawings.gather(1, best).squeeze(1)
