"""Cost of a flow run, from measured values only."""

from collections.abc import Sequence
from datetime import UTC, datetime

from prefect.context import FlowRunContext

from imagerag.artifacts import CachedFeatures, Download, Embedded, TrainingSet
from imagerag.compute import capacity
from imagerag.settings import Settings

Measured = Download | Embedded | CachedFeatures | TrainingSet
"""Results of stages that measure their workers' time."""

_NAMES = {Download: "download", Embedded: "embed", CachedFeatures: "features", TrainingSet: "training set"}


def cost(stages: Sequence[Measured]) -> dict[str, str]:
    """Return the cost of the running flow until now, as names of figures with their values."""
    context = FlowRunContext.get()
    assert context is not None, "a cost is a flow's"
    wall_s = (datetime.now(UTC) - context.start_time).total_seconds()
    figures = {"wall time": f"{wall_s:,.1f} s"}
    if (there := capacity(Settings())) is not None:
        cores, gpus = there
        figures["machine-seconds"] = f"{cores * wall_s:,.1f}: {cores} cores, at work or not"
        if gpus:
            figures["GPU-seconds"] = f"{gpus * wall_s:,.1f}: {gpus} GPUs, at work or not"
    busy = [f"{_NAMES[type(stage)]} {stage.machine_s:,.1f} s" for stage in stages if stage.machine_s]
    images = [made for stage in stages if (made := _images(stage))]
    num_bytes = sum(stage.num_bytes for stage in stages if isinstance(stage, Download))
    figures |= {"workers at work": ", ".join(busy), "images": ", ".join(images)}
    figures["bytes of images stored"] = f"{num_bytes:,}" if num_bytes else ""
    return {figure: value for figure, value in figures.items() if value}


def _images(stage: Measured) -> str:
    match stage:
        case Download(num_fetched=number):
            verb = "fetched"
        case Embedded(num_added=number):
            verb = "embedded"
        case CachedFeatures(num_added=number):
            verb = "encoded"
        case TrainingSet():  # counts rows of several tables
            return ""
    return f"{number:,} {verb}" if number else ""
