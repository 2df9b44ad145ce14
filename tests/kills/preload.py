"""What the process imports that drivers are forked from: all that takes long, and nothing that starts threads."""

import diffusers  # noqa: F401
import lancedb  # noqa: F401
import mlflow  # noqa: F401
import torch  # noqa: F401

import flows.ingest  # noqa: F401
import imagerag.cli.corpus
import imagerag.evaluation.evaluate
import imagerag.generation.pipeline  # noqa: F401
import tests.kills.stages  # noqa: F401
