"""Estimate of a fine-tuning's memory, computation and time, with models built on the meta device."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagerag.base.files import read_json
from imagerag.storage.keyed_table import shape_of
from imagerag.training.config import FinetuneConfig
from imagerag.training.examples import Examples

if TYPE_CHECKING:
    import torch

    from imagerag.training.generator import Generator

PEAK_TFLOPS = {"L40S": 362.0, "A100": 312.0, "H100": 989.0}
"""Peak dense bfloat16 throughput with float32 accumulation, from the data sheets."""
UTILISATION = 0.35
"""Assumed share of the peak throughput; the actual one depends on the machine."""
_GIB = 2**30
_ADAM_COPIES = 4  # weight, gradient and Adam's two moments
_MEASURED_ROWS = 2
_PROBES = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimated resources of one fine-tuning."""

    num_rows: int
    """Training rows."""
    num_held_out: int
    steps: int
    batch_size: int
    micro_batch_size: int
    num_learning: int
    """Trainable parameters of adapter and LoRA."""
    num_heads: int
    """Trainable parameters of the discriminator."""
    num_frozen: int
    """Frozen parameters of student and teacher."""
    tflop_per_row: float
    """TFLOP per row and step, without the perceptual loss, whose network is small."""
    teacher_tflop: float
    """TFLOP of all teacher samples, before the training."""
    weights_gib: float
    """Weights per GPU: frozen ones in bfloat16; trainable ones with gradients, Adam moments and EMA in float32."""
    activations_gib: float
    """Activations per GPU and micro-batch, saved in bfloat16 for the generator's backward pass."""
    checkpoint_gib: float
    training_set_gib: float

    @property
    def epochs(self) -> float:
        """Number of passes over the training rows."""
        return self.steps * self.batch_size / self.num_rows

    def seconds(self, peak_tflops: float, num_machines: int = 1) -> float:
        """Return the estimated seconds on `num_machines` GPUs at `UTILISATION` of their peak throughput."""
        return self._tflop / (peak_tflops * UTILISATION * num_machines)

    @property
    def _tflop(self) -> float:
        return self.teacher_tflop + self.steps * self.batch_size * self.tflop_per_row

    def markdown(self) -> str:
        """Return the plan as Markdown."""
        figures = {
            "training rows": f"{self.num_rows:,} ({self.num_held_out:,} held out)",
            "steps": f"{self.steps:,} of {self.batch_size:,} rows, {self.epochs:,.1f} epochs",
            "parameters": f"{self.num_learning / 1e6:,.2f}M trainable, {self.num_heads / 1e6:,.2f}M in the "
            f"discriminator, {self.num_frozen / 1e6:,.1f}M frozen",
            "memory of a GPU worker": f"{self.weights_gib:,.2f} GiB and {self.activations_gib:,.2f} GiB of "
            f"activations per micro-batch of {self.micro_batch_size} rows",
            "checkpoint": f"{self.checkpoint_gib:,.3f} GiB; two are kept",
            "training set": f"{self.training_set_gib:,.2f} GiB",
            "computation": f"{_flop(self.tflop_per_row)} per row, {_flop(self._tflop)} in total, of which "
            f"{_flop(self.teacher_tflop)} for the teacher's latents",
        }
        lines = ["| what | figure |", "|---|---|", *(f"| {figure} | {value} |" for figure, value in figures.items())]
        counts = sorted({1, 8, 64})
        lines += [
            "",
            f"Time at an assumed {UTILISATION:.0%} of peak throughput:",
            "",
            f"| | {' | '.join(f'{count} GPU' + 's' * (count > 1) for count in counts)} |",
            f"|---|{'---:|' * len(counts)}",
        ]
        lines += [
            f"| {gpu} | {' | '.join(_time(self.seconds(peak, count)) for count in counts)} |"
            for gpu, peak in PEAK_TFLOPS.items()
        ]
        lines += [f"| this machine's CPU | {_time(self.seconds(_cpu_tflops()))} |{' |' * (len(counts) - 1)}"]
        return "\n".join(lines)


def plan(examples: Examples, config: FinetuneConfig) -> Plan:
    """Estimate the resources of a training on `examples`.

    Raises:
        UserError: if the examples are not valid for training, or the configuration is not for the base model.
    """
    import torch

    from imagerag.base.model import load_scheduler
    from imagerag.hspace.adapter import HSpaceAdapter
    from imagerag.training.diffusion import Diffusion
    from imagerag.training.discriminator import build_discriminator
    from imagerag.training.generator import Generator

    examples.check()
    diffusion = Diffusion(load_scheduler(examples.base.parts["scheduler"]))
    with torch.device("meta"):
        unet = _unet(read_json(examples.base.parts["unet"].files[0]))
        adapter = HSpaceAdapter(unet.config.block_out_channels[-1], config.adapter_inner_dim)
        learn = config.references.number > 0
        generator = Generator(unet, adapter, diffusion, lora_rank=config.lora_rank, learn_adapter=learn)
        teacher = _unet(read_json(examples.teacher.parts["unet"].files[0]))
        discriminator = build_discriminator(config.discriminator, teacher, diffusion)
    flop, saved = _measure(generator, discriminator, examples, config)
    learning = sum(parameter.numel() for _, parameter in generator.learning())
    heads = sum(parameter.numel() for parameter in discriminator.parameters())
    frozen = sum(p.numel() for p in (*generator.parameters(), *teacher.parameters())) - learning
    num_held_out, num_real = int(examples.is_held_out.sum()), examples.rows.num_rows
    num_examples = num_real + examples.config.num_teacher_latents
    row_bytes = 2 * sum(math.prod(shape_of(field)) for field in examples.real_table.schema if field.metadata)
    return Plan(
        num_rows=num_examples - num_held_out,
        num_held_out=num_held_out,
        steps=config.steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        num_learning=learning,
        num_heads=heads,
        num_frozen=frozen,
        tflop_per_row=flop / 1e12,
        teacher_tflop=_teacher_flop(teacher, examples) / 1e12,
        weights_gib=(2 * frozen + 4 * (_ADAM_COPIES + 1) * learning + 4 * _ADAM_COPIES * heads) / _GIB,
        activations_gib=saved * config.micro_batch_size / _GIB,
        checkpoint_gib=4 * (4 * learning + 3 * heads) / _GIB,
        training_set_gib=row_bytes * num_examples / _GIB,
    )


def _unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


def _measure(
    generator: "Generator", discriminator: Any, examples: Examples, config: FinetuneConfig
) -> tuple[float, float]:
    """Return FLOP per row and step, and bytes per row that the generator saves for its backward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from imagerag.training.data import RagBatch
    from imagerag.training.ladd import Ladd

    latents, text = (shape_of(examples.real_table.schema.field(name)) for name in ("latents", "text"))
    size, k = _MEASURED_ROWS, max(1, config.references.number)
    with torch.device("meta"):
        batch = RagBatch(
            latents=torch.empty(size, *latents),
            noise=torch.empty(size, *latents),
            text=torch.empty(size, *text),
            h_references=torch.empty(size, k, *examples.features.shape),
            similarities=torch.empty(size, k),
            added=_added(examples, size),
        )
        ladd = Ladd(discriminator, generator.diffusion, max_timestep=config.max_timestep)
        weights = config.losses.model_copy(update={"perceptual": 0.0})
        parameters = {parameter.untyped_storage()._cdata for parameter in generator.parameters()}
        with FlopCounterMode(display=False) as counter:
            with _counted(parameters) as saved:
                fake = generator(batch)
            random = torch.Generator("cpu")
            if config.losses.adversarial:
                ladd.of_discriminator(fake, batch.latents, batch.text, random, batch.added)[0].backward()
            ladd.of_generator(fake, batch.latents, batch.text, random, weights, batch.added)[0].backward()
    return counter.get_total_flops() / size, sum(saved.values()) / 2 / size  # in bfloat16 rather than float32


def _teacher_flop(unet: Any, examples: Examples) -> float:
    """Return the FLOP of sampling all of the teacher's latents; guidance doubles the predictions of a step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    latents, text = (shape_of(examples.real_table.schema.field(name)) for name in ("latents", "text"))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.empty(1, *latents), torch.zeros(1), torch.empty(1, *text), added_cond_kwargs=_added(examples, 1))
    config = examples.config
    predictions = config.num_teacher_latents * config.num_inference_steps * (1 + (config.guidance_scale > 1))
    return float(predictions * counter.get_total_flops())


def _added(examples: Examples, size: int) -> dict[str, "torch.Tensor"]:
    """Return empty `added_cond_kwargs` for `size` rows, for SDXL models; an empty dictionary for others."""
    import torch

    from imagerag.base.text import added_conditions

    schema = examples.real_table.schema
    if "pooled" not in schema.names:
        return {}
    return added_conditions(torch.empty(size, *shape_of(schema.field("pooled"))), side=0)


@contextmanager
def _counted(known: set[int]) -> Iterator[dict[int, int]]:
    """Record the bytes of each storage that is saved for the backward pass, except those in `known`."""
    import torch

    saved: dict[int, int] = {}

    def note(tensor: "torch.Tensor") -> "torch.Tensor":
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def _cpu_tflops() -> float:
    """Measure this machine's throughput of matrix multiplication in TFLOP/s."""
    import torch

    matrix = torch.randn(1024, 1024)
    matrix @ matrix
    started = time.perf_counter()
    for _ in range(_PROBES):
        matrix @ matrix
    return _PROBES * 2 * 1024**3 / 1e12 / (time.perf_counter() - started)


def _flop(tflop: float) -> str:
    for unit, size in (("EFLOP", 1e6), ("PFLOP", 1e3), ("TFLOP", 1.0)):
        if tflop >= size:
            return f"{tflop / size:,.1f} {unit}"
    return f"{tflop * 1e3:,.1f} GFLOP" if tflop else "none"


def _time(seconds: float) -> str:
    for unit, size, least in (("days", 86400, 2 * 86400), ("h", 3600, 2 * 3600), ("min", 60, 120)):
        if seconds >= least:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 1 else "under 1 s"
