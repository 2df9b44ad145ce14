"""What flows are tried on."""

from tests.training.conftest import own_world, world_folder

__all__ = ["own_world", "world_folder"]
