"""Train the embedded base model: python -m imagerag.tiny.train --help.

Six phases follow each other, on the `base` concepts of the sample corpus: the autoencoder; a UNet whose decoder reads
pictures out of the H-space; the text's part in it; the teacher; the network of the perceptual loss, which fine-tuning
has as well; and the student, which reads the pictures of anything in `--pictures` too. A stopped run goes on where it
was. `--start` takes the autoencoder, the perceptual network and first weights of teacher and student from a folder, and
what else the student's training ended with where its checkpoint is still there. Losses and pictures go to MLflow.

The pictures of anything are clip art in the public domain: Debian's package `openclipart-png`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel

from imagerag import tiny
from imagerag.corpus.sample import Drawing, load_concepts, load_drawings
from imagerag.digests import sha256_of
from imagerag.errors import UserError
from imagerag.generation.base import load_conditioner
from imagerag.settings import Settings
from imagerag.tiny.anything import Cutouts
from imagerag.tiny.data import Pictures, Prompts
from imagerag.tiny.latents import Latents
from imagerag.tiny.perceptual import PerceptualPhase
from imagerag.tiny.prior import PriorPhase
from imagerag.tiny.student import StudentPhase
from imagerag.tiny.teacher import TeacherPhase, build_scheduler, build_unet
from imagerag.tiny.vae import VaePhase, encode_all, normalize_latents
from imagerag.training.loop import CHECKPOINT_SUFFIX, Phase, run, start_from
from imagerag.training.perceptual import LatentDistance, LatentNetwork
from imagerag.training.tracking import Tracker, tracked

_SPLIT = "base"
_PARTS = ("vae", "teacher", "perceptual", "unet")
_KEPT = ("vae", "perceptual")
"""Parts that a training with first weights does not change."""
_SHOWN_SPLIT = "held_out"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes the weights, beside the corpus and the constants of each phase."""

    seed: int = 0
    vae_steps: int = 2400
    hspace_steps: int = 2100
    prior_steps: int = 2400
    teacher_steps: int = 1500
    """0 leaves the teacher as it starts."""
    student_steps: int = 2500
    perceptual_steps: int = 1200
    batch_size: int = 64
    """Of all but the autoencoder, the text's part and the perceptual network."""


class Training:
    """The phases, and what they hand on to each other through the output folder."""

    def __init__(
        self,
        recipe: Recipe,
        drawings: Sequence[Drawing],
        anything: Sequence[Path],
        folder: Path,
        tracker: Tracker,
        start: Path | None = None,
    ) -> None:
        """Args:
        drawings: what the model can make.
        anything: folders of pictures that it learns to read besides.
        start: weights to start from, rather than random ones.
        """
        self._recipe, self._folder, self._tracker, self._start = recipe, folder, tracker, start
        self._drawings, self._anything = drawings, anything
        self._pictures = Pictures.of(drawings)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self) -> None:
        """Do what is not done yet.

        Raises:
            UserError: if the folder holds weights of another recipe.
        """
        self._claim()
        vae = self._finished("vae", AutoencoderKL, self._train_vae)
        latents = Latents.of(encode_all(vae, self._pictures.pixels, self._device), self._pictures)
        concepts = {concept.codepoint: concept for concept in load_concepts()}
        prompts = Prompts([concepts[codepoint] for codepoint in self._pictures.codepoints], load_conditioner("tiny"))
        common = {
            "latents": latents,
            "prompts": prompts,
            "vae": vae,
            "batch_size": self._recipe.batch_size,
            "seed": self._recipe.seed,
            "device": self._device,
        }
        teacher = self._finished("teacher", UNet2DConditionModel, lambda: self._train_teacher(common))
        network = self._finished("perceptual", LatentNetwork, lambda: self._train_perceptual(latents))
        self._finished("unet", UNet2DConditionModel, lambda: self._train_student(teacher, network, common))
        build_scheduler().save_pretrained(self._folder / "scheduler")

    def _finished(self, part: str, kind: type[ModelMixin], train: Callable[[], ModelMixin]) -> Any:
        """Return a part as it is shipped, in float16, after training it where it is not done."""
        folder = self._folder / part
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            if self._start is not None and part in _KEPT:
                shutil.copytree(self._start / part, partial, dirs_exist_ok=True)
            else:
                train().eval().half().save_pretrained(partial)
            partial.rename(folder)
        return kind.from_pretrained(folder, torch_dtype=torch.float32).eval().to(self._device)

    def _train_vae(self) -> ModelMixin:
        shown = Pictures.of(load_drawings(splits=[_SHOWN_SPLIT])[::23][:32])
        recipe = self._recipe
        phase = VaePhase(self._pictures, shown, steps=recipe.vae_steps, seed=recipe.seed, device=self._device)
        self._run(phase)
        normalize_latents(phase.vae, encode_all(phase.vae.eval(), self._pictures.pixels, self._device))
        return phase.vae

    def _train_teacher(self, common: dict[str, Any]) -> ModelMixin:
        unet = self._started("teacher") or self._train_hspace(common)
        if not self._recipe.teacher_steps:
            return unet
        teacher = TeacherPhase(
            "teacher", unet, **common, steps=self._recipe.teacher_steps, learning_rate=4e-4, reads=False
        )
        self._run(teacher)
        return teacher.ema.module

    def _train_hspace(self, common: dict[str, Any]) -> UNet2DConditionModel:
        torch.manual_seed(self._recipe.seed)
        hspace = TeacherPhase(
            "hspace", build_unet(), **common, steps=self._recipe.hspace_steps, learning_rate=1e-3, reads=True
        )
        self._run(hspace)
        without_size = {name: value for name, value in common.items() if name != "batch_size"}
        prior = PriorPhase(_copy(hspace.ema.module), **without_size, steps=self._recipe.prior_steps)
        self._run(prior)
        return prior.unet

    def _train_student(
        self, teacher: UNet2DConditionModel, network: LatentNetwork, common: dict[str, Any]
    ) -> ModelMixin:
        phase = StudentPhase(
            self._started("unet") or _copy(teacher),
            LatentDistance(network, "tiny"),
            Cutouts.of_drawings(self._pictures.pixels),
            Cutouts.of_files(self._anything),
            **common,
            steps=self._recipe.student_steps,
        )
        if self._checkpoint is not None:
            start_from(phase, self._checkpoint)
        self._run(phase)
        return phase.ema.module

    @property
    def _checkpoint(self) -> Path | None:
        """That of the student that this one starts as, if it was kept."""
        path = self._start / f"{StudentPhase.name}{CHECKPOINT_SUFFIX}" if self._start is not None else None
        return path if path is not None and path.exists() else None

    def _started(self, part: str) -> UNet2DConditionModel | None:
        """Return the first weights of a UNet, if there are some."""
        if self._start is None:
            return None
        unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(
            self._start / part, torch_dtype=torch.float32, local_files_only=True
        )
        return unet

    def _train_perceptual(self, latents: Latents) -> ModelMixin:
        concepts = {concept.codepoint: concept.name for concept in load_concepts()}
        names = load_conditioner("tiny").encode([concepts[each] for each in self._pictures.codepoints]).sentences
        assert names is not None, "the text encoder of `tiny` is one of sentences"
        recipe = self._recipe
        phase = PerceptualPhase(
            latents, names.clone(), steps=recipe.perceptual_steps, seed=recipe.seed, device=self._device
        )
        self._run(phase)
        return phase.network

    def _run(self, phase: Phase) -> None:
        run(phase, self._folder, self._tracker)

    def _claim(self) -> None:
        """Say in the manifest what is made here, before anything is."""
        path = self._folder / tiny.MANIFEST_NAME
        if path.exists():
            found = json.loads(path.read_text())["recipe"]
            if found != self._described():
                raise UserError(f"{self._folder} has weights of another recipe: {found}. Remove them, or choose --out")
            return
        manifest = {
            "recipe": self._described(),
            "device": str(self._device),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")},
            "styles": sorted({drawing.style.name for drawing in self._drawings}),
            "num_drawings": len(self._drawings),
            "code_points": sorted({drawing.concept.codepoint for drawing in self._drawings}),
        }
        path.write_text(json.dumps(manifest, indent=1) + "\n")

    def _described(self) -> dict[str, Any]:
        """Return what makes the weights: the recipe, and the digests of first weights."""
        recipe = asdict(self._recipe)
        if self._start is None:
            return recipe
        weights = {part: self._start / part / "diffusion_pytorch_model.safetensors" for part in _PARTS}
        before = json.loads((self._start / tiny.MANIFEST_NAME).read_text())["recipe"]
        if self._checkpoint is not None:
            weights["checkpoint"] = self._checkpoint
        return recipe | {"start": {part: sha256_of(path) for part, path in weights.items()} | {"recipe": before}}


def _copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    config = {name: value for name, value in unet.config.items() if name != "_name_or_path"}  # of this machine
    copy = UNet2DConditionModel.from_config(config)
    copy.load_state_dict(unet.state_dict())
    return copy


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded base model on the sample corpus.")
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="folders of PNG pictures of anything")
    parser.add_argument("--start", type=Path, help="a folder of weights that the training goes on from")
    parser.add_argument("--out", type=Path, default=tiny.FOLDER, help="where weights and manifest go: %(default)s")
    parser.add_argument("--home", type=Path, default=Path(".imagerag"), help="where MLflow's store is: %(default)s")
    for field in fields(Recipe):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help="%(default)s")
    arguments = vars(parser.parse_args())
    folder, home, start = (arguments.pop(name) for name in ("out", "home", "start"))
    anything = arguments.pop("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    recipe, drawings = Recipe(**arguments), load_drawings(splits=[_SPLIT])
    try:
        with tracked(Settings(home=home), "tiny", folder.name, asdict(recipe)) as tracker:
            Training(recipe, drawings, anything, folder, tracker, start).run()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
