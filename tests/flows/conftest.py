"""What flows are tried on."""

from tests.evaluation.conftest import finetuned
from tests.training.conftest import own_world, world_folder

__all__ = ["finetuned", "own_world", "world_folder"]
