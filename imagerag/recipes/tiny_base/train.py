"""Train the embedded base model: python -m imagerag.recipes.tiny_base.train --help.

The training has six phases, on the `base` concepts of the sample corpus: the autoencoder; a UNet whose decoder
reconstructs pictures from the H-space; its text conditioning; the teacher; the network of the perceptual loss, which
fine-tuning uses too; and the student. Autoencoder and student also learn to reconstruct the pictures in `--pictures`. A
stopped run resumes. `--start` takes the autoencoder, the perceptual network, a teacher and a student from a folder. If
the autoencoder's phase has steps, the new one keeps the latents of that one, which the other models were trained on. If
the phase of text conditioning has steps, it goes on with that student, and the new teacher and student start from its
result. Otherwise, each goes on with its own weights, and the student also keeps the optimizers, EMA and discriminator
of its checkpoint, if there is one. Losses and image grids are logged to MLflow.

The shipped weights used public-domain clip art as `--pictures`: Debian's package `openclipart-png`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel

from imagerag.base.model import load_conditioner
from imagerag.embedded import tiny_base
from imagerag.embedded.sample import Drawing, load_concepts, load_drawings
from imagerag.errors import UserError
from imagerag.recipes.loop import CHECKPOINT_SUFFIX, Phase, run, start_from
from imagerag.recipes.recipe import parse
from imagerag.recipes.tiny_base.anything import Cutouts
from imagerag.recipes.tiny_base.data import Pictures, Prompts
from imagerag.recipes.tiny_base.latents import Latents
from imagerag.recipes.tiny_base.perceptual import PerceptualPhase
from imagerag.recipes.tiny_base.prior import PriorPhase
from imagerag.recipes.tiny_base.student import StudentPhase
from imagerag.recipes.tiny_base.teacher import TeacherPhase, build_scheduler, build_unet, deepened
from imagerag.recipes.tiny_base.vae import VaePhase, encode_all, normalize_latents
from imagerag.settings import Settings
from imagerag.storage.digests import sha256_of
from imagerag.training.perceptual import LatentDistance, LatentNetwork
from imagerag.training.tracking import Tracker, tracked

_SPLIT = "base"
_PARTS = ("vae", "teacher", "perceptual", "unet")
_SHOWN_SPLIT = "held_out"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of the training, apart from the constants of each phase."""

    seed: int = 0
    vae_steps: int = 2400
    """0 keeps the autoencoder of `--start`."""
    hspace_steps: int = 2100
    prior_steps: int = 2400
    teacher_steps: int = 1500
    """0 keeps the teacher of `--start`."""
    student_steps: int = 2500
    """0 keeps the student of `--start`."""
    perceptual_steps: int = 1200
    batch_size: int = 64
    """Batch size of the UNet phases `hspace`, `teacher` and `student`; the others have constants."""


class Training:
    """Runs the phases, which exchange their results through the output folder."""

    def __init__(
        self,
        recipe: Recipe,
        drawings: Sequence[Drawing],
        anything: Sequence[Path],
        folder: Path,
        tracker: Tracker,
        start: Path | None = None,
    ) -> None:
        """Decode the drawings and choose the device.

        Args:
            recipe: the hyperparameters.
            drawings: drawings to train on.
            anything: folders of unlabelled pictures, which autoencoder and student learn to reconstruct.
            folder: output folder.
            tracker: receives losses and image grids.
            start: folder of initial weights; None starts from random weights.
        """
        self._recipe, self._folder, self._tracker, self._start = recipe, folder, tracker, start
        self._drawings, self._anything = drawings, anything
        self._pictures = Pictures.of(drawings)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self) -> None:
        """Run the phases that are not finished yet.

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
        self._finished("teacher", UNet2DConditionModel, lambda: self._train_teacher(common))
        network = self._finished("perceptual", LatentNetwork, lambda: self._train_perceptual(latents))
        self._finished("unet", UNet2DConditionModel, lambda: self._train_student(network, common))
        build_scheduler().save_pretrained(self._folder / "scheduler")

    def _finished(self, part: str, kind: type[ModelMixin], train: Callable[[], ModelMixin]) -> Any:
        """Train a part and save it in float16, unless it exists already; return it as it is loaded, in float32."""
        folder = self._folder / part
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            if self._start is not None and part in self._kept:
                shutil.copytree(self._start / part, partial, dirs_exist_ok=True)
            else:
                train().eval().half().save_pretrained(partial)
            partial.rename(folder)
        return kind.from_pretrained(folder, torch_dtype=torch.float32).eval().to(self._device)

    @property
    def _kept(self) -> tuple[str, ...]:
        """Parts that a training with `--start` copies unchanged."""
        return ("perceptual",) if self._recipe.vae_steps else ("vae", "perceptual")

    def _train_vae(self) -> ModelMixin:
        former = None
        if self._start is not None:
            former = AutoencoderKL.from_pretrained(
                self._start / "vae", torch_dtype=torch.float32, local_files_only=True
            )
        shown = Pictures.of(load_drawings(splits=[_SHOWN_SPLIT])[::23][:32])
        recipe = self._recipe
        phase = VaePhase(
            self._pictures,
            *self._cutouts,
            shown,
            steps=recipe.vae_steps,
            seed=recipe.seed,
            device=self._device,
            former=former,
        )
        self._run(phase)
        if former is None:
            normalize_latents(phase.vae, encode_all(phase.vae.eval(), self._pictures.pixels, self._device))
        return phase.vae

    def _train_teacher(self, common: dict[str, Any]) -> ModelMixin:
        if not self._recipe.teacher_steps:
            return self._started("teacher") or self._initial(common)
        former = None if self._recipe.prior_steps else self._started("teacher")
        phase = TeacherPhase(
            "teacher",
            former or self._initial(common),
            **common,
            steps=self._recipe.teacher_steps,
            learning_rate=1e-3,
            reads=False,
        )
        self._run(phase)
        return phase.ema.module

    def _initial(self, common: dict[str, Any]) -> UNet2DConditionModel:
        """Return the UNet that teacher and student start from: the student of `--start`, or a new one, with a prior.

        Phases that are finished are not run again.
        """
        unet = self._started("unet") or self._train_hspace(common)
        if not self._recipe.prior_steps:
            return unet
        without_size = {name: value for name, value in common.items() if name != "batch_size"}
        prior = PriorPhase(unet, **without_size, steps=self._recipe.prior_steps)
        self._run(prior)
        return prior.unet

    def _train_hspace(self, common: dict[str, Any]) -> UNet2DConditionModel:
        torch.manual_seed(self._recipe.seed)
        phase = TeacherPhase(
            "hspace", build_unet(), **common, steps=self._recipe.hspace_steps, learning_rate=2e-3, reads=True
        )
        self._run(phase)
        return _copy(phase.ema.module)

    def _train_student(self, network: LatentNetwork, common: dict[str, Any]) -> ModelMixin:
        if not self._recipe.student_steps:
            return self._initial(common)
        phase = StudentPhase(
            self._initial(common),
            LatentDistance(network, "tiny"),
            *self._cutouts,
            **common,
            steps=self._recipe.student_steps,
        )
        if self._checkpoint is not None:
            start_from(phase, self._checkpoint)
        self._run(phase)
        return phase.ema.module

    @cached_property
    def _cutouts(self) -> tuple[Cutouts, Cutouts]:
        """The drawings and the unlabelled pictures as cutouts."""
        return Cutouts.of_drawings(self._pictures.pixels), Cutouts.of_files(self._anything)

    @property
    def _checkpoint(self) -> Path | None:
        """The student's checkpoint in the folder `--start`, or None. `prior` changes the student that it is of."""
        if self._start is None or self._recipe.prior_steps:
            return None
        path = self._start / f"{StudentPhase.name}{CHECKPOINT_SUFFIX}"
        return path if path.exists() else None

    def _started(self, part: str) -> UNet2DConditionModel | None:
        """Return a UNet with the initial weights of `--start`, or None."""
        if self._start is None:
            return None
        unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(
            self._start / part, torch_dtype=torch.float32, local_files_only=True
        )
        return deepened(unet)

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
        """Write the manifest, or check that an existing one has the same recipe."""
        path = self._folder / tiny_base.MANIFEST_NAME
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
        """Return the recipe for the manifest, with the digests of the initial weights."""
        recipe = asdict(self._recipe)
        if self._start is None:
            return recipe
        weights = {part: self._start / part / "diffusion_pytorch_model.safetensors" for part in _PARTS}
        before = json.loads((self._start / tiny_base.MANIFEST_NAME).read_text())["recipe"]
        if self._checkpoint is not None:
            weights["checkpoint"] = self._checkpoint
        return recipe | {"start": {part: sha256_of(path) for part, path in weights.items()} | {"recipe": before}}


def _copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    config = {name: value for name, value in unet.config.items() if name != "_name_or_path"}  # a path on this machine
    copy = UNet2DConditionModel.from_config(config)
    copy.load_state_dict(unet.state_dict())
    return copy


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded base model on the sample corpus.")
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="folders of unlabelled PNG pictures")
    parser.add_argument("--start", type=Path, help="folder of initial weights")
    parser.add_argument(
        "--out",
        type=Path,
        default=tiny_base.FOLDER,
        help="output folder of weights and manifest (default: %(default)s)",
    )
    parser.add_argument(
        "--home", type=Path, default=Path(".imagerag"), help="home with MLflow's store (default: %(default)s)"
    )
    recipe, arguments = parse(parser, Recipe)
    folder, drawings = arguments.out, load_drawings(splits=[_SPLIT])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tracked(Settings(home=arguments.home), "tiny", folder.name, asdict(recipe)) as tracker:
            Training(recipe, drawings, arguments.pictures, folder, tracker, arguments.start).run()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
