"""Which flows never run beside each other: what needs all of a machine takes a slot of a limit that Prefect shows."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from imagerag.settings import Settings

COMPUTE_SLOTS = "trainings-evaluations-features-at-a-time"
"""The limit's name, on the page Concurrency of Prefect's UI."""
_LEASE_S = 60.0
"""A run that is killed loses its slot after so long, which is the shortest that Prefect takes."""


@contextmanager
def compute_slot() -> Iterator[None]:
    """Have the running flow wait for a slot, and keep it for as long as the block.

    Take it before any lock: who holds one and waits for a slot has others wait for that, too.
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
    """Return the limit, made where there is none yet: as the settings say, else as it was set in the UI, else 1."""
    wanted = Settings().compute_slots
    try:
        there = client.read_global_concurrency_limit_by_name(COMPUTE_SLOTS)
    except ObjectNotFound:
        there = None
    if there is not None and wanted in (None, there.limit):
        return there
    with suppress(ObjectAlreadyExists):  # by another run, just now
        client.upsert_global_concurrency_limit_by_name(COMPUTE_SLOTS, wanted or 1)
    return client.read_global_concurrency_limit_by_name(COMPUTE_SLOTS)
