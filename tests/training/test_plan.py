"""What a plan says is what comes out."""

from pathlib import Path

import pytest
import torch

from imagerag.base.model import load_base
from imagerag.errors import UserError
from imagerag.training.config import FinetuneConfig, LossWeights, ReferenceChoice
from imagerag.training.plan import PEAK_TFLOPS, UTILISATION, Plan, plan
from imagerag.training.trainer import Finetuning
from tests.training.conftest import World

CONFIG = FinetuneConfig(
    references=ReferenceChoice(number=2), losses=LossWeights(perceptual=0.0), steps=100, batch_size=8,
    micro_batch_size=4, adapter_inner_dim=64, lora_rank=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(world_folder: Path) -> Plan:
    return plan(World(world_folder).examples(), CONFIG)


def test_it_counts_what_a_training_has(world: World, tmp_path: Path) -> None:
    made = plan(world.examples(num_teacher_latents=32), CONFIG)
    base = load_base(world.base, "cpu")
    teacher = load_base(world.base, "cpu").unet
    frozen = sum(parameter.numel() for unet in (base.unet, teacher) for parameter in unet.parameters())
    training = Finetuning(base, teacher, None, CONFIG)
    assert made.num_learning == sum(parameter.numel() for _, parameter in training.generator.learning())
    assert made.num_frozen == frozen
    assert made.num_rows == 8 + 32
    assert made.num_held_out == 2
    assert made.epochs == pytest.approx(100 * 8 / 40)
    torch.save(training.state_dict(), tmp_path / "state.pt")
    training.export(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    # Adam's moments come with the first step.
    assert made.checkpoint_gib * 2**30 == pytest.approx(written + 8 * (made.num_learning + made.num_heads), rel=0.2)


def test_time_is_computation_over_the_machines_share(made: Plan) -> None:
    one, many = made.seconds(PEAK_TFLOPS["L40S"]), made.seconds(PEAK_TFLOPS["L40S"], 64)
    assert one == pytest.approx(64 * many)
    assert one == pytest.approx(100 * 8 * made.tflop_per_row / (362 * UTILISATION))
    assert "64 GPUs" in made.markdown()


def test_the_teachers_pictures_are_counted(world: World, made: Plan) -> None:
    guided, plain = (plan(world.examples(num_teacher_latents=10, guidance_scale=scale), CONFIG) for scale in (7.5, 1.0))
    assert made.teacher_tflop == 0
    assert guided.teacher_tflop == pytest.approx(2 * plain.teacher_tflop)
    assert 0.1 * made.tflop_per_row < plain.teacher_tflop / 20 < made.tflop_per_row, "two steps of ten pictures"
    assert guided.seconds(1.0) > made.seconds(1.0)


def test_losses_that_are_switched_off_cost_nothing(world: World, made: Plan) -> None:
    alone = CONFIG.model_copy(update={"losses": LossWeights(adversarial=0.0, perceptual=0.0)})
    found = plan(world.examples(num_teacher_latents=10, guidance_scale=1.0), alone)
    forward = found.teacher_tflop / 20
    assert 1.3 * forward < found.tflop_per_row < 0.8 * made.tflop_per_row, "it goes backward through the decoder"


def test_timesteps_that_the_base_model_has_not_are_refused(world: World) -> None:
    """Before anything is made: they would be out of the scheduler's bounds in some step."""
    beyond = CONFIG.model_copy(update={"max_timestep": 1_001})
    with pytest.raises(UserError, match="must not exceed the base model's 1000 timesteps, got 1001"):
        plan(world.examples(), beyond)
    assert plan(world.examples(), CONFIG.model_copy(update={"max_timestep": 1_000})).steps == CONFIG.steps


def test_the_encoder_keeps_no_activations(world: World, made: Plan) -> None:
    """What is kept is less than what a UNet's whole forward pass keeps, though there is an adapter."""
    unet, kept = load_base(world.base, "cpu").unet.requires_grad_(True), 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    text = torch.randn(4, 32, 384)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(torch.randn(4, 4, 8, 8), 999, text)
    # In bfloat16, half as much as here.
    assert 0 < 2 * made.activations_gib * 2**30 < 0.9 * kept
