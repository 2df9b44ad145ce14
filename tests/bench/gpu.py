"""A step of fine-tuning at SD 2.1's size on a GPU: the largest batch that fits, its speed, and what bounds it.

Random weights, 512², bfloat16, four references, all losses but the perceptual one, whose network doesn't ship with the
package.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from imagerag.base.files import BaseIdentity
from imagerag.base.model import BaseModel
from imagerag.training.config import FinetuneConfig, LossWeights
from imagerag.training.data import RagBatch
from imagerag.training.loader import Loaded
from imagerag.training.plan import PEAK_TFLOPS
from imagerag.training.trainer import Finetuning
from tests.bench.generate import NUM_REFERENCES, SD21_UNET
from tests.bench.harness import Row, Scale, median

TEXT_TOKENS = 77
LARGEST = 1_024
REPETITIONS: dict[Scale, int] = {"small": 3, "full": 15}
PRODUCTS = ("gemm", "conv", "cutlass", "xmma", "wgrad", "dgrad", "nvjet", "flash", "fmha", "attention", "mkldnn", "mm")
"""What the kernels of matrix products, convolutions and attention have in their names."""
_MATRIX = 8_192
_GIB = 2**30


@dataclass(frozen=True)
class Step:
    """One step of a batch, measured."""

    rows: int
    seconds: float
    tflop: float
    busy_s: float
    """In which the device computed something, of a step that was watched."""
    products_s: float
    """Of this: matrix products, convolutions and attention."""
    watched_s: float
    """The step that was watched."""


def run(scale: Scale, folder: Path) -> list[Row]:
    """Measure on the GPU of this machine; nothing where there is none."""
    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda")
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory / _GIB
    training = make_training(device, SD21_UNET)
    batch_size = largest_batch(training, device)
    torch.cuda.reset_peak_memory_stats(device)
    step = measure(training, batch_size, device, REPETITIONS[scale])
    peak_gib = torch.cuda.max_memory_allocated(device) / _GIB
    tflops, bare = step.tflop / step.seconds, bare_tflops(device)
    ms = partial(Row, unit="ms")
    rows = [
        Row(
            what=f"SD 2.1's size, 512², bf16, {batch_size} rows (the most of 2^n that fit)",
            unit="rows/s",
            ours=step.rows / step.seconds,
            peer=step.rows / step.tflop * bare,
            peer_name=f"{step.tflop / step.rows:.1f} TFLOP a row at the speed of bare matrix products, {name}",
        ),
        Row(what="the same: memory", unit="GiB", ours=peak_gib, peer=memory, peer_name=f"of {name}"),
        ms(what="the same: the GPU at work", ours=1000 * step.busy_s, peer=1000 * step.watched_s, peer_name="the step"),
        ms(
            what="the same: matrix products, convolutions, attention",
            ours=1000 * step.products_s,
            peer=1000 * step.busy_s,
            peer_name="the GPU at work",
        ),
    ]
    for gpu, peak in PEAK_TFLOPS.items():
        if gpu in name:
            rows.append(Row(what="the same", unit="TFLOP/s", ours=tflops, peer=peak, peer_name=f"{gpu}'s data sheet"))
    return rows


def make_training(device: torch.device, unet: Mapping[str, Any]) -> Finetuning:
    """Return a training of random weights, in bfloat16."""
    torch.manual_seed(0)
    config = FinetuneConfig(losses=LossWeights(perceptual=0.0), batch_size=1, micro_batch_size=1)
    with device:
        student, teacher = (UNet2DConditionModel(**unet).to(torch.bfloat16) for _ in range(2))
        vae = AutoencoderKL().to(torch.bfloat16)
    base = BaseModel(
        identity=BaseIdentity(id="sd21", digest="2" * 64),
        vae=vae,
        unet=student,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear"),
        tokenizers=(),
        text_encoders=(),
    )
    return Finetuning(base, teacher, None, config, dtype=torch.bfloat16)


def largest_batch(training: Finetuning, device: torch.device) -> int:
    """Return the largest power of two whose step fits into the device's memory."""
    fits, size = 0, 1
    while size <= LARGEST:
        try:
            training.step([_load(training, size, device)])
        except torch.cuda.OutOfMemoryError:
            break
        fits, size = size, 2 * size
    assert fits, f"{torch.cuda.get_device_name(device)} has no memory for a batch of one row"
    return fits


def measure(training: Finetuning, rows: int, device: torch.device, repetitions: int) -> Step:
    """Return the median time of a step, its operations, and what the device did in one."""
    loads = [_load(training, rows, device)]
    with FlopCounterMode(display=False) as counter:
        training.step(loads)
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        training.step(loads)  # reads its losses at the end, so it waits for the device
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watch:
        training.step(loads)
        watched_s = time.perf_counter() - started
    spent = _spent(watch, device)
    return Step(
        rows=rows,
        seconds=median(seconds),
        tflop=counter.get_total_flops() / 1e12,
        busy_s=sum(spent.values()),
        products_s=sum(own for name, own in spent.items() if any(part in name for part in PRODUCTS)),
        watched_s=watched_s,
    )


def _spent(watch: profile, device: torch.device) -> dict[str, float]:
    """Return the seconds of each kernel; on a CPU, of each operator."""
    on_gpu = device.type == "cuda"
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in watch.key_averages() if event.device_type == wanted and not event.is_user_annotation]
    times = [event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events]
    return {event.key.lower(): time_us / 1e6 for event, time_us in zip(events, times, strict=True)}


def bare_tflops(device: torch.device, size: int = _MATRIX) -> float:
    """Return how fast the device multiplies square matrices in bfloat16."""
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    rates = []
    for _ in range(10):
        wait()
        started = time.perf_counter()
        one @ other
        wait()
        rates.append(2 * size**3 / 1e12 / (time.perf_counter() - started))
    return median(rates)


def _load(training: Finetuning, rows: int, device: torch.device) -> partial[Loaded]:
    """Return what loads a batch of random numbers, which is on the device already."""
    unet = training.generator.unet.config
    side, channels = unet.sample_size, unet.block_out_channels
    deepest = side // 2 ** (len(channels) - 1)
    random = partial(torch.randn, device=device)
    batch = RagBatch(
        latents=random(rows, unet.in_channels, side, side),
        noise=random(rows, unet.in_channels, side, side),
        text=random(rows, TEXT_TOKENS, unet.cross_attention_dim),
        h_references=random(rows, NUM_REFERENCES, channels[-1], deepest, deepest),
        similarities=torch.full((rows, NUM_REFERENCES), 0.5, device=device),
    )
    return partial(Loaded, batch, 0, 0.0, np.arange(rows))
