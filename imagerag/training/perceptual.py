"""Distance of latents as a network sees them (LPIPS, arXiv 1801.03924, on latents: E-LatentLPIPS, arXiv 2405.05967)."""

from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag import tiny
from imagerag.digests import digest_of
from imagerag.errors import UserError

_ELATENTLPIPS = "elatentlpips:"
_ENCODERS = ("sd15", "sd21", "sdxl")


class Perceptual(Protocol):
    """A distance that gradients go through."""

    name: str
    """Which network it is by, for the log."""

    def __call__(self, fake: torch.Tensor, real: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the mean distance of latents (B, C, H, W), augmented alike at random."""
        ...


def check_perceptual(spec: str) -> None:
    """Make sure that there is such a network, without loading it.

    Raises:
        UserError: if there is not, or its package is missing.
    """
    if spec.startswith(_ELATENTLPIPS):
        encoder = spec.removeprefix(_ELATENTLPIPS)
        if encoder not in _ENCODERS:
            raise UserError(f"elatentlpips knows the latents of {', '.join(_ENCODERS)}; got {encoder!r}")
        if find_spec("elatentlpips") is None:
            raise UserError(
                "the perceptual loss by elatentlpips needs its package: `pip install elatentlpips` (CC BY-NC). Or name "
                "another network, or give the loss a weight of 0"
            )
    elif not (_folder_of(spec) / "config.json").is_file():
        raise UserError(
            f"the perceptual loss needs a latent network: `tiny`, a folder of one or {_ELATENTLPIPS}"
            f"{'|'.join(_ENCODERS)}, or a weight of 0; {_folder_of(spec)} has no config.json"
        )


def perceptual_digest(spec: str) -> str:
    """Return what tells one network from another of the same name."""
    if spec.startswith(_ELATENTLPIPS):
        return version("elatentlpips")
    folder = _folder_of(spec)
    return digest_of({path.name: path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}})


def load_perceptual(spec: str, device: torch.device) -> Perceptual:
    """Load a perceptual distance.

    Args:
        spec: `tiny`, a folder of a `LatentNetwork`, or `elatentlpips:` and one of sd15, sd21 and sdxl.
        device: where it runs.

    Raises:
        UserError: if there is no such network, or its package or weights are missing.
    """
    check_perceptual(spec)
    if spec.startswith(_ELATENTLPIPS):
        return _Elatentlpips(spec.removeprefix(_ELATENTLPIPS), device)
    network: LatentNetwork = LatentNetwork.from_pretrained(
        _folder_of(spec), use_safetensors=True, torch_dtype=torch.float32, local_files_only=True
    )
    return LatentDistance(network.to(device), spec)


def _folder_of(spec: str) -> Path:
    return tiny.FOLDER / "perceptual" if spec == "tiny" else Path(spec).expanduser()


class LatentNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A small VGG-like network that was trained to tell what latents show; its features at each resolution count."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, in_channels: int = 4, channels: tuple[int, ...] = (48, 96, 128), embed_dim: int = 384) -> None:
        super().__init__()
        widths = (in_channels, *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1),
                nn.GroupNorm(8, after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.GroupNorm(8, after),
                nn.ReLU(),
            )
            for before, after in pairwise(widths)
        )
        self.head = nn.Linear(channels[-1], embed_dim)

    def features(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Return features (B, C_i, H / 2^i, W / 2^i) of latents (B, C, H, W)."""
        features = []
        for number, stage in enumerate(self.stages):
            latents = stage(F.max_pool2d(latents, 2) if number else latents)
            features.append(latents)
        return features

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what latents (B, C, H, W) show as an embedding of text (B, D), of length one."""
        return F.normalize(self.head(self.features(latents)[-1].mean((2, 3))), dim=1)


class LatentDistance:
    """Mean squared difference of a network's features, each position's of length one."""

    def __init__(self, network: LatentNetwork, name: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self.name = name

    def __call__(self, fake: torch.Tensor, real: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """See `Perceptual`."""
        both = augment(torch.cat([fake, real]), generator)
        distance = torch.zeros((), device=fake.device)
        for features in self._network.features(both):
            one, other = F.normalize(features.float(), dim=1, eps=1e-6).chunk(2)
            distance = distance + (one - other).square().sum(1).mean()
        return distance


def augment(pair: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip, shift and cut out parts of latents (2 B, C, H, W) at random, the second half like the first.

    One network has blind spots; where it looks from is drawn anew for every row and step (E-LatentLPIPS, Sec. 3.2).
    """
    size, (height, width) = len(pair) // 2, pair.shape[-2:]
    drawn = torch.rand(size, 5, generator=generator, device=generator.device).cpu()
    flips, shifts, centres = drawn[:, 0] < 0.5, (drawn[:, 1:3] - 0.5) * 0.25, drawn[:, 3:]  # of the picture's side
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    near = [(each - centre).abs() < 0.125 for each, centre in zip((rows, columns), centres.T[..., None], strict=True)]
    kept = ~(near[0][:, :, None] & near[1][:, None, :])  # (B, H, W)
    transform = torch.zeros(size, 2, 3)
    transform[:, 0, 0] = torch.where(flips, -1.0, 1.0)
    transform[:, 1, 1] = 1.0
    # In whole positions, so that nothing is blurred.
    sides = torch.tensor([width, height])
    transform[:, :, 2] = 2 * (shifts * sides).round() / sides
    twice = transform.repeat(2, 1, 1).to(pair.device)
    grid = F.affine_grid(twice, list(pair.shape), align_corners=False).to(pair.dtype)
    moved = F.grid_sample(pair, grid, mode="nearest", padding_mode="border", align_corners=False)
    augmented: torch.Tensor = moved * kept.repeat(2, 1, 1)[:, None].to(pair.device, pair.dtype)
    return augmented


class _Elatentlpips:
    """The authors' own network for Stable Diffusion's latents; a package under a licence of its own (CC BY-NC)."""

    def __init__(self, encoder: str, device: torch.device) -> None:
        from elatentlpips import ELatentLPIPS

        try:
            network: Any = ELatentLPIPS(encoder=encoder, augment="bg", verbose=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the weights of elatentlpips for {encoder} are not in ./ckpt and could not be fetched: {error}"
            ) from error
        self._network = network.to(device).eval().requires_grad_(False)
        self.name = f"{_ELATENTLPIPS}{encoder}"

    def __call__(self, fake: torch.Tensor, real: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """See `Perceptual`."""
        with torch.random.fork_rng():  # its augmentations draw from the global generator
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
            distance: torch.Tensor = self._network(fake.float(), real.float(), add_l1_loss=False).mean()
        return distance
