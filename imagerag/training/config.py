"""How an adapter is fine-tuned: every value that a run can be given, checked when it is built.

Two recipes: `tiny`, for the embedded base model on a laptop, and `sd_turbo`, the paper's (Sec. 4.1).
"""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from imagerag.config import Config
from imagerag.errors import UserError
from imagerag.generation.spec import check_spec
from imagerag.workers import CommittingConfig, WorkersConfig

RecipeName = Literal["tiny", "sd_turbo"]
_CHANCE = 0.55
"""Half of what a discriminator says is right by chance."""


class LossWeights(Config):
    """Weights of the generator's losses; zero switches one off (paper, Sec. 3.4)."""

    adversarial: float = Field(default=1.0, ge=0, description="Hinge loss of the discriminator's judgement.")
    distillation: float = Field(default=2.5, ge=0, description="Smooth L1 to the clean latents; alpha in the paper.")
    perceptual: float = Field(default=1.0, ge=0, description="Distance of a latent network's features; beta.")


class ReferenceChoice(Config):
    """Which references a training row is shown; the rows that are left see their nearest neighbours.

    A row that is shown itself teaches to show what a reference shows. Without such rows the target's style is told by
    nothing, and the best answer is a timid one. A neighbour is never another row of the same picture.
    """

    number: int = Field(default=4, ge=0, le=16, description="References of a row; 0 trains LoRA alone, as a control.")
    own: float = Field(
        default=0.65,
        ge=0,
        le=1,
        description="Share of rows shown themselves and nothing else, as IP-Adapter is trained.",
    )
    own_among: float = Field(
        default=0.1, ge=0, le=1, description="Share of rows shown themselves among their neighbours, so that the "
        "adapter learns to choose."
    )  # fmt: skip
    none: float = Field(
        default=0.1, ge=0, le=1, description="Share of rows shown nothing, so that the model works without an index."
    )
    random: float = Field(
        default=0.1, ge=0, le=1, description="Share of rows shown anything, so that a poor retrieval is distrusted."
    )

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.own + self.own_among + self.none + self.random > 1 + 1e-9:
            raise UserError(f"the shares of rows shown themselves, none and random add up to 1 at most, got {self}")
        return self

    @classmethod
    def found(cls, number: int) -> Self:
        """Return the choice of what a search finds, for every row."""
        return cls(number=number, own=0.0, own_among=0.0, none=0.0, random=0.0)


class SynthesizeConfig(CommittingConfig):
    """How what a training learns from is made: clean latents, text features and references."""

    base: str = Field(default="tiny", description="The student: `tiny`, `org/name@<commit>`, or a diffusers folder.")
    teacher: str = Field(default="tiny-teacher", description="The multi-step model, likewise.")
    num_teacher_latents: int = Field(
        default=0, ge=0, description="Pictures that the teacher makes of prompts, to learn from beside the real ones."
    )
    prompts: str | None = Field(
        default=None, description="A text file with the teacher's prompts, one on each line; unset: the captions."
    )
    guidance_scale: float = Field(default=7.5, ge=0, description="Of the teacher.")
    num_inference_steps: int = Field(default=25, ge=1, le=1000, description="Of the teacher.")
    held_out: str | None = Field(
        default=None,
        description="A text file with captions that nothing is learnt from; what is learnt is validated on them.",
    )
    held_out_share: float = Field(
        default=0.02, gt=0, lt=1, description="Of the captions, where there is no such file. The same ones every time."
    )
    batch_size: int = Field(default=32, ge=1, le=1_024, description="Rows that a worker encodes at a time.")
    seed: int = Field(default=0, ge=0, description="Of the teacher's noise and choice of captions.")

    _check_models = field_validator("base", "teacher")(check_spec)


class FinetuneConfig(Config):
    """How an adapter and LoRA on the UNet's decoder are trained."""

    references: ReferenceChoice = Field(default=ReferenceChoice(), description="What rows are shown.")
    losses: LossWeights = Field(default=LossWeights(), description="Weights of the losses.")
    perceptual_network: str = Field(
        default="elatentlpips:sd21",
        description="`tiny`, a folder of a latent network, or `elatentlpips:` and one of sd15, sd21, sdxl.",
    )
    discriminator: Literal["teacher", "latents"] = Field(
        default="teacher",
        description="Who judges: heads on the frozen teacher's features, as in the paper, or a small network that "
        "learns from the noised latents alone, for a teacher whose features tell too little.",
    )
    adversarial_share: float = Field(
        default=1.0, ge=0, le=1, description="Of all steps, the last ones, that have the adversarial loss."
    )
    max_timestep: int | None = Field(
        default=None, ge=1, description="The discriminator sees latents noised to less; unset: to any timestep."
    )
    adapter_inner_dim: int | None = Field(
        default=None, ge=8, description="Of the adapter's attention; unset: twice the H-space's channels."
    )
    gate_start: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the references in the H-space where training starts; 0 starts at the base model.",
    )
    lora_rank: int = Field(default=32, ge=0, description="Of LoRA on the UNet's decoder; 0 trains the adapter alone.")
    steps: int = Field(default=20_000, ge=1, description="Updates of the generator.")
    batch_size: int = Field(default=2_048, ge=1, description="Rows of one update, over all workers.")
    micro_batch_size: int = Field(
        default=32, ge=1, description="Rows that a worker runs at a time; what is left of the batch is accumulated."
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="Of adapter and LoRA, at its highest.")
    heads_learning_rate: float = Field(default=1e-5, gt=0, description="Of the discriminator's heads.")
    warmup_steps: int = Field(
        default=500, ge=0, description="Steps in which the rate rises; then it falls by a cosine."
    )
    weight_decay: float = Field(default=1e-2, ge=0, description="Of AdamW, for adapter and LoRA.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Longer gradients are cut to it.")
    max_skipped: int = Field(
        default=10,
        ge=1,
        description="A step whose gradient is not finite is skipped; so many in a row end the training.",
    )
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="Of the averaged weights, which are what is kept.")
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between checkpoints, each with a validation.")
    num_validated: int = Field(default=256, ge=1, description="Held-out rows of a validation, always the same.")
    seed: int = Field(default=0, ge=0, description="Of the first weights, the batches and the noise.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"batch_size is a multiple of micro_batch_size, got {self.batch_size} and {self.micro_batch_size}"
            )
        if self.references.number == 0 and self.lora_rank == 0:
            raise UserError("with no references and a lora_rank of 0 there is nothing to train")
        losses = self.losses
        if losses.adversarial * self.adversarial_share == losses.distillation == losses.perceptual == 0:
            raise UserError("all losses are switched off: there is nothing to train for")
        return self


class TrainWorkersConfig(WorkersConfig):
    """The machines of a training. How many there are changes nothing but the order of sums."""

    dtype: Literal["fp32", "bf16"] | None = Field(
        default=None,
        description="Of autocast; unset: bf16 on GPUs, fp32 on CPUs. On a CPU with AVX512-BF16, bf16 takes a fifth "
        "less time.",
    )
    max_failures: int = Field(default=3, ge=0, description="Workers may die so often before the training fails.")


def describe_accuracy(accuracy: float) -> str:
    """Say how often a discriminator was right in the last steps of a training, and whether it was of use."""
    if accuracy < _CHANCE:
        return f"accuracy {accuracy:.2f}, which is chance: the adversarial loss taught nothing"
    return f"accuracy {accuracy:.2f}"


class Recipe(Config):
    """All that one fine-tuning is."""

    data: SynthesizeConfig
    training: FinetuneConfig


def tiny() -> Recipe:
    """Return what suits the embedded base model, in minutes on two cores."""
    return Recipe(
        data=SynthesizeConfig(guidance_scale=3.0),
        training=FinetuneConfig(
            losses=LossWeights(adversarial=0.1, distillation=1.0),
            perceptual_network="tiny",
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
    """Return the paper's: 20,000 steps of 2,048 rows at 512², half a million real pictures and 3 million synthetic."""
    return Recipe(
        data=SynthesizeConfig(base=base, teacher=teacher, num_teacher_latents=3_000_000, num_inference_steps=50),
        training=FinetuneConfig(),
    )
