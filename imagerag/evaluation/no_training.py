"""The best that needs no training: slerp with the w that is the best on other prompts (paper, Sec. 3.2).

The w of a prompt must not be chosen by the prompt's own pictures, or slerp would be flattered. So prompts are halved,
and each half gets the w that is best on the other half: every prompt is judged, and none by a w that it helped choose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from imagerag.evaluation.pictures import Made
from imagerag.evaluation.recognition import Floats, Ints


def choose_ws(scores: Mapping[float, Floats], *, larger_is_better: bool) -> list[float]:
    """Return the w of each prompt.

    Args:
        scores: of each prompt (P,) by w; NaN where nothing was measured.
        larger_is_better: of the scores.
    """
    ws, values = list(scores), np.stack(list(scores.values())) * (1 if larger_is_better else -1)
    halves = np.arange(values.shape[1]) % 2  # prompts come in no order
    best = [ws[int(np.argmax([_mean(own[halves != half]) for own in values]))] for half in (0, 1)]
    return [best[half] for half in halves]


def with_chosen_ws(made: Mapping[float, Made], ws: Sequence[float], numbers: Ints) -> Made:
    """Return the pictures that slerp makes with each prompt's w.

    Args:
        made: all pictures by w.
        ws: of each prompt.
        numbers: of each picture (N,), the number of its prompt.
    """
    chosen = [made[ws[number]] for number in numbers]
    named = " and ".join(str(w) for w in dict.fromkeys(ws))
    way = replace(made[ws[0]].way, name="best_slerp", title=f"slerp, w best on other prompts ({named})", is_column=True)
    return Made(
        way,
        [own.images[place] for place, own in enumerate(chosen)],
        [own.references[place] for place, own in enumerate(chosen)],
    )


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else -np.inf
