"""The cached-features job: computes `h_retr` for all rows of a table that lack it for a base model.

Ray Data distributes the table's fragments to workers, each with a base model. A worker writes a fragment's features to
an uncommitted file, and the driver commits these files every minute. So no features pass through the driver, a killed
job loses the last minute and the fragments in progress, and the next job computes what is missing.
"""

import time

import pyarrow as pa

from imagerag.artifacts import CachedFeatures
from imagerag.base.files import BaseFiles, read_json, resolve
from imagerag.errors import UserError
from imagerag.hspace.config import FeaturesConfig
from imagerag.progress import OnProgress, silent
from imagerag.retrieval import feature_column
from imagerag.retrieval.schema import FeatureIdentity, Features, Fit
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.workers import Dtype, Job, run_job


def cache_features(
    store: Store, config: FeaturesConfig, settings: Settings, on_progress: OnProgress = silent
) -> CachedFeatures:
    """Compute the missing features of all rows of the latest version for `config.base`.

    Idempotent: if no features are missing, neither Ray nor the model is started. Features with another fit than
    `config.fit` are replaced.

    Args:
        store: the table.
        config: base model, fit and workers.
        settings: Ray's address and other settings.
        on_progress: progress callback, called with encoded rows.

    Raises:
        UserError: if the table or base model does not exist, an ingest of the table did not end, the features can't be
            cached, or there are fewer GPUs or cores than `config` requests.
        StalledError: if the workers hang. Calling again resumes.
    """
    started = time.perf_counter()
    files = resolve(config.base)
    with store.writer_lock():
        store.require_finished()
        identity, superseded = _choose(files, config.fit, store.dataset().schema)
        version = feature_column.prepare(store, identity, superseded)
        fragments = feature_column.missing(store.dataset(version), identity)
        num_missing, machine_s = sum(fragments.values()), 0.0
        if fragments:
            job = Job(
                parts=[pa.table({"fragment": [each], "num_rows": [count]}) for each, count in fragments.items()],
                worker=Worker,
                arguments={"identity": identity, "store": store, "version": version, "batch_size": config.batch_size},
                num_rows=num_missing,
                # All are committed on the version in which they were missing: they are of other fragments.
                commit=lambda filled: feature_column.commit(store, filled, version),
                commit_every_s=config.commit_every_s,
                on_done=lambda done: on_progress(done, num_missing, "encoded"),
            )
            machine_s = run_job(job, config, settings)
        return CachedFeatures(
            uri=store.uri,
            table=store.name,
            version=store.version,
            num_rows=store.count(),
            num_added=num_missing,
            base_id=identity.base,
            fit=identity.fit,
            features_digest=identity.digest,
            duration_s=time.perf_counter() - started,
            machine_s=machine_s,
        )


def identities_of(files: BaseFiles) -> dict[Fit, FeatureIdentity]:
    """Return the identity of a base model's features for each fit, without loading the model."""
    from imagerag.hspace.encode import feature_identity
    from imagerag.hspace.fit import FITS

    config = read_json(files.parts["unet"].files[0])
    return {fit: feature_identity(files.identity, config, fit) for fit in FITS}


def identity_of(files: BaseFiles, schema: pa.Schema) -> FeatureIdentity:
    """Return the identity of a base model's features in an index, without loading the model.

    Args:
        files: files of the base model.
        schema: schema of the index's table.

    Returns:
        The features that the table has, or those with the default fit if it has none.
    """
    from imagerag.hspace.encode import identity_in

    return identity_in(schema, files.identity, read_json(files.parts["unet"].files[0]))


def _choose(files: BaseFiles, fit: Fit | None, schema: pa.Schema) -> tuple[FeatureIdentity, list[FeatureIdentity]]:
    """Return the features to compute, and the features in the table that they replace.

    These have the same base model and another fit, or the same base model name and another digest.
    """
    of_each = identities_of(files)
    chosen = identity_of(files, schema) if fit is None else of_each[fit]
    own = {each.digest for each in of_each.values()}
    others = [each for each in feature_column.cached_features(schema) if each.digest != chosen.digest]
    return chosen, [each for each in others if each.digest in own or each.base == chosen.base]


class Worker:
    """Holds a base model and computes the features of fragments."""

    def __init__(
        self,
        *,
        identity: FeatureIdentity,
        store: Store,
        version: int,
        batch_size: int,
        device: str,
        dtype: Dtype | None,
    ) -> None:
        from imagerag.base.model import load_base
        from imagerag.hspace.encode import feature_identity

        self._base = load_base(identity.base, device, dtype)
        own = feature_identity(self._base.identity, self._base.unet.config, identity.fit)
        if own.digest != identity.digest:
            raise UserError(
                f"the base model {identity.base} must be the same on every machine; its features' digest is "
                f"{identity.digest} where the job was started and {own.digest} on a worker"
            )
        self._store, self._identity, self._version, self._batch_size = store, identity, version, batch_size

    def __call__(self, part: pa.Table) -> tuple[list[str], int]:
        """Fill one `fragment`; return what was filled, and its `num_rows`."""
        (row,) = part.to_pylist()
        filled = feature_column.fill(
            self._store, self._identity, self._version, row["fragment"], self._compute, self._batch_size
        )
        return [filled], row["num_rows"]

    def _compute(self, images: list[bytes], captions: list[str]) -> Features:
        from imagerag.hspace.encode import encode_references, open_images, to_cache

        base, pictures = self._base, open_images(images)
        return to_cache(
            encode_references(base.vae, base.unet, base.conditioner, pictures, captions, self._identity.fit)
        )
