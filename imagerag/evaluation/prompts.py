"""The evaluation's prompts: from a file, or the captions held out of the training."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagerag.artifacts import TrainingSet
from imagerag.errors import UserError
from imagerag.evaluation.config import EvaluateConfig
from imagerag.generation.arguments import MAX_PROMPT_CHARACTERS, check_prompts
from imagerag.storage.keyed_table import KeyedTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """Prompts with their categories, which may be empty."""

    texts: tuple[str, ...]
    categories: tuple[str, ...]


def read_prompts(config: EvaluateConfig, training_set: TrainingSet) -> Prompts:
    """Return the prompts of an evaluation in shuffled order; fewer prompts are a prefix of more.

    Raises:
        UserError: if the file can't be read, there are fewer than two prompts, or the pipeline does not accept one.
    """
    listed = _of_file(config.prompts) if config.prompts is not None else _held_out(training_set)
    if len(listed) < 2:
        raise UserError(
            f"an evaluation needs at least two prompts; {config.prompts or 'the held-out part of the training set'} "
            f"has {len(listed)}"
        )
    texts = sorted(listed)
    chosen = np.random.default_rng(config.seed).permutation(len(texts))[: config.num_prompts]
    prompts = [texts[number] for number in chosen]
    check_prompts(prompts)
    return Prompts(tuple(prompts), tuple(listed[prompt] for prompt in prompts))


def _of_file(path: str) -> dict[str, str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts must be a readable text file; {path}: {error}") from error
    pairs = (line.partition("\t") for line in lines if line.strip())
    return {prompt.strip(): category.strip() for prompt, _, category in pairs}


def _held_out(training_set: TrainingSet) -> dict[str, str]:
    examples = KeyedTable.at(training_set.references_uri).dataset()
    rows = examples.to_table(columns=["prompt"], filter="is_held_out")
    prompts = {prompt.strip() for prompt in rows["prompt"].to_pylist()}
    too_long = {prompt for prompt in prompts if len(prompt) > MAX_PROMPT_CHARACTERS}
    if too_long:
        logger.warning(
            "%d of %d held-out captions are skipped: a prompt has at most %d characters",
            len(too_long), len(prompts), MAX_PROMPT_CHARACTERS,
        )  # fmt: skip
    return dict.fromkeys(prompts - too_long, "")
