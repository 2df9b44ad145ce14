"""Connect to a Ray cluster, or start Ray on this machine for the lifetime of the process."""

import os
import signal
import sys
import threading
import warnings

from imagerag.errors import UserError
from imagerag.settings import Settings

# Otherwise a thread that uses Ray after its shutdown would start a new one.
_ENV = {"RAY_ENABLE_AUTO_CONNECT": "0"}
_LOCAL_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Errors reach Python as exceptions; the logs of Ray's C++ backend are for its developers.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # By default, Ray's workers run at a low priority (niceness 15).
    "RAY_worker_niceness": "0",
    # A local machine is not preempted, so a training needs no process that watches for it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # At each checkpoint and at its end, a training waits until Ray Train polls it, by default every two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Without this, Ray on Linux always listens on every interface, as for a cluster.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_LONGEST_TMPDIR = 30
"""Characters. A socket's path has 107 at most, and Ray adds its session's name, with times and a process id."""
_WORKER_ENV = {
    # Otherwise albumentations, which img2dataset imports, checks for updates on the internet at every import.
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "RUST_LOG": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def ray_environment(*, local: bool) -> dict[str, str]:
    """Return the environment variables that Ray reads at its first import, for a local Ray or for a cluster."""
    return _ENV | (_LOCAL_ENV | _WORKER_ENV if local else {})


def start_ray(settings: Settings) -> None:
    """Initialise Ray in this process, where it stays available to later stages until the process ends.

    Does nothing if Ray is initialised already. Otherwise connects to `settings.ray_address`, or starts Ray on this
    machine, on loopback and with free ports.

    Raises:
        UserError: if Ray has to be started on this machine, but was imported with other variables than it needs.
    """
    imported = sys.modules.get("ray")
    if imported is not None and imported.is_initialized():
        return
    # Ray reads its own variables at its first import. Local workers inherit the rest: workers that were started with
    # Ray are then used at once, while a runtime_env would restart each of them, which takes half a second.
    local = settings.ray_address is None
    if local and imported is not None and not (_ENV | _LOCAL_ENV).items() <= os.environ.items():
        raise UserError(
            "Ray was imported before imagerag could configure it. Start Python anew, and call "
            "`imagerag.compute.start_ray(Settings())` before `import ray`; or start Ray yourself, by `ray.init()` or "
            "as a cluster (`IMAGERAG_RAY_ADDRESS`)"
        )
    os.environ.update(ray_environment(local=local))
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        # Ray forks and then executes another program, so Lance's warnings about forks do not apply.
        warnings.filterwarnings("ignore", message=".*fork")
        ray.init(
            address=settings.ray_address or "local",
            include_dashboard=False if local else None,
            logging_level="warning",
            log_to_driver=False,
            runtime_env=None if local else {"env_vars": _WORKER_ENV},
            _temp_dir=_short_folder() if local else None,
        )
    # Ray's handler exits the process; the replaced one, Prefect's, marks a cancelled flow run as cancelled.
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def _short_folder() -> str | None:
    """Return where Ray's sockets are put, if `TMPDIR`, where Ray puts them, makes their path too long for Linux."""
    too_long = len(os.environ.get("TMPDIR", "")) > _LONGEST_TMPDIR and "RAY_TMPDIR" not in os.environ
    return "/tmp/ray" if too_long else None  # noqa: S108 - where Ray puts them itself if TMPDIR is not set


def capacity(settings: Settings) -> tuple[int, int] | None:
    """Return the number of CPU cores and GPUs of Ray; if Ray was not started, this machine's cores and 0 GPUs.

    None if Ray is a cluster that this process is not connected to.
    """
    ray = sys.modules.get("ray")  # imported only if it is in use
    if ray is not None and ray.is_initialized():
        there = ray.cluster_resources()
        return int(there.get("CPU", 0)), int(there.get("GPU", 0))
    return None if settings.ray_address is not None else (os.cpu_count() or 1, 0)


def stop_ray() -> None:
    """Shut down this process's Ray, or disconnect from the cluster; `start_ray` can be called again."""
    import ray
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    # A running executor would use Ray after its shutdown, on which Ray exits the process.
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
    ray.shutdown()
