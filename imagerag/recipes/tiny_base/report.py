"""Evaluation of the embedded base model: `imagerag tiny report`.

All metrics are reported for two splits of concepts: `base`, the training split, and `held_out`.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from imagerag.base.files import resolve
from imagerag.base.model import BaseModel, load_base
from imagerag.embedded.sample import Concept, Drawing, load_drawings
from imagerag.embedding.encoder import load_encoder
from imagerag.errors import UserError
from imagerag.evaluation.distances import Distances, measure_distances
from imagerag.evaluation.efficientnet import load_feature_network
from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.evaluation.recognition import ClipJudge, Judge, is_nearest
from imagerag.generation.batch import Generated, generate
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.generation.sheet import sheet
from imagerag.recipes.tiny_base import hspace
from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.vae import encode_all, to_input

SPLITS = ("base", "held_out")
_CPU = torch.device("cpu")
_NUM_IDENTIFIED = 96
_SHEET_CONCEPTS = 48
_SHEET_COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and its sampling parameters."""

    title: str
    base: str
    steps: int
    guidance: float


MODELS = (
    Model(title="teacher, 25 steps", base="tiny-teacher", steps=25, guidance=3.0),
    Model(title="student, 1 step", base="tiny", steps=1, guidance=0.0),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Metrics of one model on the concepts of one split."""

    model: str
    split: str
    distances: Distances
    clip_score: Estimate
    recognised: Estimate
    identified: Estimate | None
    pictures_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All metrics of the report."""

    psnr_db: Estimate
    hspace: hspace.Measures
    read_db: dict[str, Estimate]
    """PSNR of pictures reconstructed from their own `h` alone, by set of pictures."""
    rows: tuple[Row, ...]

    def markdown(self) -> str:
        """Return the report as Markdown."""
        lines = [
            "| pictures by | concepts | recognised among 100 | identified among 96 | CLIP score | FD | KID x 1000 "
            "| pictures/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            kernel = f"{row.distances.kernel:.1f} ± {1.96 * row.distances.kernel_deviation:.1f}"
            cells = [row.model, row.split, row.recognised, row.identified or "", row.clip_score]
            cells += [f"{row.distances.frechet:.1f}", kernel]
            cells += ["" if row.pictures_per_s is None else f"{row.pictures_per_s:.1f}"]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        lines += [
            "",
            f"Autoencoder on held-out drawings: PSNR {self.psnr_db.mean:.1f} dB "
            f"[{self.psnr_db.low:.1f}, {self.psnr_db.high:.1f}]. "
            f"Held-out drawings rebuilt from their `h` at t = 0 alone: latent error {self.hspace.rebuilding}. "
            f"Share of the picture's variance that changes when `h` is zeroed {self.hspace.zeroing:.0%}, "
            f"when it is exchanged within the batch {self.hspace.shuffling:.0%}.",
            "",
            "Given as their own references, with w = 0: "
            + "; ".join(
                f"{what} PSNR {each.mean:.1f} dB [{each.low:.1f}, {each.high:.1f}]"
                for what, each in self.read_db.items()
            )
            + ".",
        ]
        return "\n".join(lines) + "\n"


def make_report(folder: Path, num_prompts: int = 498, photos: Path | None = None) -> Report:
    """Measure the models, and write `report.json`, `report.md` and image grids to `folder`.

    Args:
        folder: output folder.
        num_prompts: pictures per model and split, over the concepts of the split in turn.
        photos: folder of further pictures to reconstruct from their `h`; their file names are their captions.

    Raises:
        UserError: if `photos` has no pictures.
    """
    others = {} if photos is None else {f"pictures in {photos.name}": named_pictures(photos)}
    for model in MODELS:
        resolve(model.base)
    folder.mkdir(parents=True, exist_ok=True)
    measurer = _Measurer(num_prompts)
    rows = []
    with tqdm(total=len(SPLITS) * (1 + len(MODELS) * num_prompts), unit=" pictures", disable=None) as bar:
        for split in SPLITS:
            rows.append(measurer.real(split))
            bar.update()
            for model in MODELS:
                row, pictures = measurer.generated(model, split, bar.update)
                rows.append(row)
                _save_sheet(pictures, folder / f"{model.base}-{split}.png")
    read = {"held-out drawings": measurer.held_out(), **others}
    report = Report(
        psnr_db=measurer.psnr(),
        hspace=measurer.hspace(),
        read_db={what: hspace.read(measurer.base("tiny"), list(own.values()), list(own)) for what, own in read.items()},
        rows=tuple(rows),
    )
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (folder / "report.md").write_text(report.markdown())
    return report


class _Measurer:
    """Shared state of the measurements: drawings, networks and judges."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._drawings = load_drawings()
        self._pictures = Pictures.of(self._drawings)
        self._network = load_feature_network()
        self._encoder = load_encoder("tiny", "cpu")
        self._features = self._network([to_input(self._pictures.pixels, _CPU)])
        self._judge = Judge.of(self._features, self._pictures.concepts.numpy())
        self._concepts: list[Concept] = list({d.concept.codepoint: d.concept for d in self._drawings}.values())
        self._names = self._encoder.encode_texts([concept.name for concept in self._concepts])
        known = np.array([drawing.concept.split != "held_out" for drawing in self._drawings])
        self._clip = ClipJudge.fit(self._features[known], self._names[self._judge.concepts[known]])
        self._bases: dict[str, BaseModel] = {}

    def real(self, split: str) -> Row:
        """Measure real drawings, as an upper bound."""
        own = np.flatnonzero([drawing.concept.split == split for drawing in self._drawings])
        some = np.random.default_rng(0).permutation(own)
        concepts = self._judge.concepts[some]
        found = self._judge.recognised(self._features[some], concepts, self._of(split), ignored=some[:, None])
        half = len(some) // 2
        return Row(
            model="real drawings",
            split=split,
            distances=measure_distances(self._features[some[:half][: self._num_prompts]], self._features[some[half:]]),
            clip_score=estimate(self._clip.scores(self._features[some], self._names[concepts])),
            recognised=estimate(found),
            identified=None,
            pictures_per_s=None,
        )

    def generated(self, model: Model, split: str, on_picture: Callable[[], object]) -> tuple[Row, list[Generated]]:
        """Generate and measure a model's pictures, and return both."""
        concepts = np.resize(np.random.default_rng(0).permutation(self._of(split)), self._num_prompts)
        names = [self._concepts[concept].name for concept in concepts]
        pipeline = ImageRAGTurboPipeline.from_base(self.base(model.base))
        pipeline.set_progress_bar_config(disable=True)
        made: list[Generated] = []
        started = time.perf_counter()
        for seed, name in enumerate(names):
            made += generate(pipeline, [name], [seed], num_inference_steps=model.steps, guidance_scale=model.guidance)
            on_picture()
        seconds = time.perf_counter() - started
        pixels = torch.stack([_to_tensor(picture) for picture in made])
        features = self._network([to_input(pixels, _CPU)])
        real = self._features[np.isin(self._judge.concepts, self._of(split))]
        row = Row(
            model=model.title,
            split=split,
            distances=measure_distances(features, real),
            clip_score=estimate(self._clip.scores(features, self._names[concepts])),
            recognised=estimate(self._judge.recognised(features, concepts, self._of(split))),
            identified=identified(pipeline.vae, made, [self._concepts[c] for c in concepts], self._drawings),
            pictures_per_s=len(made) / seconds,
        )
        return row, made

    def psnr(self) -> Estimate:
        """Return the autoencoder's PSNR on held-out drawings in dB."""
        vae = self.base("tiny").vae
        held_out = torch.tensor([drawing.concept.split == "held_out" for drawing in self._drawings])
        values: list[float] = []
        for part in self._pictures.pixels[held_out].split(64):
            pixels = to_input(part, _CPU)
            with torch.inference_mode():
                rebuilt = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
            values += (10 * torch.log10(4 / (pixels - rebuilt).square().mean((1, 2, 3)))).tolist()
        return estimate(values)

    def hspace(self) -> hspace.Measures:
        """Return the measures of the student's H-space on held-out drawings."""
        base = self.base("tiny")
        chosen = [index for index, drawing in enumerate(self._drawings) if drawing.concept.split == "held_out"]
        latents = encode_all(base.vae, self._pictures.pixels[chosen], _CPU)
        text = base.conditioner.encode([self._drawings[index].concept.name for index in chosen]).embeds
        return hspace.measure(base.unet, latents, text)

    def held_out(self) -> dict[str, Image.Image]:
        """Return one drawing per held-out concept in a random style, by the concept's name."""
        pictures: dict[str, Image.Image] = {}
        own = [drawing for drawing in self._drawings if drawing.concept.split == "held_out"]
        for number in np.random.default_rng(0).permutation(len(own)):
            pictures.setdefault(own[number].concept.name, Image.open(io.BytesIO(own[number].image)))
        return pictures

    def base(self, spec: str) -> BaseModel:
        """Return a cached base model."""
        if spec not in self._bases:
            self._bases[spec] = load_base(spec, "cpu")
        return self._bases[spec]

    def _of(self, split: str) -> list[int]:
        return [number for number, concept in enumerate(self._concepts) if concept.split == split]


def named_pictures(folder: Path) -> dict[str, Image.Image]:
    """Return the jpg, png and webp files in a folder by their names, with spaces for hyphens.

    Raises:
        UserError: if there are none.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".jpg", ".png", ".webp"))
    if not paths:
        raise UserError(f"there are no jpg, png or webp files in {folder}")
    return {path.stem.replace("-", " "): Image.open(path) for path in paths}


def identified(
    vae: AutoencoderKL, made: Sequence[Generated], concepts: Sequence[Concept], drawings: Sequence[Drawing]
) -> Estimate:
    """Return the share of pictures whose latents are nearer to their own concept's than to 95 other concepts'."""
    pictures = Pictures.of(drawings)
    numbers = {codepoint: number for number, codepoint in enumerate(pictures.codepoints)}
    wanted = np.array([numbers[concept.codepoint] for concept in concepts])
    pixels = torch.stack([_to_tensor(picture) for picture in made])
    latents, real = (encode_all(vae, each, _CPU).flatten(1).numpy() for each in (pixels, pictures.pixels))
    distances = (latents**2).sum(1)[:, None] - 2 * latents @ real.T + (real**2).sum(1)
    return estimate(is_nearest(-distances, pictures.concepts.numpy(), wanted, wanted, _NUM_IDENTIFIED))


def _to_tensor(picture: Generated) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.image.convert("RGB"))).permute(2, 0, 1)


def _save_sheet(pictures: list[Generated], path: Path) -> None:
    shown = pictures[:_SHEET_CONCEPTS]
    columns = [shown[start : start + _SHEET_COLUMNS] for start in range(0, len(shown), _SHEET_COLUMNS)]
    sheet([(" · ".join(p.prompt for p in row), [p.image for p in row]) for row in columns]).save(path)
