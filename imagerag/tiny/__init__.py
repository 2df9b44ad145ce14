"""The embedded base model: a small one-step student and its multi-step teacher, trained from the sample corpus.

`train.py` is the recipe that made the shipped weights. Nothing outside this package knows how they were trained.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
"""`vae`, `unet`, `teacher` and `scheduler` in diffusers' format; the text encoder is another package's."""
MANIFEST_NAME = "manifest.json"
TEXT_LENGTH = 32
"""Tokens that the UNets are conditioned on."""
SLERP_W = 0.2
"""The student's default weight in slerp, from what `imagerag.tiny.adapters` measures: its decoder reads pictures out of
`h`, and with the paper's 0.8 draws next to nothing of a reference."""
