"""The embedded base model: a small one-step student and its multi-step teacher, trained from the sample corpus.

`imagerag.recipes.tiny_base` trains it. No other code depends on how its weights were trained.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
"""`vae`, `unet`, `teacher` and `scheduler` in diffusers' format; the text encoder comes with another package."""
MANIFEST_NAME = "manifest.json"
SLERP_W = 0.2
"""Default slerp weight of the student, as measured by `imagerag.recipes.tiny_base.adapters`. With the paper's 0.8,
almost nothing of a reference is visible in the student's pictures."""
