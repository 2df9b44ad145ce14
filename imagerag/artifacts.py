"""Frozen records that stages pass to each other: URIs, versions and counts, never data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Download:
    """Result of a download; every row of the list has exactly one status."""

    uri: str
    """The shards folder."""
    num_urls: int
    """URLs that the corpus wants, over all its lists, plus the bad rows of this call's list."""
    num_success: int
    num_failed: int
    reasons: Mapping[str, int]
    """Number of failures by reason; see `corpus.guard.Reason`."""
    num_fetched: int
    """URLs that this call tried to fetch; the others had their status before."""
    num_removed: int
    """URLs that the corpus wanted before this call and no longer wants."""
    num_bytes: int
    """Stored size in bytes of the images that this call fetched."""
    num_duplicates: int = 0
    """Rows of the list that repeat an earlier row's URL and caption."""
    num_unchanged: int = 0
    """Images that were requested again and have not changed."""
    num_changed: int = 0
    """Images that were requested again and have changed."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Images that were requested again, could not be fetched and were kept, by reason."""
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Messages of the first failures of each reason. They quote untrusted text."""
    duration_s: float = 0.0
    machine_s: float = 0.0
    """Worker time in seconds, summed over workers."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Result of an embedding job: a table version with exactly the rows that the corpus wants."""

    uri: str
    table: str
    version: int
    num_rows: int
    num_added: int
    num_removed: int
    num_duplicates: int
    """URLs with the same image and caption as another URL."""
    encoder_id: str
    encoder_digest: str
    duration_s: float = 0.0
    machine_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CachedFeatures:
    """Result of a features job: a table version in which every row has features for a base model."""

    uri: str
    table: str
    version: int
    num_rows: int
    num_added: int
    base_id: str
    fit: str
    """How images were fitted into the base model's square: `auto`, `pad` or `crop`."""
    features_digest: str
    duration_s: float = 0.0
    machine_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Training set of a fine-tuning: clean latents, text features and references of each example."""

    index_uri: str
    index_name: str
    index_version: int
    base: str
    base_digest: str
    teacher: str
    teacher_digest: str
    real_uri: str
    """Table of the latents of the index's images."""
    teacher_uri: str | None
    """Table of the teacher's latents, if any were requested."""
    references_uri: str
    """Table of all examples with their references."""
    num_real: int
    num_teacher: int
    num_held_out: int
    """Real examples that are held out."""
    num_added: int
    """Rows of all tables that this call computed; the others existed before."""
    duration_s: float = 0.0
    machine_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A trained adapter, with LoRA if it was trained."""

    uri: str
    """Folder of the weights."""
    name: str
    """Digest of everything that the training depends on."""
    base: str
    base_digest: str
    index_name: str
    index_version: int
    run_id: str
    """MLflow run of the training."""
    num_steps: int
    score: float
    """Validation loss on held-out examples with references, without the adversarial term; smaller is better."""
    best_step: int
    """Step of the checkpoint with the best score; the checkpoint is in the training's folder."""
    best_score: float
    is_new: bool
    """Whether this call trained the adapter; False if the training was finished before."""
    discriminator_accuracy: float | None = None
    """Average over the last steps; 0.5 is chance. None without a discriminator."""
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class IndexVersion:
    """Version of the index that references come from."""

    uri: str
    name: str
    version: int
    created_at: str
    """Distinguishes the version from the same number in an index that was deleted and rebuilt."""

    @property
    def key(self) -> dict[str, str | int]:
        """Identity of the version without its URI, so that caches stay valid when a home is moved."""
        return {"name": self.name, "version": self.version, "created_at": self.created_at}


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """The champion: its weights and the index that it pins."""

    folder: str
    """Folder of the weights, which all workers can read."""
    index: IndexVersion


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Result of an evaluation."""

    uri: str
    """Folder with `index.html`, `table.md`, `grid.png` and `results.json`."""
    name: str
    """Digest of everything that the results depend on."""
    adapter: str
    """Folder of the candidate."""
    index_name: str
    index_version: int
    run_id: str
    """MLflow run of the evaluation."""
    num_prompts: int
    metrics: Mapping[str, float]
    """Means by way and metric, as in `adapter/recognised`."""
    is_new: bool
    """Whether this call computed the results; False if the evaluation was finished before."""
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of the registered model."""

    name: str
    """Name of the registered model."""
    version: int
    uri: str
    """`models:/<name>/<version>`, from which MLflow loads it."""
    run_id: str
    """MLflow run of the training."""
    is_new: bool
    """Whether this call registered the version; False if the same model was registered before."""
    portable: bool
    """Whether it contains a copy of its index."""
    is_champion: bool = False
    """Whether it is the champion now."""


@dataclass(frozen=True, kw_only=True)
class IndexBuild:
    """Indexes of a table version, with their measured recall."""

    uri: str
    table: str
    version: int
    num_rows: int
    kind: str
    """`exact` (a table too small for an ANN index to pay off) or LanceDB's index type."""
    recall_at_10: float
    """Share of the ten exact nearest neighbours that the ANN index finds; 1.0 for `exact`."""
    num_unindexed_rows: int
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check before publishing, with the values found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a takedown deleted in one kind of storage, as messages."""

    deleted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    """What could not be deleted, or is outside this home."""

    @classmethod
    def merged(cls, sweeps: Iterable["Sweep"]) -> "Sweep":
        """Return one sweep with everything that `sweeps` list."""
        every = list(sweeps)
        return cls(
            deleted=tuple(each for sweep in every for each in sweep.deleted),
            left=tuple(each for sweep in every for each in sweep.left),
        )


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Result of publishing: the version that readers see, and the checks."""

    uri: str
    table: str
    version: int | None
    """The published version: the new one if `published`, else the previous one, if there is one."""
    previous_version: int | None
    published: bool
    num_rows: int
    checks: tuple[Check, ...] = field(default=())
