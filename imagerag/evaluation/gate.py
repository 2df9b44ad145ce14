"""The gate: whether a candidate may become champion, and why."""

from dataclasses import dataclass

import numpy as np

from imagerag.errors import UserError
from imagerag.evaluation.config import GateConfig, MetricName
from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.evaluation.results import Results, WayResults


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One rule, and what was seen."""

    rule: str
    passed: bool
    seen: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gate says, and why."""

    passed: bool
    reasons: tuple[Reason, ...]

    def markdown(self) -> str:
        """Return the decision as a page."""
        outcome = "**The candidate passes.**" if self.passed else "**The candidate does not pass.**"
        lines = [outcome, "", "| rule | | seen |", "|---|---|---|"]
        return "\n".join(
            lines
            + [f"| {each.rule} | {'pass' if each.passed else '**fail**'} | {each.seen} |" for each in self.reasons]
        )

    def summary(self) -> str:
        """Return it in one line."""
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
    """Compare the candidate with what needs no training, and with the model in use, if there is one.

    New weights have to be better than the base model and than the champion with its own index, and must not lose to
    slerp, which needs no training. The champion's own weights on a newer index are asked only whether the new index
    does them no harm: they are in use.

    Args:
        results: of the evaluation.
        config: what has to be reached.
        has_champion: whether there is a champion, with which the candidate has to be compared.
        is_index_update: whether the candidate has the champion's weights.
        rolled_back: who rolled the candidate's weights back and why, if somebody did.

    Raises:
        UserError: if the gate's metric was not measured, or of fewer than two prompts.
    """
    candidate, base, champion = results.candidate, results.base_model, results.way("champion")
    if config.metric not in results.metrics:
        reason = results.not_measured.get(config.metric, "is not among the metrics")
        raise UserError(f"the gate's metric {config.metric} was not measured: it {reason}")
    reasons = []
    if is_index_update and champion is not None:
        rule = f"the new index no worse than that of the {champion.title}"
        reasons.append(_no_worse(results, config, candidate, champion, rule))
    else:
        reasons.append(_beats(results, config, candidate, base))
        slerp = results.best_slerp
        reasons.append(_no_worse(results, config, candidate, slerp, f"no worse than the {slerp.title}"))
        if champion is not None:
            reasons.append(_beats(results, config, candidate, champion))
        elif has_champion:
            reasons.append(Reason(rule="better than the champion", passed=False, seen="the two were not compared"))
    for name in results.metrics:
        if name != config.metric:
            reasons.append(_loses_little(results, name, candidate, base, config.max_loss))
    reasons.append(_is_fast(candidate, config.max_slowdown))
    reasons.append(
        Reason(
            rule="no prompt was learnt from",
            passed=results.leakage.num_prompts_learnt == 0,
            seen=f"{results.leakage.num_prompts_learnt} were",
        )
    )
    if rolled_back:
        reasons.append(Reason(rule="what a person rolled back, only a person promotes", passed=False, seen=rolled_back))
    return Decision(passed=all(each.passed for each in reasons), reasons=tuple(reasons))


def _beats(results: Results, config: GateConfig, candidate: WayResults, other: WayResults) -> Reason:
    gain = _gain(results, config, candidate, other)
    return Reason(
        rule=f"{results.metrics[config.metric].title}: better than the {other.title}",
        passed=gain.low > 0,
        seen=f"paired gain {gain} over {gain.num} prompts; the interval has to lie above 0",
    )


def _no_worse(results: Results, config: GateConfig, candidate: WayResults, other: WayResults, rule: str) -> Reason:
    gain = _gain(results, config, candidate, other)
    return Reason(
        rule=f"{results.metrics[config.metric].title}: {rule}",
        passed=gain.high >= 0,
        seen=f"paired gain {gain} over {gain.num} prompts; the interval must not lie below 0",
    )


def _gain(results: Results, config: GateConfig, candidate: WayResults, other: WayResults) -> Estimate:
    """Return by how much the candidate is better, prompt by prompt."""
    about = results.metrics[config.metric]
    own, others = (way.scores[config.metric].values for way in (candidate, other))
    gains = (own - others) * (1 if about.larger_is_better else -1)
    known = gains[~np.isnan(gains)]
    if len(known) < 2:
        raise UserError(f"the gate needs two prompts of which {config.metric} was measured; there are {len(known)}")
    return estimate(known)


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
        seen=f"{slowdown:.2f} times, the median of pairs that were made in turn",
    )
