"""Publication of table versions: readers see the version of a tag, which moves only after checks and can move back.

Readers open the version with the tag `published`, which is always complete. Each published version also has its own
tag, which keeps its files for a rollback. The steps of every operation are ordered so that repeating an operation that
was killed completes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from math import ceil

from lance import LanceDataset

from imagerag.artifacts import Check, IndexBuild, Publication
from imagerag.errors import UserError, VersionGoneError
from imagerag.retrieval.ann import read_record
from imagerag.retrieval.checks import check_rows, check_shrink
from imagerag.retrieval.config import PublishConfig, PublishRules
from imagerag.retrieval.feature_column import cached_features, count_lacking
from imagerag.retrieval.pins import drop_resting
from imagerag.retrieval.schema import EncoderIdentity, FeatureIdentity, Fit
from imagerag.retrieval.store import Store
from imagerag.storage.files import read_json, write_json

PUBLISHED = "published"


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    """A publication that a rollback can return to."""

    version: int
    published_at: datetime
    num_rows: int
    recall_at_10: float


@dataclass(frozen=True, kw_only=True)
class FeaturesEntry:
    """Cached features of the published version."""

    base: str
    fit: Fit
    digest: str
    num_rows: int
    """Number of rows with these features."""


@dataclass(frozen=True, kw_only=True)
class IndexStatus:
    """The published version of a table, and its unpublished changes."""

    encoder: EncoderIdentity
    published_version: int | None
    num_rows: int
    """Number of rows in the published version."""
    kind: str | None
    recall_at_10: float | None
    recalls: Mapping[str, float]
    """Measured recalls of the published version's index, by name; empty if search is exact."""
    num_new_rows: int
    """Number of rows that were added since the recalls were measured."""
    features: tuple[FeaturesEntry, ...]
    newest_version: int
    num_newest_rows: int
    history: tuple[HistoryEntry, ...]
    """Publications that are kept, newest first. Those newer than the published version were rolled back."""

    @property
    def unpublished_changes(self) -> bool:
        """Whether the newest version is not the published one."""
        return self.newest_version != self.published_version


def published_version(store: Store) -> int | None:
    """Return the version that readers see, if there is one.

    Raises:
        UserError: if there is no such table.
    """
    tag = store.dataset().tags.list().get(PUBLISHED)
    return None if tag is None else int(tag["version"])


def require_published(store: Store) -> int:
    """Return the version that readers see.

    Raises:
        UserError: if there is no such table, or nothing of it was published.
    """
    version = published_version(store)
    if version is None:
        raise UserError(
            f"nothing was published of table {store.name!r} in {store.uri} yet: `imagerag index publish` or "
            "`imagerag ingest` does it"
        )
    return version


def require_version(store: Store, version: int) -> None:
    """Make sure that `version` of the table, which a model pins or a person named, exists.

    Raises:
        UserError: if the table can't be reached, or has no such version; the message names the published one.
    """
    try:
        if store.has(version):
            return
        now = published_version(store) if store.exists else None
        there = "there is no such table" if now is None else f"version {now} is published now"
    except OSError as error:
        there = f"it can't be reached ({error})"
    raise VersionGoneError(
        f"version {version} of the index {store.name!r} in {store.uri} is not to be had: {there}. Bring that index "
        "back (a home that was moved is named by IMAGERAG_HOME). A model that pins it can also be registered again: on "
        "the index as it is now, or portable, with a copy of the index in it, for machines that can't reach it"
    )


def published_rows(store: Store) -> int:
    """Return the number of rows that readers see; 0 if there is no table or nothing was published."""
    version = published_version(store) if store.exists else None
    return 0 if version is None else int(store.dataset(version).count_rows())


def publish(store: Store, index: IndexBuild, config: PublishConfig) -> Publication:
    """Publish the version that `index` was built on, if it passes the checks.

    A version that is already published is not checked again. Publications beyond those to keep and all versions that
    were never published are deleted, unless they are pinned. What `config` leaves unset is as earlier publications of
    the table set it.

    Raises:
        UserError: if the version is gone, or of an ingest that did not end.
    """
    assert (index.uri, index.table) == (store.uri, store.name), (index, store)
    with store.writer_lock():
        previous, rules = published_version(store), _rules(store, config)
        checks: tuple[Check, ...] = ()
        if previous != index.version:
            checks = _check(store, index, previous, config.max_shrink, rules.min_recall)
        published = all(check.passed for check in checks)
        if published:
            _drop_tags(store, [version for version in _kept(store) if version > (previous or 0)])
            move_tag(store, index.version)
            _drop_tags(store, _superseded(store))
            _drop_tags(store, _kept(store)[: -rules.keep])
            drop_resting(store)
            store.clean_up()
        return Publication(
            uri=store.uri,
            table=store.name,
            version=index.version if published else previous,
            previous_version=previous,
            published=published,
            num_rows=published_rows(store),
            checks=checks,
        )


def rollback(store: Store, to: int | None = None) -> Publication:
    """Publish an earlier version again: version `to`, or the last one that has all features of the current version.

    A version that was rolled back is not published again automatically. Until another version is published, a rollback
    `to` it restores it.

    Raises:
        UserError: if there is nothing to return to, or `to` is not one of the publications that are kept.
    """
    require_published(store)
    with store.writer_lock():
        current = require_published(store)
        kept = _kept(store)
        if to is None:
            to = _complete_before(store, current)
        elif to not in kept:
            raise UserError(
                f"version {to} of table {store.name!r} is not a publication that is kept; these are: {kept}"
            )
        move_tag(store, to)
        return Publication(
            uri=store.uri,
            table=store.name,
            version=to,
            previous_version=current,
            published=True,
            num_rows=published_rows(store),
        )


def status(store: Store) -> IndexStatus:
    """Return what is published, and what is not published yet.

    Raises:
        UserError: if there is no such table.
    """
    newest = store.dataset()
    version = published_version(store)
    published = None if version is None else store.dataset(version)
    record = None if published is None else read_record(published)
    return IndexStatus(
        encoder=store.encoder,
        published_version=version,
        num_rows=published_rows(store),
        kind=record.kind if record else None,
        recall_at_10=record.recall_at_10 if record else None,
        recalls=record.recalls if record else {},
        num_new_rows=record.num_new_rows if record else 0,
        features=() if published is None else tuple(_features_of(published)),
        newest_version=int(newest.version),
        num_newest_rows=int(newest.count_rows()),
        history=tuple(_history_entry(store, kept) for kept in reversed(_kept(store))),
    )


def _complete_before(store: Store, current: int) -> int:
    earlier = [version for version in _kept(store) if version < current]
    if not earlier:
        raise UserError(f"version {current} of table {store.name!r} is the oldest publication that is kept")
    features = cached_features(store.dataset(current).schema)
    for version in reversed(earlier):
        if _num_lacking(store.dataset(version), features) == 0:
            return version
    raise UserError(
        f"no earlier publication of table {store.name!r} has the features of {features[-1].base} for all its rows: "
        f"`imagerag index rollback --name {store.name} --to` one of {earlier}, and then `imagerag features`"
    )


def _superseded(store: Store) -> list[int]:
    """Return publications whose rows the next publication also has, with at least as many features."""
    versions = [store.dataset(version) for version in _kept(store)]
    found = []
    for dataset, later in pairwise(versions):
        rows, later_rows = (record.rows if (record := read_record(each)) else "" for each in (dataset, later))
        features = cached_features(dataset.schema)
        if rows and rows == later_rows and _num_lacking(later, features) <= _num_lacking(dataset, features):
            found.append(int(dataset.version))
    return found


def _num_lacking(dataset: LanceDataset, features: Sequence[FeatureIdentity]) -> int:
    """Return how many features of these kinds are missing, summed over all rows."""
    return sum(count_lacking(dataset, each) for each in features)


def _features_of(dataset: LanceDataset) -> Iterator[FeaturesEntry]:
    for each in cached_features(dataset.schema):
        num_rows = int(dataset.count_rows()) - count_lacking(dataset, each)
        yield FeaturesEntry(base=each.base, fit=each.fit, digest=each.digest, num_rows=num_rows)


def move_tag(store: Store, version: int) -> None:
    """Publish `version`, and keep it for a rollback."""
    store.set_tag(PUBLISHED, version)
    if _tag(version) not in store.dataset().tags.list():
        store.set_tag(_tag(version), version)


def drop_history(store: Store) -> None:
    """Drop all publications except the current one, so that no rollback to them is possible."""
    current = published_version(store)
    _drop_tags(store, [version for version in _kept(store) if version != current])


def require_rows(store: Store, num_rows: int, max_shrink: float) -> None:
    """Make sure that a table may shrink to `num_rows` rows, before rows are deleted irreversibly.

    Raises:
        UserError: if more than the share `max_shrink` of the newest or the published rows would be deleted.
    """
    num_before = max(store.count(), published_rows(store))
    if check_shrink(num_rows, num_before, max_shrink).passed:
        return
    needed = ceil(100 * (1 - num_rows / num_before)) / 100
    raise UserError(
        f"table {store.name!r} would shrink from {num_before} rows to {num_rows}; at most {max_shrink:.0%} may go. "
        f"Nothing was deleted. Is the list whole? If it is: --max-shrink {needed:.2f} (`publish.max_shrink` in the UI)"
    )


def _rules(store: Store, config: PublishConfig) -> PublishRules:
    """Return what holds for publications of a table from now on, and store what `config` sets of it.

    It is in a file beside the table: as part of the table, it would make a version that has to be published again.
    """
    uri = f"{store.uri}/{store.name}.publish.json"
    last = read_json(uri) or {}
    if (own := last | config.lasting()) != last:
        write_json(uri, own)
    return PublishRules(**own)


def _check(
    store: Store, index: IndexBuild, previous: int | None, max_shrink: float, min_recall: float
) -> tuple[Check, ...]:
    if previous is not None and index.version < previous:
        detail = f"version {index.version} is older than the published version {previous}"
        return (Check(name="newer", passed=False, detail=detail),)
    if index.version in _kept(store):
        detail = f"version {index.version} was rolled back: `imagerag index rollback --to {index.version}` undoes that"
        return (Check(name="newer", passed=False, detail=detail),)
    store.require_finished(index.version)
    dataset = store.dataset(index.version)
    return (
        *check_rows(store, dataset, None if previous is None else store.dataset(previous)),
        check_shrink(int(dataset.count_rows()), published_rows(store), max_shrink),
        Check(
            name="recall@10",
            passed=index.recall_at_10 >= min_recall,
            detail=f"{index.recall_at_10:.3f} with {index.kind}; at least {min_recall} is wanted",
        ),
    )


def _kept(store: Store) -> list[int]:
    """Return the published versions that are kept, in ascending order."""
    tags = store.dataset().tags.list()
    return sorted(int(tag["version"]) for name, tag in tags.items() if name == _tag(int(tag["version"])))


def _history_entry(store: Store, version: int) -> HistoryEntry:
    dataset = store.dataset(version)
    record = read_record(dataset)
    assert record is not None, f"version {version} was published without an index"
    return HistoryEntry(
        version=version,
        published_at=dataset.tags.list()[_tag(version)]["created_at"],
        num_rows=int(dataset.count_rows()),
        recall_at_10=record.recall_at_10,
    )


def _drop_tags(store: Store, versions: list[int]) -> None:
    for version in versions:
        store.drop_tag(_tag(version))


def _tag(version: int) -> str:
    return f"{PUBLISHED}-{version}"
