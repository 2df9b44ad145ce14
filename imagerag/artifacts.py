"""The frozen records that pass between stages: references and counts, never data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Download:
    """What a download left: every row of the list has exactly one status."""

    uri: str
    """The shards folder."""
    num_urls: int
    """URLs that the corpus wants, all lists together, and the bad rows of this call's list."""
    num_success: int
    num_failed: int
    reasons: Mapping[str, int]
    """Failures by reason, as `corpus.guard.Reason` names them."""
    num_fetched: int
    """URLs tried by this call; the rest was settled before."""
    num_removed: int
    """URLs that the corpus wanted before this call and wants no more."""
    num_bytes: int
    """Size of the images fetched by this call, as stored."""
    num_duplicates: int = 0
    """Rows of the list that repeat an earlier row's URL and caption."""
    num_unchanged: int = 0
    """Images that were asked for again and are the same."""
    num_changed: int = 0
    """Images that were asked for again and are others now."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Images that were asked for again, did not come and stay as they are, by reason."""
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The first failures of each reason, in words. What is quoted in them is a stranger's."""
    duration_s: float = 0.0
    machine_s: float = 0.0
    """Seconds of worker time: the sum over workers."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A table version that holds exactly the rows that the corpus wants."""

    uri: str
    table: str
    version: int
    num_rows: int
    num_added: int
    num_removed: int
    num_duplicates: int
    """URLs whose image and caption another URL brought already."""
    encoder_id: str
    encoder_digest: str
    duration_s: float = 0.0
    machine_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CachedFeatures:
    """A table version of which every row has its features for a base model."""

    uri: str
    table: str
    version: int
    num_rows: int
    num_added: int
    base_id: str
    fit: str
    """How pictures were fitted into the base model's square: `auto`, `pad` or `crop`."""
    features_digest: str
    duration_s: float = 0.0
    machine_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """All that a fine-tuning learns from: clean latents and text features, and the references of each."""

    index_uri: str
    index_name: str
    index_version: int
    base: str
    base_digest: str
    teacher: str
    teacher_digest: str
    real_uri: str
    """The table with the latents of the index's pictures."""
    teacher_uri: str | None
    """The table with the teacher's latents, if some were asked for."""
    references_uri: str
    """The table that lists every example with its references."""
    num_real: int
    num_teacher: int
    num_held_out: int
    """Of the real ones."""
    num_added: int
    """Rows of all tables that were computed by this call; the rest was there before."""
    duration_s: float = 0.0
    machine_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A trained adapter, with LoRA if there is some."""

    uri: str
    """The folder."""
    name: str
    """A digest of all that it depends on."""
    base: str
    base_digest: str
    index_name: str
    index_version: int
    run_id: str
    """Of MLflow."""
    num_steps: int
    score: float
    """Of the validation on what is held out: losses with references, but for the adversarial; smaller is better."""
    best_step: int
    """The checkpoint with the best score, which is in the training's folder."""
    best_score: float
    is_new: bool
    """Whether this call trained; else it was finished before."""
    discriminator_accuracy: float | None = None
    """Averaged over the last steps; 0.5 is chance. None where there was no discriminator."""
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class IndexVersion:
    """Where references come from."""

    uri: str
    name: str
    version: int
    created_at: str
    """It tells the version from one of the same number in an index that was made anew."""

    @property
    def key(self) -> dict[str, str | int]:
        """What pictures depend on: not where the index is, so that a home can be moved."""
        return {"name": self.name, "version": self.version, "created_at": self.created_at}


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """The model in use: its weights, with the index that it pins."""

    folder: str
    """Of the weights, which all workers can read."""
    index: IndexVersion


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation left."""

    uri: str
    """The folder with `index.html`, `table.md`, `grid.png` and `results.json`."""
    name: str
    """A digest of all that it depends on."""
    adapter: str
    """The folder of the candidate."""
    index_name: str
    index_version: int
    run_id: str
    """Of MLflow."""
    num_prompts: int
    metrics: Mapping[str, float]
    """Means by way and metric: `adapter/recognised`."""
    is_new: bool
    """Whether this call measured; else it was finished before."""
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of the registered model."""

    name: str
    """The registered model's."""
    version: int
    uri: str
    """`models:/<name>/<version>`, as MLflow loads it."""
    run_id: str
    """Of the training."""
    is_new: bool
    """Whether this call made the version; else the same was registered before."""
    portable: bool
    """Whether it carries a copy of its index."""


@dataclass(frozen=True, kw_only=True)
class IndexBuild:
    """An index over a table version, and how good it was found to be."""

    uri: str
    table: str
    version: int
    num_rows: int
    kind: str
    """`exact` (no index: below the size where one pays) or LanceDB's index type."""
    recall_at_10: float
    """Share of the ten exact nearest neighbours that the index finds; 1.0 for `exact`."""
    num_unindexed_rows: int
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition for publishing, with what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a takedown did to one kind of thing, in words for people."""

    deleted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    """What is not this home's to delete, or could not be."""

    @classmethod
    def merged(cls, sweeps: Iterable["Sweep"]) -> "Sweep":
        """Return them as one."""
        every = list(sweeps)
        return cls(
            deleted=tuple(each for sweep in every for each in sweep.deleted),
            left=tuple(each for sweep in every for each in sweep.left),
        )


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Which version readers see now, and why."""

    uri: str
    table: str
    version: int | None
    """The published version: the new one if `published`, else the one that stays, if there is one."""
    previous_version: int | None
    published: bool
    num_rows: int
    checks: tuple[Check, ...] = field(default=())
