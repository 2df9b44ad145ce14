"""Parameters of all flows, as one form, one JSON object and one set of command-line options each; without Prefect."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from imagerag.config import Config, Place
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.source import check_source
from imagerag.corpus.url_list import BadRows, UrlColumns
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.encoder_files import check_spec
from imagerag.errors import UserError
from imagerag.evaluation.config import EvaluateConfig, GateConfig
from imagerag.hspace.config import FeaturesConfig
from imagerag.retrieval.config import IndexConfig, PublishConfig
from imagerag.settings import DEFAULT_NAME, check_name, settings_of
from imagerag.training import config
from imagerag.training.config import FinetuneConfig, SynthesizeConfig, TrainWorkersConfig


class _Corpus(Config):
    name: str = Field(default=DEFAULT_NAME, description="Name of the corpus.")

    _check_name = field_validator("name")(check_name)


class _Publication(Config):
    index: IndexConfig = Field(default=IndexConfig(), description="How to build the index.")
    publish: PublishConfig = Field(
        default=PublishConfig(), description="Checks that a version must pass to be published."
    )


class _Features(Config):
    features: FeaturesConfig = Field(default=FeaturesConfig(), description="How to compute cached features.")


class _Training(Config):
    data: SynthesizeConfig = Field(default=config.tiny().data, description="Training data.")
    training: FinetuneConfig = Field(default=config.tiny().training, description="Optimisation.")
    workers: TrainWorkersConfig = Field(default=TrainWorkersConfig(), description="Training workers.")
    group: str | None = Field(default=None, description="Parent MLflow run of this training's run, for ablations.")
    anew: bool = Field(
        default=False,
        description="Start a new training on the published index, even if an unfinished training with these parameters "
        "exists for an earlier version.",
    )


class _Evaluation(Config):
    evaluation: EvaluateConfig = Field(default=EvaluateConfig(), description="What to generate and measure.")
    gate: GateConfig = Field(default=GateConfig(), description="Conditions for a candidate to become champion.")
    model_name: str | None = Field(
        default=None, description="Registered model in MLflow; unset: the setting IMAGERAG_MODEL_NAME."
    )
    portable: bool = Field(
        default=False, description="Pack a copy of the index into the model, for machines that can't reach the store."
    )
    keep_models: int | None = Field(
        default=None,
        ge=0,
        description="Number of registered versions to keep, in addition to versions with an alias and versions that "
        "people promoted or rolled back; older ones are removed, and no longer keep their version of the index. Unset: "
        "as many as the last run that set it, at first 10.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.gate.check(self.evaluation)
        settings_of(self.model_name)
        return self


class _Adapter(_Corpus):
    name: str = Field(default=DEFAULT_NAME, description="Name of the corpus; it needs a published index.")
    adapter: Place | None = Field(
        default=None, description="Folder or URI of a trained adapter; unset: the corpus's last training."
    )


class CorpusParameters(_Publication, _Corpus):
    """Parameters of `ingest` and `reindex`."""

    url_list: str = Field(
        title="Folder or URL list",
        description="A path (on a cluster, the same on every machine) or any fsspec URI of: a folder of images, "
        "including its subfolders but not hidden files; a list of image URLs with captions, as parquet, csv, tsv, json "
        "or jsonl, or of plain URLs, as txt; or a dataset with its images, as parquet, webdataset tars or a Lance "
        "table. A list is a file (also compressed, .gz or .zst), or a folder or glob of files.",
    )
    name: str = Field(default=DEFAULT_NAME, description="Name of the corpus, of its shards folder and its table.")
    captions: str | None = Field(
        default=None,
        description="Captions of a folder's images: parquet, csv, tsv, json or jsonl with a column of file names "
        "relative to the folder (`file`, `file_name`, `path`, `image`, ...) and one of captions. Images without a row, "
        "and rows without an image, are counted. Unset: `metadata.csv` in the folder, or the text of `name.txt` next "
        "to `name.jpg`, or the words of the file name.",
    )
    columns: UrlColumns = Field(
        default=UrlColumns(), description="Columns of the list or the captions table; unset columns are guessed."
    )
    bad_rows: BadRows = Field(
        default=BadRows(), description="How to treat unusable rows of the list or the captions table."
    )
    encoder: str = Field(
        default="tiny",
        description="Encoder: `tiny`, an open_clip name and tag (`ViT-B-32/openai`), `hf-hub:org/name@commit`, or a "
        "folder.",
    )
    retry_failed: bool = Field(
        default=False,
        description="Retry all URLs that failed in earlier runs. Transient failures (no connection, a busy server, "
        "...) are retried anyway, in five runs at most.",
    )
    refresh: bool = Field(
        default=False,
        description="Ask servers whether images have changed, by conditional requests (ETag, Last-Modified), and fetch "
        "those that have. Off: fetched URLs are not requested again.",
    )
    download: DownloadConfig = Field(default=DownloadConfig(), description="How to fetch images.")
    embed: EmbedConfig = Field(default=EmbedConfig(), description="How to embed images and captions.")

    _check_encoder = field_validator("encoder")(check_spec)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        check_source(self.url_list, self.captions)
        return self


class FeaturesParameters(_Publication, _Features, _Corpus):
    """Parameters of `features`."""


class FinetuneParameters(_Training, _Corpus):
    """Parameters of `finetune`; defaults are those of the recipe `tiny`."""

    name: str = Field(default=DEFAULT_NAME, description="Name of the corpus; it needs features of the base model.")
    dry_run: bool = Field(default=False, description="Only estimate memory, steps, time and checkpoint sizes.")


class EvaluateParameters(_Evaluation, _Adapter):
    """Parameters of `evaluate`."""


class PipelineParameters(_Evaluation, _Training, _Features, CorpusParameters):
    """Parameters of `ingest` and of the flows that follow it on its index."""

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        if self.features.base != self.data.base:
            raise UserError(
                f"features are made by the base model that learns to use them: features.base is {self.features.base} "
                f"and data.base is {self.data.base}"
            )
        return self

    def part(self, model: type[Config]) -> dict[str, Any]:
        """Return the parameters that the flow with the parameters `model` takes."""
        return {field: getattr(self, field) for field in model.model_fields if hasattr(self, field)}


PARAMETERS: Mapping[str, type[Config]] = {
    "ingest": CorpusParameters,
    "reindex": CorpusParameters,
    "features": FeaturesParameters,
    "finetune": FinetuneParameters,
    "evaluate": EvaluateParameters,
    "pipeline": PipelineParameters,
}
"""The parameters of each flow."""
