"""The gate's rules, and the table that people read."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from imagerag.errors import UserError
from imagerag.evaluation.config import EvaluateConfig, GateConfig
from imagerag.evaluation.gate import decide
from imagerag.evaluation.intervals import estimate
from imagerag.evaluation.results import (
    JUDGES,
    Copies,
    CurvePoint,
    Latency,
    Leakage,
    MetricAbout,
    Results,
    Retrieval,
    Score,
    WayResults,
)
from imagerag.plain import in_markdown

NUM = 80


def way(name: str, values: np.ndarray, *, slowdown: float = 1.5, distance: float = 5.0) -> WayResults:
    return WayResults(
        name=name,
        title=name,
        function_evaluations=1,
        num_pictures=NUM,
        scores={
            "clip_score": Score(estimate=estimate(values), by_prompt=tuple(values.tolist())),
            "frechet": Score(estimate=estimate([distance, distance])),
        },
        latency=Latency(text=1.0, retrieval=2.0, denoising=3.0, decoding=4.0, total=100.0, slowdown=slowdown),
        retrieval=Retrieval(hit_rate=0.5, similarity=0.6, gated=0.1),
        copies=Copies(similarity=0.4, threshold=0.8, share=0.5, by_picture=(None, 0.4, 0.9)),
    )


def slerp_of(base: WayResults) -> WayResults:
    """Slerp that is worth what the base model is."""
    return replace(base, name="best_slerp", title="slerp, w best on other prompts (0.2)")


def results(base: WayResults, *others: WayResults, slerp: WayResults | None = None, **changes: Any) -> Results:
    ways = (base, slerp or slerp_of(base), *others)
    leakage = Leakage(
        num_prompts_in_index=NUM, num_prompts_learnt=0, num_images=90, num_images_learnt=0, num_near_duplicates=3
    )
    values: dict[str, Any] = {
        "base": "tiny", "adapter": "a", "index": "i, version 3", "machine": "m", "ways": ways, "leakage": leakage,
        "prompts": tuple(f"p{number}" for number in range(NUM)),
        "categories": tuple("even" if number % 2 == 0 else "odd" for number in range(NUM)),
        "metrics": {"clip_score": MetricAbout(title="CLIP score", larger_is_better=True),
                    "frechet": MetricAbout(title="distance", larger_is_better=False)},
        "not_measured": {"tifa": "needs files.tifa_questions"},
    }  # fmt: skip
    return Results(**values | changes)


NOISE = np.random.default_rng(0).normal(0.3, 0.1, NUM)
BETTER = NOISE + 0.02 + np.random.default_rng(1).normal(0, 0.02, NUM)
"""By less than prompts differ among each other, but for nearly every prompt: only pairs tell."""
CONFIG = GateConfig(metric="clip_score", min_prompts=2)


def failed(found: Results, *, has_champion: bool = False, **facts: Any) -> list[str]:
    decision = decide(found, CONFIG, has_champion=has_champion, **facts)
    return [each.rule for each in decision.reasons if not each.passed]


def test_better_on_the_same_prompts_passes_though_the_intervals_overlap() -> None:
    base, candidate = way("base", NOISE), way("adapter", BETTER)
    assert base.scores["clip_score"].estimate.high > candidate.scores["clip_score"].estimate.low
    decision = decide(results(base, candidate), CONFIG, has_champion=False)
    assert decision.passed
    assert "**The candidate passes.**" in decision.markdown()


def test_what_people_wrote_is_no_markdown_in_a_decision() -> None:
    said = "me: ![x](https://evil.example/beacon.png) | <b>"
    decision = decide(results(way("base", NOISE), way("adapter", BETTER)), CONFIG, has_champion=True, rolled_back=said)
    lines = [line for line in decision.markdown().splitlines() if "evil" in line]
    assert lines == [f"| rolled\\-back weights need a manual promotion | **fail** | {in_markdown(said)} |"]
    assert said in decision.summary(), "which is a tag"


def test_no_better_than_chance_does_not_pass() -> None:
    same = NOISE + np.random.default_rng(2).normal(0, 0.02, NUM)
    assert failed(results(way("base", NOISE), way("adapter", same))) == ["CLIP score: better than the base"]


def test_what_loses_to_what_needs_no_training_does_not_pass() -> None:
    base, candidate = way("base", NOISE), way("adapter", BETTER)
    equal = BETTER + np.random.default_rng(4).normal(0, 0.02, NUM)
    assert failed(results(base, candidate, slerp=replace(slerp_of(base), scores=way("", equal).scores))) == []
    slerp = replace(slerp_of(base), scores=way("", BETTER + 0.01).scores)
    (rule,) = failed(results(base, candidate, slerp=slerp))
    assert rule == "CLIP score: no worse than the slerp, w best on other prompts (0.2)"


def test_the_champion_has_to_be_beaten_too() -> None:
    base, candidate = way("base", NOISE), way("adapter", BETTER)
    assert failed(results(base, candidate, way("champion", BETTER + 0.01)), has_champion=True) == [
        "CLIP score: better than the champion"
    ]
    assert failed(results(base, candidate, way("champion", BETTER - 0.01 * NOISE)), has_champion=True) == []
    assert failed(results(base, candidate), has_champion=True) == ["better than the champion"], "it was not compared"


def test_the_weights_in_use_are_asked_only_whether_a_new_index_does_them_no_harm() -> None:
    base, slerp = way("base", NOISE), replace(slerp_of(way("base", NOISE)), scores=way("", BETTER + 0.01).scores)
    same = BETTER + np.random.default_rng(3).normal(0, 0.02, NUM)
    champion = replace(way("champion", BETTER), title="champion, with its index's version 3")
    facts = {"has_champion": True, "is_index_update": True}
    found = results(base, way("adapter", same), champion, slerp=slerp)
    assert failed(found, **facts) == []
    (answer,) = [each for each in decide(found, CONFIG, **facts).reasons if "the new index" in each.rule]
    assert "paired gain" in answer.seen
    worse = results(base, way("adapter", BETTER - 0.01), champion, slerp=slerp)
    assert failed(worse, **facts) == [
        "CLIP score: the new index no worse than that of the champion, with its index's version 3"
    ]


def test_what_a_person_rolled_back_does_not_pass() -> None:
    found = results(way("base", NOISE), way("adapter", BETTER))
    assert failed(found, rolled_back="ada rolled back version 2: too dark") == [
        "rolled-back weights need a manual promotion"
    ]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"distance": 5.6}, "distance: at most 10% worse than the base"),
        ({"slowdown": 2.1}, "latency: at most 2.0 times the base's"),
    ],
)
def test_losing_too_much_elsewhere_does_not_pass(changes: dict[str, float], rule: str) -> None:
    assert failed(results(way("base", NOISE), way("adapter", BETTER, **changes))) == [rule]


def test_prompts_that_were_learnt_from_do_not_pass() -> None:
    found = results(way("base", NOISE), way("adapter", BETTER))
    leaked = replace(found, leakage=replace(found.leakage, num_prompts_learnt=1))
    assert failed(leaked) == ["no prompt is in the training set"]


def test_a_candidate_does_not_pass_where_the_metric_was_not_measured() -> None:
    """A corpus may be too small for any: its model is registered all the same, and a person can promote it."""
    found = results(way("base", NOISE), way("adapter", BETTER))
    decision = decide(found, GateConfig(metric="tifa", min_prompts=2), has_champion=False)
    assert not decision.passed
    assert decision.summary() == (
        "tifa is measured: it needs files.tifa_questions; promote by hand, or name another metric"
    )
    unknown = Score(estimate=estimate(NOISE), by_prompt=(None,) * NUM)
    base = replace(found.base_model, scores=dict(found.base_model.scores) | {"clip_score": unknown})
    decision = decide(results(base, found.candidate), CONFIG, has_champion=False)
    assert not decision.passed
    assert "needs 2 prompts for which it was measured (gate.min_prompts); there are 0" in decision.summary()


def test_a_metric_that_can_never_be_measured_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"Input should be 'recognised', .* or 'tifa'"):
        GateConfig(metric="frechet")
    with pytest.raises(UserError, match=r"decides by tifa, .*: it needs files\.tifa_questions and files\.tifa_vqa"):
        GateConfig(metric="tifa").check(EvaluateConfig())
    with pytest.raises(ValidationError, match="all three have to be among the ways"):
        EvaluateConfig(ways=("base", "adapter"))


def test_results_survive_json_and_say_what_was_not_measured() -> None:
    values = NOISE.copy()
    by_prompt = (None, *values[1:].tolist())
    found = results(way("base", NOISE), way("adapter", BETTER))
    scores = dict(found.ways[0].scores) | {"clip_score": Score(estimate=estimate(values[1:]), by_prompt=by_prompt)}
    copies = found.candidate.copies
    assert copies is not None
    assert [copies.label(picture) for picture in range(3)] == ["", "", "copy: similarity 0.90"]
    points = (
        CurvePoint(curve="slerp", setting=0.2, scores={"recognised": estimate(NOISE)}, copies=copies),
        CurvePoint(curve="adapter", setting=2.0, scores={}, copies=None),
    )
    found = replace(found, ways=(replace(found.ways[0], scores=scores), *found.ways[1:]), points=points)
    assert Results.from_json(found.to_json()) == found
    text = found.markdown()
    assert "Not measured: tifa (needs files.tifa_questions)." in text
    assert "| base | 1 | 0.3" in text
    assert "| odd | 40 |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == lines[0].count("|") for line in lines[:5])
    assert "| slerp, w = 0.2 | 0.400 | 0.500 |" in text
    hostile = replace(found, categories=("<b>![x](https://evil.example)", *found.categories[1:]))
    assert r"| \<b\>\!\[x\]\(https\:\/\/evil\.example\) | 1 |" in hostile.markdown()
    assert list(replace(found, categories=("",) * NUM).slices()) == [], "they are no slices of one category"


def test_a_run_has_the_metrics_of_every_way() -> None:
    base, candidate = way("base", NOISE), way("adapter", BETTER)
    flat = results(replace(base, latency=None, copies=None), candidate).flat()
    assert {name: value for name, value in flat.items() if not name.startswith("best_slerp")} == {
        "base/clip_score": NOISE.mean(),
        "base/frechet": 5.0,
        "adapter/clip_score": BETTER.mean(),
        "adapter/frechet": 5.0,
        "adapter/ms": 100.0,
        "adapter/copies": 0.5,
    }


def test_the_table_says_how_often_the_judges_disagree() -> None:
    about = {name: MetricAbout(title=name, larger_is_better=True) for name in JUDGES}
    verdicts = (np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0, np.nan]))
    scores = {
        name: Score(estimate=estimate(own[:3]), by_prompt=tuple(None if np.isnan(v) else v for v in own.tolist()))
        for name, own in zip(JUDGES, verdicts, strict=True)
    }
    own = replace(way("base", NOISE), scores=scores)
    assert own.disputed.tolist() == [False, True, True, False]
    unmeasured = {"kernel": MetricAbout(title="kernel", larger_is_better=False)}
    found = results(own, slerp=replace(slerp_of(own), copies=None, latency=None), metrics=about | unmeasured)
    head, *rows = found.rows()
    whole, less = (dict(zip(head, row, strict=True)) for row in rows)
    assert (whole["judges disagree"], whole["kernel ↓"]) == ("0.500", "not measured")
    assert (whole["copies"], whole["ms per image"], rows[0][-1]) == ("0.500", "100", "1.0 + 2.0 + 3.0 + 4.0")
    assert (less["copies"], less["ms per image"], rows[1][-1]) == ("", "", "")
