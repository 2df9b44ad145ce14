"""The gate: decides whether a candidate becomes champion, with reasons."""

from dataclasses import dataclass

import numpy as np

from imagerag.evaluation.config import GateConfig, MetricName
from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.evaluation.results import Results, WayResults
from imagerag.plain import in_markdown


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One rule and its outcome."""

    rule: str
    passed: bool
    seen: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The gate's decision with its reasons."""

    passed: bool
    reasons: tuple[Reason, ...]

    def markdown(self) -> str:
        """Return the decision as Markdown."""
        outcome = "**The candidate passes.**" if self.passed else "**The candidate does not pass.**"
        lines = [outcome, "", "| rule | | seen |", "|---|---|---|"]
        for each in self.reasons:  # which quote people
            result = "pass" if each.passed else "**fail**"
            lines.append(f"| {in_markdown(each.rule)} | {result} | {in_markdown(each.seen)} |")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the failed rules in one line, or all rules if none failed."""
        failed = [each for each in self.reasons if not each.passed]
        return "; ".join(f"{each.rule}: {each.seen}" for each in failed or self.reasons)


def decide(
    results: Results,
    config: GateConfig,
    *,
    has_champion: bool,
    is_index_update: bool = False,
    rolled_back: str = "",
) -> Decision:
    """Compare the candidate with the untrained baselines and with the champion, if there is one.

    New weights must beat the base model and the champion on its own index, and must be no worse than slerp, which needs
    no training. The champion's own weights on a newer index must only be no worse than on their pinned index. If the
    prompts are too few for the gate's metric, the candidate fails, and only a person can promote it.

    Args:
        results: results of the evaluation.
        config: thresholds of the gate.
        has_champion: whether there is a champion; the candidate fails if the evaluation did not compare the two.
        is_index_update: whether the candidate has the champion's weights.
        rolled_back: who rolled these weights back, and why; empty if nobody did.
    """
    candidate, base, champion = results.candidate, results.base_model, results.way("champion")
    reasons = []
    if unmeasured := _why_not_measured(results, config):
        seen = f"it {unmeasured}; promote by hand, or name another metric"
        reasons.append(Reason(rule=f"{config.metric} is measured", passed=False, seen=seen))
    elif is_index_update and champion is not None:
        rule = f"the new index no worse than that of the {champion.title}"
        reasons.append(_no_worse(results, config, candidate, champion, rule))
    else:
        reasons.append(_beats(results, config, candidate, base))
        slerp = results.best_slerp
        reasons.append(_no_worse(results, config, candidate, slerp, f"no worse than the {slerp.title}"))
        if champion is not None:
            reasons.append(_beats(results, config, candidate, champion))
        elif has_champion:
            reasons.append(Reason(rule="better than the champion", passed=False, seen="the evaluation has no champion"))
    for name in results.metrics:
        if name != config.metric:
            reasons.append(_loses_little(results, name, candidate, base, config.max_loss))
    reasons.append(_is_fast(candidate, config.max_slowdown))
    reasons.append(
        Reason(
            rule="no prompt is in the training set",
            passed=results.leakage.num_prompts_learnt == 0,
            seen=f"{results.leakage.num_prompts_learnt} are",
        )
    )
    if rolled_back:
        reasons.append(Reason(rule="rolled-back weights need a manual promotion", passed=False, seen=rolled_back))
    return Decision(passed=all(each.passed for each in reasons), reasons=tuple(reasons))


def _why_not_measured(results: Results, config: GateConfig) -> str:
    """Return why too few paired differences in the gate's metric are known; empty if there are enough."""
    metric = config.metric
    if metric not in results.metrics:
        return results.not_measured.get(metric, "is not among the metrics")
    compared = [results.candidate, results.base_model, results.best_slerp, results.way("champion")]
    values = np.array([way.scores[metric].values for way in compared if way is not None])
    num_known = int((~np.isnan(values)).all(axis=0).sum())
    if num_known >= config.min_prompts:
        return ""
    return f"needs {config.min_prompts} prompts for which it was measured (gate.min_prompts); there are {num_known}"


def _beats(results: Results, config: GateConfig, candidate: WayResults, other: WayResults) -> Reason:
    gain = _gain(results, config, candidate, other)
    return Reason(
        rule=f"{results.metrics[config.metric].title}: better than the {other.title}",
        passed=gain.low > 0,
        seen=f"paired gain {gain} over {gain.num} prompts; the interval must lie above 0",
    )


def _no_worse(results: Results, config: GateConfig, candidate: WayResults, other: WayResults, rule: str) -> Reason:
    gain = _gain(results, config, candidate, other)
    return Reason(
        rule=f"{results.metrics[config.metric].title}: {rule}",
        passed=gain.high >= 0,
        seen=f"paired gain {gain} over {gain.num} prompts; the interval must not lie below 0",
    )


def _gain(results: Results, config: GateConfig, candidate: WayResults, other: WayResults) -> Estimate:
    """Return the mean paired difference over prompts; positive if the candidate is better."""
    about = results.metrics[config.metric]
    own, others = (way.scores[config.metric].values for way in (candidate, other))
    gains = (own - others) * (1 if about.larger_is_better else -1)
    return estimate(gains[~np.isnan(gains)])


def _loses_little(
    results: Results, metric: MetricName, candidate: WayResults, base: WayResults, max_loss: float
) -> Reason:
    about = results.metrics[metric]
    own, others = (way.scores[metric].estimate.mean for way in (candidate, base))
    loss = (others - own) * (1 if about.larger_is_better else -1)
    allowed = max_loss * abs(others)
    return Reason(
        rule=f"{about.title}: at most {max_loss:.0%} worse than the base",
        passed=loss <= allowed,
        seen=f"{own:.3f} after {others:.3f}",
    )


def _is_fast(candidate: WayResults, most: float) -> Reason:
    assert candidate.latency is not None, candidate
    slowdown = candidate.latency.slowdown
    return Reason(
        rule=f"latency: at most {most} times the base's",
        passed=slowdown <= most,
        seen=f"{slowdown:.2f} times, the median over pairs of pictures",
    )
