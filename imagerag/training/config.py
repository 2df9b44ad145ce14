"""Fine-tuning configuration, validated on construction.

Two recipes: `tiny` for the embedded base model on a laptop, and `sd_turbo`, the paper's (Sec. 4.1).
"""

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from imagerag.base.files import check_spec
from imagerag.config import Config, Place
from imagerag.errors import UserError
from imagerag.limits import MAX_SEED
from imagerag.workers import CommittingConfig, WorkersConfig

TrainDtype = Literal["fp32", "bf16"]
"""Autocast dtypes of a training."""
_CHANCE = 0.55
"""Discriminator accuracy below this counts as chance (0.5)."""


class LossWeights(Config):
    """Weights of the generator's losses; 0 disables a loss (paper, Sec. 3.4)."""

    adversarial: float = Field(default=1.0, ge=0, description="Weight of the adversarial hinge loss.")
    distillation: float = Field(
        default=2.5, ge=0, description="Weight of the smooth L1 loss on clean latents (alpha in the paper)."
    )
    perceptual: float = Field(
        default=1.0, ge=0, description="Weight of the perceptual loss in latent space (beta in the paper)."
    )


class ReferenceChoice(Config):
    """Which references a training row receives: four shares of rows, and nearest neighbours for the rest.

    A row that is its own reference teaches the adapter to reproduce the reference. Without such rows, nothing
    determines the target's style, and the adapter learns a weak average. Rows with neighbours only, from which their
    own image is excluded, are what it meets in use.
    """

    number: int = Field(default=4, ge=0, le=16, description="References per row; 0 trains LoRA alone, as a control.")
    own: float = Field(
        default=0.45,
        ge=0,
        le=1,
        description="Share of rows whose only reference is the row itself, as in IP-Adapter's training.",
    )
    own_among: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of rows with themselves and neighbours as references, so that the adapter learns to select.",
    )
    none: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of rows without references, so that the model also works without an index.",
    )
    random: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of rows with random references, so that the model is robust to poor retrieval.",
    )

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.own + self.own_among + self.none + self.random > 1 + 1e-9:
            raise UserError(f"own + own_among + none + random must not exceed 1, got {self}")
        return self

    @classmethod
    def found(cls, number: int) -> Self:
        """Return a choice that gives every row its `number` nearest neighbours."""
        return cls(number=number, own=0.0, own_among=0.0, none=0.0, random=0.0)


class SynthesizeConfig(CommittingConfig):
    """How the training set is made: clean latents, text features and references."""

    base: str = Field(default="tiny", description="Student: `tiny`, `org/name@<commit>`, or a diffusers folder.")
    teacher: str = Field(
        default="tiny-teacher",
        description="Multi-step teacher: `tiny-teacher`, `org/name@<commit>`, or a diffusers folder.",
    )
    num_teacher_latents: int = Field(
        default=0, ge=0, description="Latents to sample from the teacher, in addition to the latents of real images."
    )
    prompts: Place | None = Field(
        default=None, description="Text file with the teacher's prompts, one per line; unset: the captions."
    )
    guidance_scale: float = Field(default=7.5, ge=0, description="Guidance scale of the teacher.")
    num_inference_steps: int = Field(default=25, ge=1, le=1000, description="Denoising steps of the teacher.")
    held_out: Place | None = Field(
        default=None,
        description="Text file with captions to hold out, one per line: used for validation, never for training.",
    )
    held_out_share: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="Share of captions to hold out if `held_out` is unset, chosen by their hashes; at least 20 "
        "captions if these are at most a fifth.",
    )
    batch_size: int = Field(default=32, ge=1, le=1_024, description="Rows per batch on a worker.")
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="Seed of the teacher's noise and of the order of its prompts."
    )

    _check_models = field_validator("base", "teacher")(check_spec)


class FinetuneConfig(Config):
    """How the adapter and the LoRA on the UNet decoder are trained."""

    references: ReferenceChoice = Field(default=ReferenceChoice(), description="References of the training rows.")
    losses: LossWeights = Field(default=LossWeights(), description="Loss weights.")
    perceptual_network: str | None = Field(
        default=None,
        description="Network of the perceptual loss: `tiny`, a folder with a latent network, or `elatentlpips:` "
        "followed by sd15, sd21 or sdxl; unset: the one for the student's latents.",
    )
    discriminator: Literal["teacher", "latents"] = Field(
        default="teacher",
        description="`teacher`: trainable heads on the frozen teacher's features, as in the paper. `latents`: a small "
        "network on the noised latents, for teachers whose features are not informative enough.",
    )
    adversarial_share: float = Field(
        default=1.0, ge=0, le=1, description="Share of final steps that use the adversarial loss."
    )
    max_timestep: int | None = Field(
        default=None,
        ge=1,
        description="Upper bound (exclusive) of the timesteps of the discriminator's inputs, at most the scheduler's "
        "number; unset: all timesteps.",
    )
    adapter_inner_dim: int | None = Field(
        default=None, ge=8, description="Inner dimension of the adapter's attention; unset: twice the H-space channels."
    )
    gate_start: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Initial share of the references in the H-space; 0 starts from the base model.",
    )
    lora_rank: int = Field(
        default=32, ge=0, description="Rank of the LoRA on the UNet decoder; 0 trains the adapter alone."
    )
    steps: int = Field(default=20_000, ge=1, description="Optimizer steps of the generator.")
    batch_size: int = Field(default=2_048, ge=1, description="Rows per optimizer step, over all workers.")
    micro_batch_size: int = Field(
        default=32, ge=1, description="Rows per forward pass of a worker; gradients are accumulated up to the batch."
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate of the adapter and LoRA.")
    heads_learning_rate: float = Field(default=1e-5, gt=0, description="Learning rate of the discriminator.")
    warmup_steps: int = Field(
        default=500,
        ge=0,
        validate_default=True,
        description="Linear warm-up steps before cosine decay; fewer if there are not more `steps` than these.",
    )
    weight_decay: float = Field(default=1e-2, ge=0, description="AdamW weight decay of the adapter and LoRA.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Maximum gradient norm; larger gradients are clipped.")
    max_skipped: int = Field(
        default=10,
        ge=1,
        description="Steps with non-finite gradients are skipped; this many in a row end the training with an error.",
    )
    ema_decay: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the EMA of the weights; the EMA weights are exported."
    )
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between checkpoints; each one is validated.")
    num_validated: int = Field(default=256, ge=1, description="Held-out rows per validation, always the same ones.")
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="Seed of the initial weights, the batches and the noise."
    )

    @field_validator("warmup_steps")
    @classmethod
    def _shorten_warmup(cls, warmup_steps: int, info: ValidationInfo) -> int:
        """Leave a step at the peak rate: the first one of a warm-up learns nothing, so neither would a single step.

        A recipe's warm-up is meant for its own number of steps, and who asks for a few steps wants them to train.
        """
        steps: int = info.data.get("steps", warmup_steps + 1)  # invalid steps are missing
        return min(warmup_steps, steps - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and {self.micro_batch_size}"
            )
        if self.references.number == 0 and self.lora_rank == 0:
            raise UserError("with no references and a lora_rank of 0 there is nothing to train")
        losses = self.losses
        if losses.adversarial * self.adversarial_share == losses.distillation == losses.perceptual == 0:
            raise UserError("all loss weights are 0: there is nothing to train for")
        if losses.distillation == losses.perceptual == 0 and self.adversarial_share < 1:
            raise UserError(
                f"with only the adversarial loss, adversarial_share must be 1 but is {self.adversarial_share}: the "
                "steps before have no loss"
            )
        return self


class TrainWorkersConfig(WorkersConfig):
    """Ray Train workers. Their number only changes the order of summation."""

    dtype: TrainDtype | None = Field(
        default=None,
        description="Autocast dtype; unset: bf16 on GPUs, fp32 on CPUs. On CPUs with AVX512-BF16, bf16 is about 20 % "
        "faster.",
    )
    max_failures: int = Field(default=3, ge=0, description="Worker failures to recover from before the training fails.")


def describe_accuracy(accuracy: float) -> str:
    """Describe the discriminator's accuracy at the end of a training, and whether it is above chance."""
    if accuracy < _CHANCE:
        return f"accuracy {accuracy:.2f}, which is chance: the adversarial loss had no effect"
    return f"accuracy {accuracy:.2f}"


class Recipe(Config):
    """Training set and training of one fine-tuning."""

    data: SynthesizeConfig
    training: FinetuneConfig


def tiny() -> Recipe:
    """Return the recipe for the embedded base model: minutes on two cores."""
    return Recipe(
        data=SynthesizeConfig(guidance_scale=3.0),
        training=FinetuneConfig(
            losses=LossWeights(adversarial=0.1, distillation=1.0),
            discriminator="latents",
            gate_start=0.9,
            max_timestep=300,
            steps=240,
            batch_size=32,
            learning_rate=5e-4,
            heads_learning_rate=5e-4,
            warmup_steps=12,
            ema_decay=0.98,
            checkpoint_every=80,
            num_validated=96,
        ),
    )


def sd_turbo(base: str, teacher: str) -> Recipe:
    """Return the paper's recipe: 20,000 steps of 2,048 rows at 512², 0.5M real and 3M synthetic pairs (Sec. 4.1)."""
    return Recipe(
        data=SynthesizeConfig(base=base, teacher=teacher, num_teacher_latents=3_000_000, num_inference_steps=50),
        training=FinetuneConfig(),
    )
