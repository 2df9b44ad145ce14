"""How much adapters of the embedded base model help on concepts that nothing was trained on.

python -m imagerag.tiny.adapters --name sample adapter=FOLDER,FOLDER lora=FOLDER,FOLDER

Each held-out concept is drawn in three styles, in one step each, with references in other styles than the drawing that
it is compared with. What a picture was shown does not count among the drawings by which it is recognised, so that a
copy is worth no more than what it shows. Folders of one name are trainings with different seeds.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from imagerag.artifacts import TrainingSet
from imagerag.corpus.sample import load_drawings
from imagerag.evaluation.compare import TEACHER_GUIDANCE, TEACHER_STEPS
from imagerag.evaluation.features import load_feature_network
from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.evaluation.recognition import Judge
from imagerag.generation.base import BaseModel, load_base
from imagerag.generation.finetuned import MANIFEST, load_finetuned
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.generation.sheet import sheet
from imagerag.hspace.adapter import HSpaceAdapter, gate
from imagerag.hspace.slerp import slerp
from imagerag.hspace.split import decode, encode
from imagerag.settings import Settings
from imagerag.tiny.data import Pictures
from imagerag.tiny.vae import to_input
from imagerag.training.config import ReferenceChoice
from imagerag.training.data import Ints, RagBatch, RagData
from imagerag.training.diffusion import Diffusion

_CPU = torch.device("cpu")
_STYLES_OF_A_CONCEPT = 3
_BATCH_SIZE = 64
_SHOWN = 12
_RIGHT = ReferenceChoice(number=4, none=0.0, random=0.0)
_ONE = ReferenceChoice(number=1, none=0.0, random=0.0)
_RANDOM = ReferenceChoice(number=4, none=0.0, random=1.0)
_NONE = ReferenceChoice(number=4, none=1.0, random=0.0)


Model = tuple[BaseModel, HSpaceAdapter | None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to make pictures."""

    title: str
    recognised: Estimate
    """Share whose concept is the nearest of 100."""
    identified: Estimate
    """Share whose latents are nearer to a drawing of their own concept than to any other held-out one, in its style."""
    latent_error: Estimate
    """Mean squared difference to the drawing's latents, whose variance is one."""
    sharpness: Estimate
    """Energy of the gradients over that of drawings."""
    by_seed: tuple[float, ...]
    """Share recognised, training by training."""


class Measurer:
    """Holds what all ways share."""

    def __init__(self, data: RagData) -> None:
        self._data = data
        drawings = load_drawings()
        pictures = Pictures.of(drawings)
        self._network = load_feature_network()
        self._judge = Judge.of(self._network([to_input(pictures.pixels, _CPU)]), pictures.concepts.numpy())
        numbers = dict(zip((d.concept.name for d in drawings), pictures.concepts.tolist(), strict=True))
        self._names = np.array([numbers.get(prompt, -1) for prompt in data.prompts])
        self._candidates = np.unique(self._names[data.held_out])
        self._drawing_of = {drawing.image: number for number, drawing in enumerate(drawings)}
        self._styles = pictures.styles.numpy()
        self.examples = self._some_of_each()
        self.prompts = [data.prompts[example] for example in self.examples]

    def _some_of_each(self) -> Ints:
        """Return up to three examples of each held-out concept."""
        order = np.random.default_rng(0).permutation(self._data.held_out)
        chosen = [order[self._names[order] == concept][:_STYLES_OF_A_CONCEPT] for concept in self._candidates]
        return np.sort(np.concatenate(chosen))

    def measure(self, title: str, made: Sequence[torch.Tensor], shown: ReferenceChoice, base: BaseModel) -> Row:
        """Measure latents (N, C, H, W) of the examples, of each training one."""
        real = torch.cat([batch.latents for batch in self.batches(_NONE, 0)])
        concepts, per_seed = self._names[self.examples], []
        for seed, latents in enumerate(made):
            features = self._network(_pixels(base, part) for part in latents.split(_BATCH_SIZE))
            ignored = self._shown_drawings(shown, seed)
            recognised = self._judge.recognised(features, concepts, self._candidates, ignored)
            errors = (latents - real).square().mean((1, 2, 3)).numpy()
            energies = (_energy(latents) / _energy(real).mean()).numpy()
            per_seed.append(np.stack([recognised, self._identified(latents, real), errors, energies]))
        values = np.mean(per_seed, axis=0)
        by_concept = np.stack([values[:, concepts == concept].mean(1) for concept in self._candidates], 1)
        names = ("recognised", "identified", "latent_error", "sharpness")
        measured = {name: estimate(own) for name, own in zip(names, by_concept, strict=True)}
        return Row(title=title, **measured, by_seed=tuple(float(each[0].mean()) for each in per_seed))

    def batches(self, choice: ReferenceChoice, seed: int) -> Iterator[RagBatch]:
        """Yield the examples with references; the noise of a seed is the same for all ways."""
        for number, part in enumerate(np.array_split(self.examples, -(-len(self.examples) // _BATCH_SIZE))):
            noise = np.random.default_rng([seed, number, 1]).standard_normal((len(part), *self._shape), np.float32)
            batch = self._data.read(part, choice, np.random.default_rng([seed, number]))
            yield replace(batch, noise=torch.from_numpy(noise))

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self._data.read(self.examples[:1], _NONE, np.random.default_rng(0)).latents.shape[1:])

    def _shown_drawings(self, choice: ReferenceChoice, seed: int) -> Ints:
        """Return which of the judge's drawings each example was shown (N, K)."""
        images = self._data.images()
        numbers = np.array([self._drawing_of.get(image, -1) for image in images] + [-1])
        parts = np.array_split(self.examples, -(-len(self.examples) // _BATCH_SIZE))
        rows = [
            self._data.choose(part, choice, np.random.default_rng([seed, number])) for number, part in enumerate(parts)
        ]
        return numbers[np.concatenate(rows)]

    def _identified(self, latents: torch.Tensor, real: torch.Tensor) -> np.ndarray:
        distances = torch.cdist(latents.flatten(1), real.flatten(1)).numpy()
        concepts = self._names[self.examples]
        return np.asarray(concepts[distances.argmin(1)] == concepts)


def one_step(
    base: BaseModel, adapter: HSpaceAdapter | None, batch: RagBatch, *, w: float | None = None
) -> torch.Tensor:
    """Return clean latents by the adapter, by slerp with the first reference, or by the base model alone."""
    diffusion = Diffusion(base.scheduler)
    last = torch.full((len(batch.noise),), diffusion.last)
    noised = diffusion.add_noise(torch.zeros_like(batch.noise), batch.noise, last)
    with torch.inference_mode():
        target = encode(base.unet, noised, last, batch.text)
        h = target.h
        if adapter is not None:
            h = adapter(h, batch.h_references, gate(batch.similarities, 0.0))
        elif w is not None:
            h = slerp(h, batch.h_references[:, 0], w)
        return diffusion.to_clean(decode(base.unet, replace(target, h=h)), noised, last)


def make_report(adapters: dict[str, list[Path]], settings: Settings, out: Path) -> list[Row]:
    """Measure everything, and write `adapters.json`, `adapters.md` and a grid to `out`."""
    base = load_base("tiny", "cpu")
    first = json.loads((next(iter(adapters.values()))[0] / MANIFEST).read_text())
    data = RagData(TrainingSet(**first["training_set"]), base)
    measurer = Measurer(data)
    seeds = range(max(map(len, adapters.values())))
    ways: list[tuple[str, list[torch.Tensor], ReferenceChoice]] = []

    def add(title: str, models: Sequence[Model], choice: ReferenceChoice, w: float | None = None) -> None:
        made = [
            torch.cat([one_step(*model, batch, w=w) for batch in measurer.batches(choice, seed)])
            for seed, model in zip(seeds, models, strict=False)
        ]
        ways.append((title, made, choice))

    plain: list[Model] = [(base, None) for _ in seeds]
    add("base, no references", plain, _NONE)
    for w in (0.8, 0.2):
        add(f"slerp, w = {w}, 1 reference", plain, _ONE, w)
    for name, folders in adapters.items():
        models: list[Model] = []
        for folder in folders:
            own = load_base("tiny", "cpu")
            models.append((own, load_finetuned(folder, own)))
        learnt = json.loads((folders[0] / MANIFEST).read_text())["config"]["references"]["number"]
        if learnt:
            add(f"{name}, 4 references", models, _RIGHT)
            add(f"{name}, 1 reference", models, _ONE)
            add(f"{name}, random references", models, _RANDOM)
        add(f"{name}, no references", models, _NONE)
    ways.append(("teacher, 25 steps, no references", [_by_teacher(measurer)], _NONE))
    rows = [measurer.measure(title, made, choice, base) for title, made, choice in tqdm(ways, unit=" ways")]
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapters.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (out / "adapters.md").write_text(to_markdown(rows))
    step = len(measurer.examples) // _SHOWN
    real = torch.cat([batch.latents for batch in measurer.batches(_NONE, 0)])
    prompts = ", ".join(measurer.prompts[::step][:_SHOWN])
    shown = [(f"drawings of {prompts}", real), *((title, made[0]) for title, made, _ in ways)]
    sheet([(title, _images(base, latents[::step][:_SHOWN])) for title, latents in shown]).save(out / "adapters.png")
    return rows


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    lines = [
        "| | recognised among 100 | by training | identified | latent error | sharpness |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        by_seed = ", ".join(f"{value:.3f}" for value in row.by_seed)
        lines.append(
            f"| {row.title} | {row.recognised} | {by_seed} | {row.identified} | {row.latent_error} | {row.sharpness} |"
        )
    return "\n".join(lines) + "\n"


def _by_teacher(measurer: Measurer) -> torch.Tensor:
    teacher = load_base("tiny-teacher", "cpu")
    pipeline = ImageRAGTurboPipeline.from_base(teacher)
    pipeline.set_progress_bar_config(disable=True)
    prompts = measurer.prompts
    made = []
    with tqdm(total=len(prompts), desc="teacher", unit=" pictures") as bar:
        for batch in measurer.batches(_NONE, 0):
            part, prompts = prompts[: len(batch.noise)], prompts[len(batch.noise) :]
            guidance = TEACHER_GUIDANCE["tiny-teacher"]
            made.append(
                pipeline(
                    part, latents=batch.noise, num_inference_steps=TEACHER_STEPS, guidance_scale=guidance,
                    output_type="latent",
                ).images
            )  # fmt: skip
            bar.update(len(part))
    return torch.cat(made).clone()


def _pixels(base: BaseModel, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        pixels: torch.Tensor = base.vae.decode(latents / base.vae.config.scaling_factor).sample.clamp(-1, 1)
    return pixels


def _images(base: BaseModel, latents: torch.Tensor) -> list[Image.Image]:
    pixels = ((_pixels(base, latents) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in pixels]


def _energy(latents: torch.Tensor) -> torch.Tensor:
    across, down = latents.diff(dim=3).square().mean((1, 2, 3)), latents.diff(dim=2).square().mean((1, 2, 3))
    return across + down


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure adapters of the embedded base model on held-out concepts.")
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER,FOLDER", help="what `imagerag finetune` wrote")
    parser.add_argument("--out", type=Path, default=Path("adapters"), help="%(default)s")
    arguments = parser.parse_args()
    pairs = (each.split("=", 1) for each in arguments.adapters)
    adapters = {name: [Path(folder) for folder in folders.split(",")] for name, folders in pairs}
    print(to_markdown(make_report(adapters, Settings(), arguments.out)))  # noqa: T201


if __name__ == "__main__":
    main()
