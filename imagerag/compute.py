"""Ray: a cluster by address, or one on this machine for as long as it is needed."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from imagerag.settings import Settings

_LOCAL_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Ray listens on every interface where it takes itself for part of a cluster, which on Linux is always.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_WORKER_ENV = {
    # img2dataset's image library looks for its newer version on the internet at every import.
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "RUST_LOG": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def ray_runtime(settings: Settings) -> Iterator[None]:
    """Make Ray usable inside the block.

    A Ray that is initialised already is used as it is. Otherwise this connects to `settings.ray_address`, or starts
    Ray on this machine, on loopback and with free ports, and ends it with the block.
    """
    if settings.ray_address is None:
        # Ray reads these when it is first imported.
        os.environ.update(_LOCAL_ENV)
    import ray

    if ray.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        # Ray's processes are forked and at once replaced: Lance's warnings of what a fork may do don't apply.
        warnings.filterwarnings("ignore", message=".*fork", module="lance|subprocess")
        ray.init(
            address=settings.ray_address or "local",
            include_dashboard=False if settings.ray_address is None else None,
            logging_level="warning",
            log_to_driver=False,
            runtime_env={"env_vars": _WORKER_ENV},
        )
    try:
        yield
    finally:
        ray.shutdown()
