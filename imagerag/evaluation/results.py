"""Results of an evaluation, as JSON, flat metrics for MLflow, and Markdown tables."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from imagerag.evaluation.config import MetricName
from imagerag.evaluation.intervals import Estimate
from imagerag.plain import in_markdown
from imagerag.storage.files import read_json

PAGE, TABLE, GRID, RESULTS = "index.html", "table.md", "grid.png", "results.json"
"""Files in an evaluation's folder."""
JUDGES: tuple[MetricName, MetricName] = ("recognised", "recognised_second")
_SETTING = {"slerp": "w =", "adapter": "scale"}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median latency in milliseconds of single pictures on an otherwise idle worker."""

    text: float
    """Text encoding, and everything outside of the other parts."""
    retrieval: float
    denoising: float
    decoding: float
    total: float
    slowdown: float
    """Median ratio to the base model's latency, over pairs of pictures that were made one after the other."""


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Similarity of pictures to their references, in EfficientNet features."""

    similarity: float
    """Cosine similarity to the nearest reference, averaged over pictures."""
    threshold: float
    """The 99.9 % quantile of similarities between different real pictures."""
    share: float
    """Share of pictures above the threshold, which count as copies."""
    by_picture: tuple[float | None, ...]
    """Similarity of each picture; None if none of its references is a real picture of a prompt."""

    def label(self, picture: int) -> str:
        """Return a label for a copy, with its similarity; an empty string for other pictures."""
        similarity = self.by_picture[picture]
        return f"copy: similarity {similarity:.2f}" if similarity is not None and similarity > self.threshold else ""


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """Overlap of the evaluation with the index and the training set."""

    num_prompts_in_index: int
    """Prompts that are captions of the index."""
    num_prompts_learnt: int
    """Prompts that are captions of training rows. Any of them invalidates the evaluation."""
    num_images: int
    """Real pictures of the prompts in the index."""
    num_images_learnt: int
    """Real pictures that are also training rows, under another caption (same SHA-256)."""
    num_near_duplicates: int
    """Real pictures with a near duplicate among the training rows (nearly equal thumbnails)."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one way."""

    estimate: Estimate
    by_prompt: tuple[float | None, ...] | None = None
    """Value of each prompt (None if it was not measured); None for metrics of all pictures together."""

    @property
    def values(self) -> np.ndarray:
        """`by_prompt` as an array (P,), with NaN for None."""
        return np.array([np.nan if value is None else value for value in self.by_prompt or ()], float)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Retrieval statistics of one way."""

    hit_rate: float
    """Share of pictures with a reference whose caption is the prompt."""
    similarity: float
    """Mean cosine similarity of prompts and captions of references."""
    gated: float
    """Share of references with weight 0, under the similarity gate."""


@dataclass(frozen=True, kw_only=True)
class WayResults:
    """All results of one way."""

    name: str
    title: str
    function_evaluations: int
    """Denoising steps per picture (NFE). As in the paper, guidance does not count twice."""
    num_pictures: int
    scores: Mapping[MetricName, Score]
    latency: Latency | None = None
    retrieval: Retrieval | None = None
    copies: Copies | None = None

    @property
    def disputed(self) -> np.ndarray:
        """Whether the two judges disagree on each prompt (P,); False where one of them did not measure it."""
        first, second = (self.scores[name].values for name in JUDGES)
        return np.asarray((first != second) & ~np.isnan(first) & ~np.isnan(second))


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Recognition and copies for one value of slerp's w or the adapter's scale."""

    curve: str
    setting: float
    scores: Mapping[MetricName, Estimate]
    """Recognition scores by judge (`JUDGES`)."""
    copies: Copies | None


@dataclass(frozen=True, kw_only=True)
class MetricAbout:
    """Title and direction of a metric."""

    title: str
    larger_is_better: bool


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results of an evaluation."""

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
    """The missing input of each metric that was not measured."""

    def way(self, name: str) -> WayResults | None:
        """Return the results of a way, if it was measured."""
        return next((way for way in self.ways if way.name == name), None)

    @property
    def candidate(self) -> WayResults:
        """Results of the adapter, which every evaluation measures."""
        return next(way for way in self.ways if way.name == "adapter")

    @property
    def best_slerp(self) -> WayResults:
        """Results of slerp with cross-validated w, available whenever the gate's metric was measured."""
        return next(way for way in self.ways if way.name == "best_slerp")

    @property
    def base_model(self) -> WayResults:
        """Results of the base model, which every evaluation measures."""
        return next(way for way in self.ways if way.name == "base")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary for `from_json`."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Results":
        """Restore results from the output of `to_json`."""
        own = dict(values)
        own["metrics"] = {name: MetricAbout(**each) for name, each in own["metrics"].items()}
        own["leakage"] = Leakage(**own["leakage"])
        own["prompts"], own["categories"] = tuple(own["prompts"]), tuple(own["categories"])
        own["ways"] = tuple(map(_way, own["ways"]))
        own["points"] = tuple(map(_point, own["points"]))
        return cls(**own)

    def flat(self) -> dict[str, float]:
        """Return the metrics for MLflow by `way/metric`, such as `adapter/recognised`."""
        flat: dict[str, float] = {}
        for way in self.ways:
            flat |= {f"{way.name}/{metric}": score.estimate.mean for metric, score in way.scores.items()}
            if way.latency is not None:
                flat[f"{way.name}/ms"] = way.latency.total
            if way.copies is not None:
                flat[f"{way.name}/copies"] = way.copies.share
        return flat

    def rows(self) -> Iterator[list[str]]:
        """Yield the rows of the main table, header first."""
        titles = [about.title + (" ↑" if about.larger_is_better else " ↓") for about in self.metrics.values()]
        split = "of which text and other + retrieval + denoising + decoding"
        judged = all(name in self.metrics for name in JUDGES)
        yield ["", "NFE", *titles, *(["judges disagree"] if judged else []), "copies", "ms per image", split]
        for way in self.ways:
            cells = [_cell(way.scores.get(name)) for name in self.metrics]
            cells += [f"{np.mean(way.disputed):.3f}"] if judged else []
            cells += ["" if way.copies is None else f"{way.copies.share:.3f}"]
            yield [way.title, str(way.function_evaluations), *cells, *_milliseconds(way.latency)]

    def point_rows(self) -> Iterator[list[str]]:
        """Yield recognition and copies by setting of slerp and the adapter, header first."""
        judges = [name for name in JUDGES if name in self.metrics]
        yield ["", *(self.metrics[name].title for name in judges), "similarity to the nearest reference", "copies"]
        for point in self.points:
            cells = [str(point.scores[name]) for name in judges]
            copies = point.copies
            cells += ["", ""] if copies is None else [f"{copies.similarity:.3f}", f"{copies.share:.3f}"]
            yield [f"{point.curve}, {_SETTING[point.curve]} {point.setting}", *cells]

    def slices(self) -> Iterator[list[str]]:
        """Yield the means of base model and adapter by category of prompts, header first."""
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
        """Yield the retrieval statistics of each way, header first."""
        yield ["", "hit rate (a reference's caption is the prompt)", "similarity", "share under the gate"]
        for way in self.ways:
            if (did := way.retrieval) is not None:
                yield [way.title, f"{did.hit_rate:.3f}", f"{did.similarity:.3f}", f"{did.gated:.3f}"]

    def notes(self) -> list[str]:
        """Return the notes below the tables: missing metrics, leakage, and how copies and latencies are measured."""
        seen = self.leakage
        return [
            *(
                ["Not measured: " + "; ".join(f"{name} ({why})" for name, why in self.not_measured.items()) + "."]
                if self.not_measured
                else []
            ),
            f"Of {len(self.prompts)} prompts, {seen.num_prompts_in_index} are captions in the index, and "
            f"{seen.num_prompts_learnt} are in the training set. Of their {seen.num_images} pictures in the index, "
            f"{seen.num_images_learnt} are in the training set under another caption, and {seen.num_near_duplicates} "
            "have a near duplicate in it.",
            "Recognition ignores the references of all ways, so that copying one is not rewarded. Copies: share of "
            "pictures that are more similar to their nearest reference than 999 of 1,000 pairs of different real "
            f"pictures are to each other. Latencies are medians over single pictures, on {self.machine}.",
        ]

    def markdown(self) -> str:
        """Return all tables and notes as Markdown."""
        by_category = ([in_markdown(category), *figures] for category, *figures in self.slices())
        parts = (self.rows(), self.point_rows(), self.retrieval_rows(), by_category)
        tables = [table for rows in parts if (table := _table(rows))]
        return "\n".join("\n".join(part) + "\n" for part in (*tables, *([note] for note in self.notes())))


def read_results(folder: str) -> Results:
    """Read the results of an evaluation from its folder (`Evaluated.uri`)."""
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
