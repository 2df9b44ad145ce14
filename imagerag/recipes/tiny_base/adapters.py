"""Benchmark of adapters of the embedded base model on held-out concepts.

python -m imagerag.recipes.tiny_base.adapters adapter=FOLDER,FOLDER lora=FOLDER,FOLDER

Each held-out concept is generated in three styles, in one step each, with references in other styles than the target
drawing. The baselines need no training: slerp at fixed weights, and at the weight that is best on other concepts that
the base model was not trained on. The folders of one name are trainings with different seeds.

A second table shows the similarity of pictures to their references by adapter scale and slerp weight, with references
in other styles, and with the target drawing among them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from imagerag.artifacts import TrainingSet
from imagerag.base.model import BaseModel, load_base
from imagerag.embedded.sample import load_drawings
from imagerag.evaluation.compare import TEACHER_STEPS, teacher_guidance
from imagerag.evaluation.curve import Point, to_svg
from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.generation.finetuned import MANIFEST, load_finetuned
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.generation.sheet import sheet
from imagerag.hspace.adapter import HSpaceAdapter, gate
from imagerag.hspace.encode import encode_latents, open_images
from imagerag.hspace.slerp import slerp
from imagerag.hspace.split import decode, encode
from imagerag.recipes.tiny_base.measure import NONE, ONE, RANDOM, RIGHT, Judges, Measurer, Row, pixels
from imagerag.training.config import ReferenceChoice
from imagerag.training.data import Ints, RagBatch, RagData
from imagerag.training.diffusion import Diffusion

FIXED_WS = (0.8, 0.5, 0.2, 0.0, -0.5)
VALIDATED_WS = (-0.75, -0.5, -0.25, *(number / 10 for number in range(10)))
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)
_VALIDATION_SPLIT = "adapter"
_SHOWN = 12
_RIGHT = {"4 references": RIGHT, "1 reference": ONE}

Model = tuple[BaseModel, HSpaceAdapter | None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """Generated pictures of the examples with their references."""

    title: str
    made: list[torch.Tensor]
    """Generated latents (N, C, H, W) for each seed."""
    shown: list[Ints] | None
    """References for each seed, as numbers of drawings (N, K), padded with -1; None without references."""


@dataclass(frozen=True, kw_only=True)
class CopyPoint:
    """One point on a curve of recognition against copies."""

    curve: str
    setting: str
    row: Row


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements of the benchmark."""

    rows: tuple[Row, ...]
    best_w: float
    """Best slerp weight on other concepts than those of `rows`."""
    gains: dict[str, Estimate]
    """Paired difference in recognition by concept: each adapter's way with references minus slerp with `best_w`."""
    copies: tuple[CopyPoint, ...] = field(default=())

    def markdown(self) -> str:
        """Return the report as Markdown tables."""
        lines = [_ROW_HEAD, _line_under(_ROW_HEAD)]
        for row in self.rows:
            cells = [row.title, row.recognised, ", ".join(f"{value:.3f}" for value in row.by_seed)]
            cells += [
                row.recognised_second,
                f"{row.disagreement:.3f}",
                row.identified,
                row.latent_error,
                row.sharpness,
            ]
            cells += [row.nearest or "", row.copies or ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", f"The best w of slerp on other concepts: {self.best_w}."]
        lines += [
            f"Recognised, {title} minus slerp with that w, paired by concept: {gain}."
            for title, gain in self.gains.items()
        ]
        lines += ["", _COPY_HEAD, _line_under(_COPY_HEAD)]
        for point in self.copies:
            cells = [point.curve, point.setting, point.row.recognised, point.row.recognised_second]
            cells += [point.row.nearest or "", point.row.copies or ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + "\n"

    def curves(self) -> str:
        """Return the curves of recognition against copies as SVG."""
        curves: dict[str, list[Point]] = {}
        for each in self.copies:
            assert each.row.copies is not None, each
            point = Point(label=each.setting, x=each.row.copies.mean, y=each.row.recognised.mean)
            curves.setdefault(each.curve, []).append(point)
        return to_svg(curves, x_title="share of copies", y_title="recognised among 100")


_ROW_HEAD = (
    "| | recognised among 100 | by seed | recognised, second judge | judges disagree | identified | latent error "
    "| sharpness | similarity to the nearest reference | copies |"
)
_COPY_HEAD = "| | setting | recognised | second judge | similarity to the nearest reference | copies |"


def one_step(
    base: BaseModel,
    adapter: HSpaceAdapter | None,
    batch: RagBatch,
    *,
    w: float | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Generate clean latents (B, C, H, W) in one step.

    Args:
        base: the base model.
        adapter: fuses the references; None uses slerp or no fusion.
        batch: noise, text features and references.
        w: slerp weight, with the first reference; None without an adapter means no fusion.
        scale: adapter scale; None uses the adapter's default.
    """
    diffusion = Diffusion(base.scheduler)
    last = torch.full((len(batch.noise),), diffusion.last)
    noised = diffusion.add_noise(torch.zeros_like(batch.noise), batch.noise, last)
    with torch.inference_mode():
        target = encode(base.unet, noised, last, batch.text)
        h = target.h
        if adapter is not None:
            own_scale = adapter.config.default_scale if scale is None else scale
            h = adapter(h, batch.h_references, gate(batch.similarities, 0.0), own_scale).sample
        elif w is not None:
            h = slerp(h, batch.h_references[:, 0], w)
        return diffusion.to_clean(decode(base.unet, replace(target, h=h)), noised, last)


class Maker:
    """Generates the pictures of a measurer's examples."""

    def __init__(self, measurer: Measurer, base: BaseModel) -> None:
        self._measurer, self._base = measurer, base

    def way(
        self,
        title: str,
        models: Sequence[Model],
        choice: ReferenceChoice,
        *,
        w: float | None = None,
        scale: float | None = None,
        with_itself: bool = False,
    ) -> Way:
        """Generate pictures with one model per seed.

        Args:
            title: title of the way.
            models: one model per seed.
            choice: which references to use.
            w: slerp weight.
            scale: adapter scale; None uses the adapter's default.
            with_itself: whether to insert the target drawing as the first reference.
        """
        made, shown = [], []
        for seed, model in enumerate(models):
            batches = self._measurer.batches(choice, seed)
            drawings = self._measurer.shown(choice, seed)
            if with_itself:
                batches = map(self._with_itself, batches)
                drawings = np.concatenate([self._measurer.own(), drawings[:, : choice.number - 1]], 1)
            made.append(torch.cat([one_step(*model, batch, w=w, scale=scale) for batch in batches]))
            shown.append(drawings)
        return Way(
            title=title, made=made, shown=None if choice.none == 1 or (w is None and models[0][1] is None) else shown
        )

    def references(self, data: RagData) -> Way:
        """Return the first references themselves, encoded by the autoencoder: the score of a perfect copy."""
        images, rows = data.images(), data.choose(self._measurer.examples, ONE, np.random.default_rng(0))[:, 0]
        parts = np.array_split(rows, -(-len(rows) // 64))
        vae, unet = self._base.vae, self._base.unet
        made = [encode_latents(vae, unet, open_images([images[row] for row in part]), "crop") for part in parts]
        return Way(
            title="the first reference itself, through the autoencoder",
            made=[torch.cat(made)],
            shown=[self._measurer.shown(ONE, 0)],
        )

    def teacher(self) -> Way:
        """Generate pictures with the teacher, without references."""
        pipeline = ImageRAGTurboPipeline.from_base(load_base("tiny-teacher", "cpu"))
        pipeline.set_progress_bar_config(disable=True)
        prompts, made = list(self._measurer.prompts), []
        for batch in self._measurer.batches(NONE, 0):
            part, prompts = prompts[: len(batch.noise)], prompts[len(batch.noise) :]
            guidance = teacher_guidance("tiny-teacher")
            output = pipeline(
                part, latents=batch.noise, num_inference_steps=TEACHER_STEPS, guidance_scale=guidance,
                output_type="latent",
            )  # fmt: skip
            made.append(output.images)
        return Way(title=f"teacher, {TEACHER_STEPS} steps, no references", made=[torch.cat(made).clone()], shown=None)

    def _with_itself(self, batch: RagBatch) -> RagBatch:
        with torch.inference_mode():
            own = encode(self._base.unet, batch.latents, torch.zeros(len(batch.latents)), batch.text).h
        others = batch.h_references[:, : batch.h_references.shape[1] - 1]
        similarities = torch.cat([torch.ones(len(own), 1), batch.similarities[:, : others.shape[1]]], 1)
        return replace(batch, h_references=torch.cat([own[:, None], others], 1), similarities=similarities)


def choose_w(data: RagData, judges: Judges, base: BaseModel) -> float:
    """Return the w with which the first judge recognises most of slerp's pictures, on the adapters' training concepts.

    Neither the base model nor the first judge was trained on them, and slerp needs no training.
    """
    measurer = Measurer.of_split(data, judges, _VALIDATION_SPLIT, per_concept=1)
    maker = Maker(measurer, base)
    ways = {w: maker.way(f"w = {w}", [(base, None)], ONE, w=w) for w in VALIDATED_WS}
    return max(ways, key=lambda w: measurer.measure("", ways[w].made, base).recognised.mean)


def make_report(adapters: dict[str, list[Path]], out: Path) -> Report:
    """Run the benchmark, and write `adapters.json`, `adapters.md`, `copies.svg` and image grids to `out`.

    Args:
        adapters: folders of trainings with different seeds, by name.
        out: output folder.
    """
    base = load_base("tiny", "cpu")
    first = json.loads((next(iter(adapters.values()))[0] / MANIFEST).read_text())
    data = RagData(TrainingSet(**first["training_set"]), base)
    judges = Judges(load_drawings())
    measurer = Measurer.of_split(data, judges, "held_out")
    maker = Maker(measurer, base)
    best_w = choose_w(data, judges, base)
    plain: list[Model] = [(base, None)] * max(map(len, adapters.values()))

    ways = [maker.way("base, no references", plain, NONE)]
    ways += [maker.way(f"slerp, w = {w}, 1 reference", plain, ONE, w=w) for w in FIXED_WS]
    best = maker.way(f"slerp, w = {best_w}, the best on other concepts", plain, ONE, w=best_w)
    ways.append(best)
    with_references: dict[str, list[Model]] = {}
    compared: list[str] = []
    for name, folders in adapters.items():
        models: list[Model] = []
        for folder in folders:
            own = load_base("tiny", "cpu")
            models.append((own, load_finetuned(folder, own)))
        if json.loads((folders[0] / MANIFEST).read_text())["config"]["references"]["number"]:
            with_references[name] = models
            right = [maker.way(f"{name}, {number}", models, choice) for number, choice in _RIGHT.items()]
            compared += [way.title for way in right]
            ways += [*right, maker.way(f"{name}, random references", models, RANDOM)]
        ways.append(maker.way(f"{name}, no references", models, NONE))
    ways += [maker.references(data), maker.teacher()]
    rows = {way.title: measurer.measure(way.title, way.made, base, way.shown) for way in tqdm(ways, unit=" ways")}
    slerps = np.array(rows[best.title].by_concept)
    report = Report(
        rows=tuple(rows.values()),
        best_w=best_w,
        gains={title: estimate(np.array(rows[title].by_concept) - slerps) for title in compared},
        copies=tuple(_copies(measurer, maker, base, {name: models[0] for name, models in with_references.items()})),
    )
    _write(out, report, measurer, base, ways)
    return report


def _copies(measurer: Measurer, maker: Maker, base: BaseModel, models: dict[str, Model]) -> list[CopyPoint]:
    points = []
    for itself in (False, True):
        shown = "the drawing itself among the references" if itself else "references in other styles"
        for w in tqdm(FIXED_WS, desc="copies by w"):
            way = maker.way("slerp", [(base, None)], ONE, w=w, with_itself=itself)
            row = measurer.measure(way.title, way.made, base, way.shown)
            points.append(CopyPoint(curve=f"slerp, {shown}", setting=f"w = {w}", row=row))
        for name, model in models.items():
            for scale in tqdm(SCALES, desc="copies by scale"):
                way = maker.way(name, [model], RIGHT, scale=scale, with_itself=itself)
                row = measurer.measure(way.title, way.made, base, way.shown)
                points.append(CopyPoint(curve=f"{name}, {shown}", setting=f"scale {scale}", row=row))
    return points


def _write(out: Path, report: Report, measurer: Measurer, base: BaseModel, ways: Sequence[Way]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapters.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (out / "adapters.md").write_text(report.markdown())
    (out / "copies.svg").write_text(report.curves())
    real = torch.cat([batch.latents for batch in measurer.batches(NONE, 0)])
    step = max(1, len(real) // _SHOWN)
    prompts = ", ".join(measurer.prompts[::step][:_SHOWN])
    shown = [(f"drawings of {prompts}", real), *((way.title, way.made[0]) for way in ways)]
    sheet([(title, _images(base, latents[::step][:_SHOWN])) for title, latents in shown]).save(out / "adapters.png")
    disputed = [
        (f"{way.title}: the judges disagree", _images(base, way.made[0][list(row.disputed[:_SHOWN])]))
        for way, row in zip(ways, report.rows, strict=True)
        if row.disputed
    ]
    if disputed:
        sheet(disputed).save(out / "disputed.png")


def _images(base: BaseModel, latents: torch.Tensor) -> list[Image.Image]:
    decoded = ((pixels(base, latents) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in decoded]


def _line_under(head: str) -> str:
    return "|---" * (head.count("|") - 1) + "|"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure adapters of the embedded base model on held-out concepts.")
    parser.add_argument(
        "adapters", nargs="+", metavar="NAME=FOLDER,FOLDER", help="output folders of `imagerag finetune`, one per seed"
    )
    parser.add_argument("--out", type=Path, default=Path("adapters"), help="output folder (default: %(default)s)")
    arguments = parser.parse_args()
    pairs = (each.split("=", 1) for each in arguments.adapters)
    adapters = {name: [Path(folder) for folder in folders.split(",")] for name, folders in pairs}
    print(make_report(adapters, arguments.out).markdown())  # noqa: T201


if __name__ == "__main__":
    main()
