from pathlib import Path

import pytest

from tests.generation.folders import write_lcm, write_sd, write_sdxl


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in each format."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd-turbo": write_sd(folder / "sd-turbo"),
        "sd-2-teacher": write_sd(folder / "sd-2-teacher", seed=1, prediction_type="v_prediction"),
        "fp16-only": write_sd(folder / "fp16-only", variant="fp16"),
        "sharded": write_sd(folder / "sharded", max_shard_size="200KB"),
        "sdxl-turbo": write_sdxl(folder / "sdxl-turbo"),
        "lcm": write_lcm(folder / "lcm"),
    }
