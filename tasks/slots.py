"""A Prefect concurrency limit for flows that need a whole machine, so that they don't run at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from imagerag.settings import Settings

COMPUTE_SLOTS = "trainings-evaluations-features-at-a-time"
"""Name of the limit, as on the page Concurrency of Prefect's UI."""
_LEASE_S = 60.0
"""Time after which a killed run loses its slot, the shortest that Prefect accepts."""


@contextmanager
def compute_slot() -> Iterator[None]:
    """Wait for a slot, and hold it during the block.

    Acquire the slot before any lock: a flow that waits for a slot with a lock held blocks others that need the lock.
    """
    with get_client(sync_client=True) as client:
        limit = prepare_slots(client)
    if limit.active_slots >= limit.limit:
        get_run_logger().info(
            "waits for others to end: %s of %s slots are taken of %s, a concurrency limit in Prefect's UI",
            limit.active_slots,
            limit.limit,
            limit.name,
        )
    with concurrency(COMPUTE_SLOTS, lease_duration=_LEASE_S):
        yield


def prepare_slots(client: SyncPrefectClient) -> GlobalConcurrencyLimitResponse:
    """Return the limit, created if necessary: the setting's value, otherwise the one set in the UI, otherwise 1."""
    wanted = Settings().compute_slots
    try:
        there = client.read_global_concurrency_limit_by_name(COMPUTE_SLOTS)
    except ObjectNotFound:
        there = None
    if there is not None and wanted in (None, there.limit):
        return there
    with suppress(ObjectAlreadyExists):  # another run has just created it
        client.upsert_global_concurrency_limit_by_name(COMPUTE_SLOTS, wanted or 1)
    return client.read_global_concurrency_limit_by_name(COMPUTE_SLOTS)
