"""TIFA: faithfulness of a picture to its prompt by visual question answering (arXiv 2303.11897)."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imagerag.embedding.encoder import to_rgb
from imagerag.errors import UserError
from imagerag.evaluation.config import MetricName
from imagerag.evaluation.metrics import NotMeasuredError, Pictures, Value
from imagerag.evaluation.recognition import Floats
from imagerag.evaluation.weights import transformers_folder

if TYPE_CHECKING:
    from PIL import Image

_FIELDS = ("caption", "question", "choices", "answer")


class Tifa:
    """Share of a prompt's questions that a visual question answering model answers correctly."""

    name: MetricName = "tifa"
    title = "TIFA"
    larger_is_better = True

    def __init__(self, questions: str, prompts: Sequence[str]) -> None:
        """Make sure that there are questions about the prompts.

        Args:
            questions: see `AnswerNetwork`.
            prompts: the evaluation's prompts.

        Raises:
            UserError: if the file is invalid.
            NotMeasuredError: if there are no questions about any prompt.
        """
        if not set(_read(questions)) & set(prompts):
            raise NotMeasuredError(f"none of the prompts is a caption in files.tifa_questions, {questions}")

    def measure(self, pictures: Pictures) -> Value:
        """Return the share of correct answers for each picture (N,); NaN without questions about its prompt."""
        return pictures.made.features("tifa")[:, 0]


class AnswerNetwork:
    """A visual question answering model that is asked the questions about a picture's prompt."""

    def __init__(self, questions: str, model: str, device: str = "cpu") -> None:
        """Read the questions and load the model.

        Args:
            questions: a file in TIFA's published format: a list of objects with caption, question, choices and answer.
            model: transformers folder of a model that classifies answers (ViLT).
            device: device of the model.

        Raises:
            UserError: if a file is invalid.
        """
        from transformers import ViltForQuestionAnswering, ViltProcessor

        self._questions = _read(questions)
        folder = transformers_folder("tifa_vqa", model)
        self._processor = ViltProcessor.from_pretrained(folder, local_files_only=True)
        network = ViltForQuestionAnswering.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        self._model = network.eval().to(device)
        self._answers = {label.lower(): number for number, label in self._model.config.id2label.items()}

    def __call__(self, pictures: Sequence["Image.Image"], prompts: Sequence[str]) -> Floats:
        """Return the share of correct answers for each picture (N, 1); NaN without questions about its prompt."""
        shares = [
            np.mean([self._is_right(to_rgb(picture), each) for each in self._questions[prompt]])
            if prompt in self._questions
            else np.nan
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return np.array(shares, np.float32)[:, None]

    def _is_right(self, picture: "Image.Image", question: dict[str, Any]) -> bool:
        """Return whether the model prefers the right choice, among the choices in its vocabulary."""
        import torch

        known = [choice for choice in question["choices"] if choice.lower() in self._answers]
        if not known:
            return False
        with torch.inference_mode():
            inputs = self._processor(picture, question["question"], return_tensors="pt", truncation=True)
            logits = self._model(**inputs.to(self._model.device)).logits[0]
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
