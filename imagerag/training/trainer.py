"""The training step of one worker in plain torch: losses, optimizers, EMA, validation and state (paper, Sec. 3.4)."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from imagerag.base.model import BaseModel
from imagerag.generation.finetuned import ADAPTER, LORA
from imagerag.generation.sheet import sheet
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.encode import in_its_range
from imagerag.training.config import FinetuneConfig, LossWeights, ReferenceChoice
from imagerag.training.data import Ints, RagData
from imagerag.training.diffusion import Diffusion
from imagerag.training.discriminator import build_discriminator, iterate_norms
from imagerag.training.generator import Generator
from imagerag.training.ladd import Ladd, Terms
from imagerag.training.loader import Loaded
from imagerag.training.perceptual import Perceptual
from imagerag.training.scale import choose_scale

_BETAS, _HEADS_BETAS = (0.5, 0.99), (0.0, 0.99)
_SHOWN = 12
_SHOWINGS: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("with references", "", {}),
    ("with random references", "_random", {"random": 1.0}),
    ("without", "_none", {"none": 1.0}),
)
"""Validation settings: title, suffix of the metric names, and the shares of `ReferenceChoice` to set."""
_ACCURACY_DECAY = 0.95

Wrap = Callable[[nn.Module], nn.Module]


class Finetuning:
    """Training of an adapter and LoRA on one worker.

    Attributes:
        done: completed steps, including skipped ones.
        accuracy: moving average of the discriminator's accuracy; 0.5 is chance, NaN before its first update.
        skipped: number of steps skipped because of non-finite gradients.
        suspects: if the last step was skipped, its examples with non-finite losses, or all if there are none.
    """

    def __init__(
        self,
        base: BaseModel,
        teacher: UNet2DConditionModel,
        perceptual: Perceptual | None,
        config: FinetuneConfig,
        *,
        dtype: torch.dtype = torch.float32,
        wrap: Wrap = lambda module: module,
    ) -> None:
        """Initialise the models, optimizers and schedules.

        Args:
            base: the student; LoRA is attached to its UNet.
            teacher: the multi-step model's UNet, on the same device.
            perceptual: network of the perceptual loss; required if the loss has a weight.
            config: training configuration.
            dtype: autocast dtype; trainable parameters are always float32.
            wrap: wraps a module so that its gradients are averaged over workers (DDP).
        """
        torch.manual_seed(config.seed)
        self.config, self.done, self.accuracy = config, 0, float("nan")
        self.skipped, self._skipped_in_a_row = 0, 0
        self.suspects: Ints = np.empty(0, np.int64)
        self._device, self._dtype = base.unet.device, dtype
        self._vae = base.vae
        diffusion = Diffusion(base.scheduler)
        adapter = HSpaceAdapter(base.unet.config.block_out_channels[-1], config.adapter_inner_dim).to(self._device)
        adapter.start_gate(config.gate_start)
        self.generator = Generator(
            base.unet, adapter, diffusion, lora_rank=config.lora_rank, learn_adapter=config.references.number > 0
        )
        discriminator = build_discriminator(config.discriminator, teacher, diffusion).to(self._device).train()
        self._adversarial_from = round(config.steps * (1 - config.adversarial_share))
        self._judged = config.losses.adversarial > 0 and config.adversarial_share > 0
        self._learners = [wrap(self.generator), *([wrap(discriminator)] if self._judged else [])]
        self._ladd = Ladd(
            discriminator,
            diffusion,
            perceptual=perceptual,
            learner=self._learners[-1] if self._judged else None,
            max_timestep=config.max_timestep,
        )
        self._learning = dict(self.generator.learning())
        self._heads = list(discriminator.parameters())
        fused = self._device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self._learning.values(),
            config.learning_rate,
            betas=_BETAS,
            weight_decay=config.weight_decay,
            fused=fused,
        )
        self._heads_optimizer = torch.optim.AdamW(
            self._heads, config.heads_learning_rate, betas=_HEADS_BETAS, weight_decay=0.0, fused=fused
        )
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, config.warmup_steps, config.steps)
        self._ema = EMAModel(self._learning.values(), decay=config.ema_decay, foreach=True)

    def step(self, micro_batches: Sequence[Callable[[], Loaded]]) -> dict[str, float]:
        """Train on this worker's micro-batches of one batch, and return losses, gradient norms and seconds.

        Gradients are accumulated over micro-batches; generator and discriminator are updated simultaneously at the end
        of the step. A step with non-finite gradients is skipped on all workers rather than fatal: batches are
        deterministic, so a restarted training would fail at the same step again.

        Args:
            micro_batches: loads the micro-batches, one call each.

        Raises:
            FloatingPointError: if `max_skipped` steps in a row were skipped.
        """
        started, waited_s = time.perf_counter(), 0.0
        if self._is_adversarial:
            iterate_norms(self._ladd.discriminator)
        self._optimizer.zero_grad(set_to_none=True)
        self._heads_optimizer.zero_grad(set_to_none=True)
        sums: Terms = {}
        parts: list[tuple[Ints, Terms]] = []
        for number, load in enumerate(micro_batches):
            loaded = load()
            waited_s += loaded.waited_s
            terms = self._accumulate(loaded, len(micro_batches), is_last=number == len(micro_batches) - 1)
            parts.append((loaded.examples, terms))
            del loaded  # so that the device never holds two micro-batches
            sums = {name: sums.get(name, 0.0) + term / len(micro_batches) for name, term in terms.items()}
        # All at once: each read synchronises with the device.
        values = {name: float(value) for name, value in (sums | self._update(parts)).items()}
        if "accuracy" in values and not len(self.suspects):
            before = 0.5 if math.isnan(self.accuracy) else self.accuracy
            self.accuracy = _ACCURACY_DECAY * before + (1 - _ACCURACY_DECAY) * values["accuracy"]
        step_s = time.perf_counter() - started
        return values | {
            "learning_rate": self._schedule.get_last_lr()[0],
            "data_s": waited_s,
            "step_s": step_s,
            "skipped": self.skipped,
        }

    @property
    def _is_adversarial(self) -> bool:
        """Whether the next step uses the adversarial loss."""
        return self._judged and self.done >= self._adversarial_from

    def _accumulate(self, loaded: Loaded, parts: int, *, is_last: bool) -> Terms:
        """Accumulate the gradients of one of `parts` micro-batches, and return its losses."""
        batch, config = loaded.batch, self.config
        random = torch.Generator(self._device).manual_seed(_seed(config.seed, self.done, loaded.number))
        weights = config.losses if self._is_adversarial else config.losses.model_copy(update={"adversarial": 0.0})
        terms: Terms = {}
        with nullcontext() if is_last else _without_sync(self._learners):
            with self._autocast():
                fake = self._learners[0](batch)
            if self._is_adversarial:
                with self._autocast():
                    loss, terms = self._ladd.of_discriminator(fake, batch.latents, batch.text, random, batch.added)
                (loss / parts).backward()
            with self._autocast():
                loss, of_generator = self._ladd.of_generator(
                    fake, batch.latents, batch.text, random, weights, batch.added
                )
            (loss / parts).backward()
        return terms | of_generator

    def _update(self, parts: Sequence[tuple[Ints, Terms]]) -> Terms:
        """Clip the gradients and step optimizers, schedule and EMA; return the gradient norms.

        With a non-finite norm, only the schedule steps.
        """
        norm = nn.utils.clip_grad_norm_(self._learning.values(), self.config.max_grad_norm)
        norms = {"grad_norm": norm}
        judged = any(parameter.grad is not None for parameter in self._heads)
        if judged:
            norms["heads_grad_norm"] = nn.utils.clip_grad_norm_(self._heads, self.config.max_grad_norm)
        broken = [name for name, value in norms.items() if not torch.isfinite(value)]
        self.suspects = _suspects(parts) if broken else np.empty(0, np.int64)
        self.skipped += bool(broken)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if broken else 0
        if self._skipped_in_a_row >= min(self.config.max_skipped, self.config.steps):
            raise FloatingPointError(
                f"step {self.done}: {broken[0]} is {float(norms[broken[0]])}, and {self._skipped_in_a_row} steps in a "
                f"row were skipped, with {self.config}"
            )
        if not broken:
            self._optimizer.step()
            if judged:
                self._heads_optimizer.step()
            self._ema.step(self._learning.values())
        self._schedule.step()
        self.done += 1
        return norms

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from; random numbers are derived from `done` and the seed."""
        return {
            "done": self.done,
            "accuracy": self.accuracy,
            "skipped": (self.skipped, self._skipped_in_a_row),
            "learning": {name: parameter.detach() for name, parameter in self._learning.items()},
            "heads": self._ladd.discriminator.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "heads_optimizer": self._heads_optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "ema": self._ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        with torch.no_grad():
            for name, parameter in self._learning.items():
                parameter.copy_(state["learning"][name])
        self._ladd.discriminator.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._heads_optimizer.load_state_dict(state["heads_optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._ema.load_state_dict(state["ema"])
        self._ema.to(self._device)
        self.done, self.accuracy = state["done"], state["accuracy"]
        self.skipped, self._skipped_in_a_row = state["skipped"]

    def validate(self, data: RagData) -> tuple[dict[str, float], Image.Image]:
        """Validate the EMA weights on held-out examples with fixed noise.

        Returns:
            The metrics and an image grid. The metrics are the losses with retrieved references, with random references
            (suffix `_random`) and without references (`_none`); `score`, which is lowest for the best checkpoint; and
            after the last step `default_scale`, the scale stored with the adapter.
        """
        config = self.config
        step = max(1, len(data.held_out) // config.num_validated)
        examples = data.held_out[::step][: config.num_validated]
        prompts = ", ".join(data.prompts(examples[:_SHOWN]))
        values: dict[str, float] = {}
        pictures: list[tuple[str, list[Image.Image]]] = []
        with self.averaged(), torch.no_grad():
            for title, name, shares in _SHOWINGS:
                choice = ReferenceChoice.found(config.references.number).model_copy(update=shares)
                terms, real, fake = self._measure(data, examples, choice)
                values |= {f"{term}{name}": float(value) for term, value in terms.items()}
                pictures += [] if pictures else [(f"held out: {prompts}", self._decode(real))]
                pictures.append((title, self._decode(fake)))
            if self.done == config.steps:
                choice = ReferenceChoice.found(config.references.number)
                with self._autocast():
                    scale = choose_scale(self.generator, data, examples, choice, batch_size=config.micro_batch_size)
                self.generator.adapter.register_to_config(default_scale=scale)
                values["default_scale"] = scale
        weights = config.losses
        score = (weights.distillation or 1.0) * values["distillation"]
        score += weights.perceptual * values.get("perceptual", 0.0)
        return values | {"score": score}, sheet(pictures)

    def _measure(
        self, data: RagData, examples: Ints, choice: ReferenceChoice
    ) -> tuple[Terms, torch.Tensor, torch.Tensor]:
        """Return the mean losses on `examples`, and the real and generated latents of the first micro-batch."""
        parts = np.array_split(examples, -(-len(examples) // self.config.micro_batch_size))
        weights = LossWeights(adversarial=0.0, distillation=1.0, perceptual=float(self.config.losses.perceptual > 0))
        sums: Terms = {}
        for number, part in reversed(list(enumerate(parts))):
            batch = data.read(part, choice, np.random.default_rng([1, number])).to(self._device)
            random = torch.Generator(self._device).manual_seed(number)
            with self._autocast():
                fake = self.generator(batch)
                _, terms = self._ladd.of_generator(fake, batch.latents, batch.text, random, weights, batch.added)
            sums = {name: sums.get(name, 0.0) + term * len(part) / len(examples) for name, term in terms.items()}
        return sums, batch.latents, fake

    def export(self, folder: Path) -> None:
        """Write the EMA weights of the adapter, and of LoRA if it is used, in diffusers' format."""
        with self.averaged():
            self.generator.adapter.save_pretrained(folder / ADAPTER)
            if self.config.lora_rank:
                self.generator.save_lora(folder / LORA)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the EMA weights within the context, in evaluation mode."""
        self._ema.store(self._learning.values())
        self._ema.copy_to(self._learning.values())
        self.generator.eval()
        try:
            yield
        finally:
            self._ema.restore(self._learning.values())
            self.generator.train()

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        with in_its_range(self._vae):
            scaled = latents[:_SHOWN].to(self._vae.dtype) / self._vae.config.scaling_factor
            pixels = self._vae.decode(scaled).sample.float().clamp(-1, 1)
        bytes_ = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(each) for each in bytes_]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


@contextmanager
def _without_sync(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Disable DDP's gradient averaging; the last micro-batch averages the accumulated gradients."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def _suspects(parts: Sequence[tuple[Ints, Terms]]) -> Ints:
    """Return the examples of micro-batches with non-finite losses, or all examples if all losses are finite."""
    bad = [examples for examples, terms in parts if not all(value.isfinite().all() for value in terms.values())]
    return np.concatenate(bad or [examples for examples, _ in parts])


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)
