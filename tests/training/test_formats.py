"""Students of SDXL's format, with two text encoders, and of LCM's, which is told of guidance, are trained as others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imagerag.base.model import BaseModel, load_base
from imagerag.errors import UserError
from imagerag.generation.finetuned import load_finetuned
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.training import generator as training_generator
from imagerag.training.config import FinetuneConfig, LossWeights, ReferenceChoice
from imagerag.training.data import RagBatch, RagData
from imagerag.training.diffusion import Diffusion
from imagerag.training.generator import Generator
from imagerag.training.loader import Loader
from imagerag.training.plan import plan
from imagerag.training.trainer import Finetuning
from tests.generation.folders import write_lcm, write_sd, write_sdxl
from tests.generation.with_index import drawing, make_pipeline, write_store
from tests.training.conftest import HELD_OUT, World

WRITERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path]]] = {
    "sdxl-turbo": (write_sdxl, write_sdxl),
    "lcm": (write_lcm, write_sd),
}
"""Student and teacher."""
CONFIG = FinetuneConfig(
    references=ReferenceChoice(number=2), losses=LossWeights(perceptual=0.0), steps=3, batch_size=4,
    micro_batch_size=4, warmup_steps=1, adapter_inner_dim=64, lora_rank=2, learning_rate=1e-2, num_validated=2,
)  # fmt: skip


class FormatWorld(World):
    """Its teacher's pictures are larger than the student's."""

    def config(self, **changes: object) -> object:  # type: ignore[override]
        return super().config(**{"teacher": str(Path(self.base).with_name("teacher"))} | changes)


@pytest.fixture(scope="module", params=WRITERS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = FormatWorld(tmp_path_factory.mktemp(request.param))
    student, teacher = WRITERS[request.param]
    student(Path(world.base))
    config = teacher(Path(world.base).with_name("teacher")) / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    world.held_out.write_text("\n".join(HELD_OUT))
    write_store(Path(world.settings.index_uri), make_pipeline())
    world.add(8, ["castle"], [drawing(20)])
    return world


@pytest.fixture(scope="module")
def base(world: World) -> BaseModel:
    return load_base(world.base, "cpu")


@pytest.fixture(scope="module")
def data(world: World) -> RagData:
    return world.data(world.synthesize(num_teacher_latents=4))


@pytest.fixture(scope="module")
def batch(data: RagData) -> RagBatch:
    return data.read(data.learnt[:3], CONFIG.references, np.random.default_rng(0))


def make_generator(base: BaseModel) -> Generator:
    adapter = HSpaceAdapter(channels=64, inner_dim=64, num_heads=2)
    return Generator(base.unet, adapter, Diffusion(base.scheduler), lora_rank=0)


def test_before_training_it_makes_the_pipelines_pictures(
    base: BaseModel, data: RagData, batch: RagBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = ImageRAGTurboPipeline.from_base(base)
    prompts = data.prompts(data.learnt[:3])
    expected = pipeline(prompts, latents=batch.noise, output_type="latent").images

    def is_expected(made: torch.Tensor) -> bool:
        return torch.allclose(made, expected, atol=0.01 * float(expected.abs().max()))

    generator = make_generator(base)
    with torch.no_grad():
        assert is_expected(generator(batch))
        if batch.added:
            for name, own in batch.added.items():
                other = replace(batch, added=batch.added | {name: torch.zeros_like(own)})
                assert not is_expected(generator(other)), name
        else:
            monkeypatch.setattr(training_generator, "LCM_GUIDANCE", 0.0)
            assert not is_expected(generator(batch))


def test_a_batch_is_moved_with_all_that_it_has(batch: RagBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert moved.latents.is_meta
    assert moved.added.keys() == batch.added.keys()
    assert all(own.is_meta for own in moved.added.values())


def test_it_is_trained_kept_and_used(world: World, data: RagData, tmp_path: Path) -> None:
    teacher = load_base(world.examples().teacher.identity.id, "cpu").unet
    training = Finetuning(load_base(world.base, "cpu"), teacher, None, CONFIG)
    before = training.generator.adapter.to_gate.bias.clone()
    for loads in Loader(data, CONFIG, torch.device("cpu")).steps(0):
        values = training.step(loads)
        assert values["skipped"] == 0
        assert np.isfinite([values["adversarial"], values["discriminator"], values["distillation"]]).all()
    assert not torch.equal(training.generator.adapter.to_gate.bias, before)
    training.export(tmp_path)
    student = load_base(world.base, "cpu")
    pipeline = ImageRAGTurboPipeline.from_base(student, load_finetuned(tmp_path, student))
    store = world.store
    pipeline.use_index(store.uri, store.name)
    made = [pipeline("a castle", adapter_scale=scale, output_type="latent",
                     generator=torch.Generator().manual_seed(0)).images for scale in (0.0, 2.0)]  # fmt: skip
    assert not torch.allclose(*made, atol=1e-4)


def test_it_is_planned(world: World, base: BaseModel) -> None:
    made = plan(world.examples(num_teacher_latents=4), CONFIG)
    teacher = load_base(world.examples().teacher.identity.id, "cpu").unet
    assert made.num_frozen == sum(p.numel() for unet in (base.unet, teacher) for p in unet.parameters())
    assert made.num_rows == 9 - 2 + 4
    assert made.teacher_tflop > 0
    assert "training rows" in made.markdown()


def test_a_teacher_of_another_format_is_refused(world: World, tmp_path: Path) -> None:
    student = json.loads((Path(world.base) / "unet" / "config.json").read_text())
    other = write_sd(tmp_path) if student.get("addition_embed_type") else write_sdxl(tmp_path)
    with pytest.raises(UserError, match="student and teacher share latents and text features: "):
        world.examples(teacher=str(other)).check()
