"""TIFA: faithfulness of a picture to its prompt by visual question answering (arXiv 2303.11897)."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagerag.errors import UserError
from imagerag.evaluation.config import MetricName
from imagerag.evaluation.metrics import NotMeasuredError, Pictures, Value
from imagerag.evaluation.weights import transformers_folder

_FIELDS = ("caption", "question", "choices", "answer")


class Tifa:
    """Share of a prompt's questions that a visual question answering model answers correctly."""

    name: MetricName = "tifa"
    title = "TIFA"
    larger_is_better = True

    def __init__(self, questions: str, model: str, prompts: Sequence[str]) -> None:
        """Read the questions and load the model.

        Args:
            questions: a file in TIFA's published format: a list of objects with caption, question, choices and answer.
            model: transformers folder of a model that classifies answers (ViLT).
            prompts: the evaluation's prompts.

        Raises:
            UserError: if a file is invalid.
            NotMeasuredError: if there are no questions about any prompt.
        """
        self._questions = _read(questions)
        if not set(self._questions) & set(prompts):
            raise NotMeasuredError(f"none of the prompts is a caption in files.tifa_questions, {questions}")
        from transformers import ViltForQuestionAnswering, ViltProcessor

        folder = transformers_folder("tifa_vqa", model)
        self._processor = ViltProcessor.from_pretrained(folder, local_files_only=True)
        self._model = ViltForQuestionAnswering.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        self._model.eval()
        self._answers = {label.lower(): number for number, label in self._model.config.id2label.items()}

    def measure(self, pictures: Pictures) -> Value:
        """Return the share of correct answers for each picture (N,); NaN without questions about its prompt."""
        return np.array(
            [
                np.mean([self._is_right(image, each) for each in self._questions[prompt]])
                if prompt in self._questions
                else np.nan
                for image, prompt in zip(pictures.made.images, pictures.prompts, strict=True)
            ]
        )

    def _is_right(self, image: Any, question: dict[str, Any]) -> bool:
        """Return whether the model prefers the right choice, among the choices in its vocabulary."""
        import torch

        known = [choice for choice in question["choices"] if choice.lower() in self._answers]
        if not known:
            return False
        with torch.inference_mode():
            inputs = self._processor(image, question["question"], return_tensors="pt", truncation=True)
            logits = self._model(**inputs).logits[0]
        best = max(known, key=lambda choice: float(logits[self._answers[choice.lower()]]))
        return bool(best.lower() == question["answer"].lower())


def _read(path: str) -> dict[str, list[dict[str, Any]]]:
    try:
        listed = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"files.tifa_questions must be a readable JSON file; {path}: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(each, dict) and set(_FIELDS) <= set(each) for each in listed):
        raise UserError(f"files.tifa_questions must be a list of objects with {', '.join(_FIELDS)}; {path} is not")
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in listed:
        questions[each["caption"].strip()].append(each)
    return dict(questions)
