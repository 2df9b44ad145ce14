"""What an evaluation found: numbers for programs, one table for people."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from imagerag.evaluation.config import MetricName
from imagerag.evaluation.intervals import Estimate
from imagerag.files import read_json

PAGE, TABLE, GRID, RESULTS = "index.html", "table.md", "grid.png", "results.json"
"""What an evaluation's folder holds."""
JUDGES: tuple[MetricName, MetricName] = ("recognised", "recognised_second")
_SETTING = {"slerp": "w =", "adapter": "scale"}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median milliseconds of one picture at a time, on a worker with nothing else to do."""

    text: float
    """And all that is none of the others."""
    retrieval: float
    denoising: float
    decoding: float
    total: float
    slowdown: float
    """Of a picture over the base model's that was made just before or after it: the median of such pairs' ratios."""


@dataclass(frozen=True, kw_only=True)
class Copies:
    """How near pictures are to what they were shown, by EfficientNet's features."""

    similarity: float
    """Mean over pictures of the cosine with the nearest reference."""
    threshold: float
    """What 999 of 1,000 pairs of different real pictures do not reach."""
    share: float
    """Of pictures above it: close to a copy."""
    by_picture: tuple[float | None, ...]
    """The similarity of each; None for pictures that were shown nothing of the prompts' pictures."""

    def label(self, picture: int) -> str:
        """Return what people have to know of a picture that copies; nothing of others."""
        similarity = self.by_picture[picture]
        return f"copy: similarity {similarity:.2f}" if similarity is not None and similarity > self.threshold else ""


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """What of the evaluation was seen before."""

    num_prompts_in_index: int
    """Prompts that are captions of the index, from which they may retrieve."""
    num_prompts_learnt: int
    """Prompts that an adapter's training learnt from; more than none makes all figures worthless."""
    num_images: int
    """Pictures in the index of the prompts."""
    num_images_learnt: int
    """Of these, such as were learnt from under another caption: the same file."""
    num_near_duplicates: int
    """Of these, such as have a near duplicate among what was learnt from: nearly the same thumbnail."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one way."""

    estimate: Estimate
    by_prompt: tuple[float | None, ...] | None = None
    """Of each prompt, where it can be measured picture by picture; None for prompts that could not."""

    @property
    def values(self) -> np.ndarray:
        """`by_prompt` as an array (P,), NaN for None."""
        return np.array([np.nan if value is None else value for value in self.by_prompt or ()], float)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What retrieval did for one way."""

    hit_rate: float
    """Share of pictures that were shown a row with the prompt as its caption."""
    similarity: float
    """Mean cosine of prompts and captions of what was shown."""
    gated: float
    """Share of what was shown that the gate kept without effect."""


@dataclass(frozen=True, kw_only=True)
class WayResults:
    """All about one way."""

    name: str
    title: str
    function_evaluations: int
    """How often the UNet runs for a picture (NFE); with guidance, twice a step counts once, as in the paper."""
    num_pictures: int
    scores: Mapping[MetricName, Score]
    latency: Latency | None = None
    retrieval: Retrieval | None = None
    copies: Copies | None = None

    @property
    def disputed(self) -> np.ndarray:
        """Return of which prompts (P,) the judges see different shares recognised, where both were asked."""
        first, second = (self.scores[name].values for name in JUDGES)
        return np.asarray((first != second) & ~np.isnan(first) & ~np.isnan(second))


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """What one setting of slerp's w or the adapter's scale gives, and how much of it is copied."""

    curve: str
    setting: float
    scores: Mapping[MetricName, Estimate]
    """By the judges."""
    copies: Copies | None


@dataclass(frozen=True, kw_only=True)
class MetricAbout:
    """What people have to know of a metric."""

    title: str
    larger_is_better: bool


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that an evaluation found."""

    base: str
    adapter: str
    index: str
    machine: str
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    metrics: Mapping[MetricName, MetricAbout]
    ways: tuple[WayResults, ...]
    leakage: Leakage
    points: tuple[CurvePoint, ...] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Metrics, and what they lack."""

    def way(self, name: str) -> WayResults | None:
        """Return the results of a way, if it was measured."""
        return next((way for way in self.ways if way.name == name), None)

    @property
    def candidate(self) -> WayResults:
        """Of the adapter, which every evaluation measures."""
        return next(way for way in self.ways if way.name == "adapter")

    @property
    def best_slerp(self) -> WayResults:
        """Of the best that needs no training, which is measured wherever the gate's metric is."""
        return next(way for way in self.ways if way.name == "best_slerp")

    @property
    def base_model(self) -> WayResults:
        """Of the bare base model, likewise."""
        return next(way for way in self.ways if way.name == "base")

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Results":
        """Return what `to_json` was called on."""
        own = dict(values)
        own["metrics"] = {name: MetricAbout(**each) for name, each in own["metrics"].items()}
        own["leakage"] = Leakage(**own["leakage"])
        own["prompts"], own["categories"] = tuple(own["prompts"]), tuple(own["categories"])
        own["ways"] = tuple(map(_way, own["ways"]))
        own["points"] = tuple(map(_point, own["points"]))
        return cls(**own)

    def flat(self) -> dict[str, float]:
        """Return the numbers for MLflow: `adapter/recognised` and so on."""
        flat: dict[str, float] = {}
        for way in self.ways:
            flat |= {f"{way.name}/{metric}": score.estimate.mean for metric, score in way.scores.items()}
            if way.latency is not None:
                flat[f"{way.name}/ms"] = way.latency.total
            if way.copies is not None:
                flat[f"{way.name}/copies"] = way.copies.share
        return flat

    def rows(self) -> Iterator[list[str]]:
        """Yield the table, line by line, its head first."""
        titles = [about.title + (" ↑" if about.larger_is_better else " ↓") for about in self.metrics.values()]
        split = "of it text and the rest + retrieval + denoising + decoding"
        judged = all(name in self.metrics for name in JUDGES)
        yield ["", "NFE", *titles, *(["judges disagree"] if judged else []), "copies", "ms per image", split]
        for way in self.ways:
            cells = [_cell(way.scores.get(name)) for name in self.metrics]
            cells += [f"{np.mean(way.disputed):.3f}"] if judged else []
            cells += ["" if way.copies is None else f"{way.copies.share:.3f}"]
            yield [way.title, str(way.function_evaluations), *cells, *_milliseconds(way.latency)]

    def point_rows(self) -> Iterator[list[str]]:
        """Yield what the settings of slerp and the adapter give, and how much of it is copied, its head first."""
        judges = [name for name in JUDGES if name in self.metrics]
        yield ["", *(self.metrics[name].title for name in judges), "similarity to what was shown", "copies"]
        for point in self.points:
            cells = [str(point.scores[name]) for name in judges]
            copies = point.copies
            cells += ["", ""] if copies is None else [f"{copies.similarity:.3f}", f"{copies.share:.3f}"]
            yield [f"{point.curve}, {_SETTING[point.curve]} {point.setting}", *cells]

    def slices(self) -> Iterator[list[str]]:
        """Yield the adapter's paired gain over the base model by category, its head first."""
        base, adapter = self.base_model, self.candidate
        names = [name for name in self.metrics if adapter.scores[name].by_prompt is not None]
        if len(set(self.categories)) < 2 or not names:
            return
        yield ["category", "prompts", *(f"{self.metrics[name].title}, base → adapter" for name in names)]
        for category in sorted(set(self.categories)):
            own = np.array([each == category for each in self.categories])
            pairs = [(base.scores[name].values[own], adapter.scores[name].values[own]) for name in names]
            yield [category or "(none)", str(own.sum()), *(f"{_mean(b)} → {_mean(a)}" for b, a in pairs)]

    def retrieval_rows(self) -> Iterator[list[str]]:
        """Yield what retrieval did, its head first."""
        yield ["", "prompt's own caption among the references", "similarity", "share under the gate"]
        for way in self.ways:
            if (did := way.retrieval) is not None:
                yield [way.title, f"{did.hit_rate:.3f}", f"{did.similarity:.3f}", f"{did.gated:.3f}"]

    def notes(self) -> list[str]:
        """Return what has to be said beside the tables."""
        seen = self.leakage
        return [
            *(
                ["Not measured: " + "; ".join(f"{name} ({why})" for name, why in self.not_measured.items()) + "."]
                if self.not_measured
                else []
            ),
            f"Of {len(self.prompts)} prompts, {seen.num_prompts_in_index} are captions of the index, and "
            f"{seen.num_prompts_learnt} were learnt from. Of the index's {seen.num_images} pictures of them, "
            f"{seen.num_images_learnt} were learnt from under another caption, and {seen.num_near_duplicates} have a "
            "near duplicate among what was learnt.",
            "What any way was shown of a prompt's pictures is left out for all ways, when a picture is recognised. "
            "Copies: the share of pictures that are nearer to what they were shown than 999 of 1,000 pairs of "
            f"different real pictures are to each other. Times are medians of one picture at a time on {self.machine}.",
        ]

    def markdown(self) -> str:
        """Return the whole as a page."""
        parts = (self.rows(), self.point_rows(), self.retrieval_rows(), self.slices())
        tables = [table for rows in parts if (table := _table(rows))]
        return "\n".join("\n".join(part) + "\n" for part in (*tables, *([note] for note in self.notes())))


def read_results(folder: str) -> Results:
    """Return what an evaluation found. Args: folder: of `Evaluated`."""
    found = read_json(f"{folder}/{RESULTS}")
    assert found is not None, folder
    return Results.from_json(found["results"])


def _way(values: dict[str, Any]) -> WayResults:
    own = dict(values)
    own["scores"] = {
        name: Score(
            estimate=Estimate(**score["estimate"]),
            by_prompt=None if score["by_prompt"] is None else tuple(score["by_prompt"]),
        )
        for name, score in own["scores"].items()
    }
    for name, kind in (("latency", Latency), ("retrieval", Retrieval)):
        own[name] = None if own[name] is None else kind(**own[name])
    return WayResults(**own | {"copies": _copies(own["copies"])})


def _point(values: dict[str, Any]) -> CurvePoint:
    scores = {name: Estimate(**each) for name, each in values["scores"].items()}
    return CurvePoint(**values | {"scores": scores, "copies": _copies(values["copies"])})


def _copies(values: dict[str, Any] | None) -> Copies | None:
    return None if values is None else Copies(**values | {"by_picture": tuple(values["by_picture"])})


def _cell(score: Score | None) -> str:
    if score is None:
        return "not measured"
    own = score.estimate
    return f"{own.mean:.3f}" if own.low == own.high else str(own)


def _milliseconds(latency: Latency | None) -> tuple[str, str]:
    if latency is None:
        return "", ""
    parts = (latency.text, latency.retrieval, latency.denoising, latency.decoding)
    return f"{latency.total:.0f}", " + ".join(f"{part:.1f}" for part in parts)


def _mean(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.3f}" if len(known) else "none"


def _table(rows: Iterator[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(each.replace("|", "\\|") for each in row) + " |" for row in rows]
    if lines:
        lines.insert(1, "|---" * (lines[0].count(" | ") + 1) + "|")
    return lines
