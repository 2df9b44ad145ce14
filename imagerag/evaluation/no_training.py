"""The best baseline without training: slerp with w chosen by two-fold cross-validation (paper, Sec. 3.2).

Each half of the prompts uses the w that is best on the other half. So all prompts are used, and no prompt influences
its own w, which would bias the baseline upwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from imagerag.evaluation.made import ChosenMade, Made
from imagerag.evaluation.recognition import Floats, Ints


def choose_ws(scores: Mapping[float, Floats], *, larger_is_better: bool) -> list[float]:
    """Return the w of each prompt (P,) by two-fold cross-validation.

    Args:
        scores: score of each prompt (P,) by w; NaN where nothing was measured.
        larger_is_better: whether larger scores are better.
    """
    ws, values = list(scores), np.stack(list(scores.values())) * (1 if larger_is_better else -1)
    halves = np.arange(values.shape[1]) % 2  # prompts are shuffled
    best = [ws[int(np.argmax([_mean(own[halves != half]) for own in values]))] for half in (0, 1)]
    return [best[half] for half in halves]


def with_chosen_ws(made: Mapping[float, Made], ws: Sequence[float], numbers: Ints) -> ChosenMade:
    """Return slerp's pictures with the chosen w of each prompt.

    Args:
        made: slerp's pictures by w.
        ws: w of each prompt (P,).
        numbers: prompt number of each picture (N,).
    """
    distinct = list(dict.fromkeys(ws))
    named = " and ".join(map(str, distinct))
    way = replace(made[ws[0]].way, name="best_slerp", title=f"slerp, w best on other prompts ({named})", is_column=True)
    return ChosenMade(way, [made[w] for w in distinct], [distinct.index(ws[number]) for number in numbers])


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else -np.inf
