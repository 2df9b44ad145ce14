"""The task `publish`: publish an index, and emit the events that trigger automations in `infra/prefect.yaml`."""

from prefect import get_run_logger
from prefect.events import emit_event

from imagerag.artifacts import CachedFeatures, IndexBuild, Publication
from imagerag.errors import UserError
from imagerag.hspace.config import FeaturesConfig
from imagerag.registry.champion import champions_behind
from imagerag.retrieval.config import PublishConfig
from imagerag.retrieval.publish import publish, status
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.memo import Memo
from tasks.policy import stage


@stage("publish")
def publish_index(index: IndexBuild, config: PublishConfig) -> Publication:
    """Move the readers' tag to the new version if its checks pass, and emit events about it."""
    store = Store(index.uri, index.table)
    result = publish(store, index, config)
    logger = get_run_logger()
    for check in result.checks:
        if not check.passed:
            logger.error("not published: %s: %s", check.name, check.detail)
    if result.published:
        _announce_once(store, result)
    return result


def _announce_once(store: Store, publication: Publication) -> None:
    """Emit the events about a published version, unless that was done.

    It is stored afterwards, whereas the tag of a version that was moved by an attempt that then failed says nothing
    about events: its retry has to emit them. A job that was killed in between has them emitted twice.
    """
    version = publication.version
    assert version is not None, publication
    announced = Memo(f"{store.uri}/{store.name}.announced.json", store.index_version(version).key)
    if announced.recall() is not None:
        return
    _announce("imagerag.index.published", store.name, version=version, num_rows=publication.num_rows)
    for base in [each.base for each in status(store).features] or [FeaturesConfig().base]:
        _announce("imagerag.features.wanted", store.name, version=version, base=base)
    announced.keep(True)


@stage("champion")
def check_champion(cached: CachedFeatures, publication: Publication) -> None:
    """Emit an event for each champion on an older version of the published index, which has the features for it."""
    assert publication.version is not None, publication
    try:
        behind = list(champions_behind(Settings(), cached, publication.version))
    except UserError as error:
        get_run_logger().warning("whether the champion uses this index is not known: %s", error)
        return
    for model_name, adapter in behind:
        _announce(
            "imagerag.champion.behind",
            cached.table,
            adapter=adapter,
            version=publication.version,
            model_name=model_name,
        )


def _announce(event: str, name: str, **payload: str | int) -> None:
    """Emit an event about an index. Prefect adds the flow, deployment and task that it comes from."""
    resource = {"prefect.resource.id": f"imagerag.index.{name}", "prefect.resource.name": name}
    emit_event(event, resource, payload=payload)
