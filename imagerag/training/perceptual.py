"""Perceptual distance in latent space (LPIPS, arXiv 1801.03924; on latents: E-LatentLPIPS, arXiv 2405.05967)."""

from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.base.files import TINY, TINY_TEACHER, parts_of, read_json
from imagerag.embedded import tiny_base
from imagerag.errors import UserError
from imagerag.storage.digests import digest_of
from imagerag.training.config import FinetuneConfig

_ELATENTLPIPS = "elatentlpips:"
_ENCODERS = ("sd15", "sd21", "sdxl")
_SD_SCALING, _SDXL_SCALING = 0.18215, 0.13025
"""Scaling factors of the autoencoders of Stable Diffusion 1 and 2, and of SDXL."""
_SD2_TEXT_DIM = 1024
"""Width of the text features of Stable Diffusion 2; version 1 has 768."""


class Perceptual(Protocol):
    """A differentiable perceptual distance."""

    name: str
    """Name of the network, for the log."""

    def __call__(self, fake: torch.Tensor, real: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the mean distance of latents (B, C, H, W) under the same random augmentations."""
        ...


def choose_perceptual(config: FinetuneConfig, base: str) -> FinetuneConfig:
    """Return a configuration with the perceptual network for a student's latents, if it uses and does not name one.

    Args:
        config: configuration of a training.
        base: spec of the student.

    Raises:
        UserError: if the perceptual loss is used, and the network or its package is missing.
    """
    if not config.losses.perceptual:
        return config
    network = config.perceptual_network or _network_for(base)
    check_perceptual(network)
    return config.model_copy(update={"perceptual_network": network})


def _network_for(base: str) -> str:
    """Return the network that was trained on the latents of a base model, by the configurations of its parts."""
    if base in (TINY, TINY_TEACHER):
        return TINY
    vae, unet = (read_json(part.files[0]) for part in parts_of(base, ("vae", "unet")).values())
    if isclose(vae.get("scaling_factor", _SD_SCALING), _SDXL_SCALING):
        return f"{_ELATENTLPIPS}sdxl"
    return f"{_ELATENTLPIPS}{'sd21' if unet.get('cross_attention_dim') == _SD2_TEXT_DIM else 'sd15'}"


def check_perceptual(spec: str) -> None:
    """Check that a perceptual network exists, without loading it.

    Args:
        spec: as for `load_perceptual`.

    Raises:
        UserError: if the network or its package is missing.
    """
    if spec.startswith(_ELATENTLPIPS):
        encoder = spec.removeprefix(_ELATENTLPIPS)
        if encoder not in _ENCODERS:
            raise UserError(f"elatentlpips supports the latents of {', '.join(_ENCODERS)}; got {encoder!r}")
        if find_spec("elatentlpips") is None:
            raise UserError(
                "the perceptual loss with elatentlpips needs its package: `pip install elatentlpips` (CC BY-NC). Or "
                "choose another network, or set the weight of the loss to 0"
            )
    elif not (_folder_of(spec) / "config.json").is_file():
        raise UserError(
            f"the perceptual loss needs a latent network: `tiny`, a folder with one or {_ELATENTLPIPS}"
            f"{'|'.join(_ENCODERS)}, or a weight of 0; {_folder_of(spec)} has no config.json"
        )


def perceptual_digest(spec: str) -> str:
    """Return a digest of the network's files, or the version of elatentlpips."""
    if spec.startswith(_ELATENTLPIPS):
        return version("elatentlpips")
    folder = _folder_of(spec)
    return digest_of({path.name: path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}})


def load_perceptual(spec: str, device: torch.device) -> Perceptual:
    """Load a perceptual distance.

    Args:
        spec: `tiny`, a folder with a `LatentNetwork`, or `elatentlpips:` followed by sd15, sd21 or sdxl.
        device: device of the network.

    Raises:
        UserError: if the network, its package or its weights are missing.
    """
    check_perceptual(spec)
    if spec.startswith(_ELATENTLPIPS):
        return _Elatentlpips(spec.removeprefix(_ELATENTLPIPS), device)
    network: LatentNetwork = LatentNetwork.from_pretrained(
        _folder_of(spec), use_safetensors=True, torch_dtype=torch.float32, local_files_only=True
    )
    return LatentDistance(network.to(device), spec)


def _folder_of(spec: str) -> Path:
    return tiny_base.FOLDER / "perceptual" if spec == TINY else Path(spec).expanduser()


class LatentNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A small VGG-like network on latents, trained contrastively against text; its feature maps define the distance."""

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
        """Return one feature map (B, C_i, H / 2^i, W / 2^i) per stage i for latents (B, C, H, W)."""
        features = []
        for number, stage in enumerate(self.stages):
            latents = stage(F.max_pool2d(latents, 2) if number else latents)
            features.append(latents)
        return features

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return L2-normalised embeddings (B, D) of latents (B, C, H, W) in the text embedding space."""
        return F.normalize(self.head(self.features(latents)[-1].mean((2, 3))), dim=1)


class LatentDistance:
    """Squared distance of a network's feature maps, L2-normalised per position, averaged over positions."""

    def __init__(self, network: LatentNetwork, name: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self.name = name

    def __call__(self, fake: torch.Tensor, real: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the mean distance of latents (B, C, H, W) under the same random augmentations."""
        both = augment(torch.cat([fake, real]), generator)
        distance = torch.zeros((), device=fake.device)
        for features in self._network.features(both):
            one, other = F.normalize(features.float(), dim=1, eps=1e-6).chunk(2)
            distance = distance + (one - other).square().sum(1).mean()
        return distance


def augment(pair: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Apply random flips, shifts and cutouts to latents (2 B, C, H, W), the same to rows i and B + i.

    Random augmentations prevent the generator from exploiting blind spots of the network (E-LatentLPIPS, Sec. 3.2).
    """
    size, (height, width) = len(pair) // 2, pair.shape[-2:]
    drawn = torch.rand(size, 5, generator=generator, device=generator.device).cpu()
    flips, shifts, centres = drawn[:, 0] < 0.5, (drawn[:, 1:3] - 0.5) * 0.25, drawn[:, 3:]  # as shares of the side
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    near = [(each - centre).abs() < 0.125 for each, centre in zip((rows, columns), centres.T[..., None], strict=True)]
    kept = ~(near[0][:, :, None] & near[1][:, None, :])  # (B, H, W)
    transform = torch.zeros(size, 2, 3)
    transform[:, 0, 0] = torch.where(flips, -1.0, 1.0)
    transform[:, 1, 1] = 1.0
    # Shifts by whole positions, so that nothing is blurred.
    sides = torch.tensor([width, height])
    transform[:, :, 2] = 2 * (shifts * sides).round() / sides
    twice = transform.repeat(2, 1, 1).to(pair.device)
    grid = F.affine_grid(twice, list(pair.shape), align_corners=False).to(pair.dtype)
    moved = F.grid_sample(pair, grid, mode="nearest", padding_mode="border", align_corners=False)
    augmented: torch.Tensor = moved * kept.repeat(2, 1, 1)[:, None].to(pair.device, pair.dtype)
    return augmented


class _Elatentlpips:
    """The authors' network for Stable Diffusion's latents, from a package under CC BY-NC."""

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
        """Return the mean distance of latents (B, C, H, W) under the same random augmentations."""
        with torch.random.fork_rng():  # its augmentations use the global generator
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
            distance: torch.Tensor = self._network(fake.float(), real.float(), add_l1_loss=False).mean()
        return distance
