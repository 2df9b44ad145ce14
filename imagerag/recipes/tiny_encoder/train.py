"""Train the image tower of the encoder `tiny`: python -m imagerag.recipes.tiny_encoder.train --help.

The text tower is frozen, so the features of all names and keywords are computed once. The image tower is trained on the
`base` concepts of the sample corpus only, with open_clip's contrastive loss. A batch holds each concept at most once: a
second drawing would count as a negative. Batches are deterministic, also after a resume.
"""

import argparse
import io
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.embedded import tiny_encoder
from imagerag.embedded.sample import Drawing, load_drawings
from imagerag.embedding.encoder import Encoder
from imagerag.recipes.recipe import DrawingsRecipe, parse
from imagerag.recipes.tiny_encoder.recall import measure_recall
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.storage.files import write_file

if TYPE_CHECKING:
    import open_clip

logger = logging.getLogger(__name__)

_SPLIT = "base"
_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True)
class Recipe(DrawingsRecipe):
    """Hyperparameters of the training."""

    steps: int = 700
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.2
    warmup_steps: int = 100
    max_logit_scale: float = 30.0
    """Lower than CLIP's 100, against overfitting to a few thousand drawings."""
    keyword_share: float = 0.8
    """Share of samples whose text feature is interpolated between the name and one of the keywords."""
    mixing: float = 0.4
    """Parameter of mixup's Beta distribution."""
    degrees: float = 15.0
    scale: float = 0.3
    shift: float = 0.15
    jitter: float = 0.35


class Samples:
    """The training drawings with text features, and the batch of each step."""

    def __init__(self, recipe: Recipe, drawings: Sequence[Drawing], model: "open_clip.CustomTextCLIP") -> None:
        self._recipe = recipe
        self._drawings: dict[str, list[torch.Tensor]] = defaultdict(list)
        texts: dict[str, tuple[str, ...]] = {}
        side: int = tiny_encoder.read_config()["preprocess_cfg"]["size"]
        for drawing in drawings:
            self._drawings[drawing.concept.codepoint].append(torch.from_numpy(drawing.pixels(side)))
            texts[drawing.concept.codepoint] = (drawing.concept.name, *drawing.concept.keywords)
        self.codepoints = sorted(self._drawings)
        features = _text_features(model, sorted({text for group in texts.values() for text in group}))
        self._features = {codepoint: torch.stack([features[t] for t in group]) for codepoint, group in texts.items()}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised images (B, 3, 64, 64) and text features (B, D) of B different concepts."""
        size = self._recipe.batch_size
        batches_per_epoch = len(self.codepoints) // size
        epoch, position = divmod(step, batches_per_epoch)
        order = np.random.default_rng([self._recipe.seed, epoch]).permutation(len(self.codepoints))
        chosen = [self.codepoints[i] for i in order[position * size : (position + 1) * size]]
        rng = np.random.default_rng([self._recipe.seed, epoch, position])
        images = torch.stack([self._drawings[c][rng.integers(len(self._drawings[c]))] for c in chosen])
        texts = torch.stack([self._text(c, rng) for c in chosen])
        images = self._recipe.augment(images, torch.Generator().manual_seed(int(rng.integers(2**62))))
        share = torch.from_numpy(rng.beta(self._recipe.mixing, self._recipe.mixing, size).astype(np.float32))
        share = torch.maximum(share, 1 - share)
        return mix(images, share), F.normalize(mix(texts, share), dim=-1)

    def _text(self, codepoint: str, rng: np.random.Generator) -> torch.Tensor:
        features = self._features[codepoint]
        if len(features) == 1 or rng.random() >= self._recipe.keyword_share:
            return features[0]
        return F.normalize(features[0] + rng.random() * features[rng.integers(1, len(features))], dim=0)


def _text_features(model: "open_clip.CustomTextCLIP", texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer = tiny_encoder.load_tokenizer()
    features: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(texts), 256):
            group = texts[start : start + 256]
            features |= zip(group, model.encode_text(tokenizer(group), normalize=True), strict=True)
    return {text: feature.clone() for text, feature in features.items()}


def mix(values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Blend values (B, ...) with their predecessors in the batch by weights `share` (B,) (mixup, arXiv 1710.09412)."""
    return values.roll(1, 0).lerp(values, share.view(-1, *[1] * (values.ndim - 1)))


def train(
    recipe: Recipe, drawings: Sequence[Drawing], folder: Path, checkpoint_every: int = 250
) -> "open_clip.CustomTextCLIP":
    """Train the model, resuming from a checkpoint with the same recipe in `folder`.

    Args:
        recipe: the hyperparameters.
        drawings: drawings to train on.
        folder: folder of the checkpoint.
        checkpoint_every: steps between checkpoints.

    Raises:
        RuntimeError: if the loss is not finite.
    """
    torch.manual_seed(recipe.seed)
    model = tiny_encoder.build_model().train()
    model.visual.to(memory_format=torch.channels_last)
    samples = Samples(recipe, drawings, model)
    logger.info("%d concepts, %d steps of %d", len(samples.codepoints), recipe.steps, recipe.batch_size)
    matrices = [p for p in model.visual.parameters() if p.ndim >= 2]
    others = [model.logit_scale, *(p for p in model.visual.parameters() if p.ndim < 2)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    scheduler = recipe.schedule(optimizer)
    loss_function = ClipLoss()
    first_step = _resume(folder / _CHECKPOINT, recipe, model, optimizer, scheduler)
    started = time.perf_counter()
    for step in range(first_step, recipe.steps):
        images, texts = samples.batch(step)
        features = model.encode_image(images.contiguous(memory_format=torch.channels_last), normalize=True)
        loss = loss_function(features, texts, model.logit_scale.exp())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of step {step} is {loss.item()} with {recipe}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(recipe.max_logit_scale))
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first_step) * recipe.batch_size / (time.perf_counter() - started)
            logger.info("step %d of %d: loss %.3f, %.0f images/s", step + 1, recipe.steps, loss.item(), rate)
        if (step + 1) % checkpoint_every == 0:
            _checkpoint(folder / _CHECKPOINT, recipe, step + 1, model, optimizer, scheduler)
    return model.eval()


def _checkpoint(path: Path, recipe: Recipe, step: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    parts = {"visual": model.visual, "optimizer": optimizer, "scheduler": scheduler}
    state = {name: part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()
    torch.save(state | {"logit_scale": model.logit_scale.data, "recipe": asdict(recipe), "step": step}, buffer)
    write_file(str(path), buffer.getvalue())


def _resume(path: Path, recipe: Recipe, model: Any, optimizer: Any, scheduler: Any) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        logger.info("the checkpoint in %s is of another recipe: starting again", path.parent)
        return 0
    for name, part in {"visual": model.visual, "optimizer": optimizer, "scheduler": scheduler}.items():
        part.load_state_dict(state[name])
    model.logit_scale.data.copy_(state["logit_scale"])
    logger.info("resuming after step %d", state["step"])
    return int(state["step"])


def save(
    model: "open_clip.CustomTextCLIP", recipe: Recipe, drawings: Sequence[Drawing], folder: Path
) -> dict[str, Any]:
    """Write the weights in float16 and the manifest to `folder`, and return the manifest."""
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in model.visual.state_dict().items()
    }
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / tiny_encoder.WEIGHTS_NAME)
    weights_sha256 = sha256((folder / tiny_encoder.WEIGHTS_NAME).read_bytes()).hexdigest()
    identity = EncoderIdentity(
        id="tiny", digest=weights_sha256, dim=tiny_encoder.read_config()["model_cfg"]["embed_dim"]
    )
    encoder = Encoder(
        tiny_encoder.load_model(folder), tiny_encoder.load_tokenizer(), identity=identity, device="cpu", dtype="fp32"
    )
    manifest = {
        "weights_sha256": weights_sha256,
        "text_weights_sha256": tiny_encoder.TEXT_WEIGHTS_SHA256,
        "recipe": asdict(recipe),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "transformers", "numpy", "pillow")},
        "text_to_image_recall": {
            split: [asdict(recall) for recall in measure_recall(encoder, split)] for split in (_SPLIT, "held_out")
        },
        "styles": sorted({drawing.style.name for drawing in drawings}),
        "num_drawings": len(drawings),
        "code_points": sorted({drawing.concept.codepoint for drawing in drawings}),
    }
    (folder / tiny_encoder.MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the image tower of the encoder `tiny` on the sample corpus.")
    parser.add_argument("--out", type=Path, default=tiny_encoder.FOLDER, help="output folder (default: %(default)s)")
    recipe, arguments = parse(parser, Recipe)
    folder, drawings = arguments.out, load_drawings(splits=[_SPLIT])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = save(train(recipe, drawings, folder), recipe, drawings, folder)
    (folder / _CHECKPOINT).unlink(missing_ok=True)
    logger.info("%s", json.dumps(manifest["text_to_image_recall"], indent=1))


if __name__ == "__main__":
    main()
