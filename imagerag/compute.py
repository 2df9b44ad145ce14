"""Ray: a cluster by address, or one on this machine for as long as the process needs it."""

import os
import signal
import sys
import threading
import warnings

from imagerag.settings import Settings

# A thread that still uses Ray after its end would start another one by accident.
_ENV = {"RAY_ENABLE_AUTO_CONNECT": "0"}
_LOCAL_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Ray's own errors reach Python; what its C++ side writes to the console beside them is for Ray's developers.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # By default Ray has its workers give way to everything else on the machine (niceness 15).
    "RAY_worker_niceness": "0",
    # Nobody takes a machine away from a Ray that is on it alone: a training needs no process that looks out for it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A training waits at each checkpoint, and at its end, until Ray Train looks for them: by default every two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray listens on every interface where it takes itself for part of a cluster, which on Linux is always.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_WORKER_ENV = {
    # img2dataset's image library looks for its newer version on the internet at every import.
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "RUST_LOG": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def ray_environment(*, local: bool) -> dict[str, str]:
    """Return the variables that Ray reads when it is first imported, on this machine or of a cluster by address."""
    return _ENV | (_LOCAL_ENV | _WORKER_ENV if local else {})


def start_ray(settings: Settings) -> None:
    """Make Ray usable in this process, and leave it running for the next stage; it ends with the process.

    A Ray that is initialised already is used as it is. Otherwise this connects to `settings.ray_address`, or starts
    Ray on this machine, on loopback and with free ports.
    """
    # Ray reads its own when it is first imported. Workers of this machine inherit the others: those that start with Ray
    # can be used at once, where an environment of the job's own has each start anew, in half a second.
    local = settings.ray_address is None
    os.environ.update(ray_environment(local=local))
    import ray

    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        # Ray's processes are forked and at once replaced: Lance's warnings of what a fork may do don't apply.
        warnings.filterwarnings("ignore", message=".*fork")
        ray.init(
            address=settings.ray_address or "local",
            include_dashboard=False if local else None,
            logging_level="warning",
            log_to_driver=False,
            runtime_env=None if local else {"env_vars": _WORKER_ENV},
        )
    # Ray's own handler exits; Prefect's, which it replaced, ends a cancelled flow run as cancelled.
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def capacity(settings: Settings) -> tuple[int, int] | None:
    """Return how many cores and GPUs Ray has; those of this machine where none was needed, without its GPUs.

    None where Ray is a cluster that this process is not connected to.
    """
    ray = sys.modules.get("ray")  # whoever uses it has imported it
    if ray is not None and ray.is_initialized():
        there = ray.cluster_resources()
        return int(there.get("CPU", 0)), int(there.get("GPU", 0))
    return None if settings.ray_address is not None else (os.cpu_count() or 1, 0)


def stop_ray() -> None:
    """End this process's Ray, or its connection to a cluster; `start_ray` begins anew."""
    import ray
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    # One that is still at work would use Ray after its end, and Ray's answer to that is to exit the process.
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
    ray.shutdown()
