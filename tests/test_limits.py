"""Numbers out of their bounds: one sentence, before anything is loaded."""

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from imagerag.cli import app
from imagerag.errors import UserError
from imagerag.evaluation.config import EvaluateConfig
from imagerag.limits import MAX_SEED
from imagerag.training.config import FinetuneConfig, SynthesizeConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--seed", str(2**64)], "seeds are 0 to 9223372036854775807; got 18446744073709551616 "),
        (["generate", "--seed", str(MAX_SEED)], "got 9223372036854775807 and 8 images"),
        (["generate", "--guidance", "inf"], "the guidance scale must be between 0 and 100; got inf"),
        (["compare", "--name", "x", "--seed", str(2**64)], "seeds are 0 to 9223372036854775807; got 1844674407"),
    ],
)
def test_a_command_says_so_before_anything_is_loaded(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagerag.base.files.resolve", lambda _: pytest.fail("nothing may be loaded"))
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, [*arguments, "a fox"], catch_exceptions=False)


@pytest.mark.parametrize("config", [EvaluateConfig, FinetuneConfig, SynthesizeConfig])
def test_flows_take_the_same_seeds(config: type) -> None:
    assert config(seed=MAX_SEED).seed == MAX_SEED
    with pytest.raises(ValidationError, match="less than or equal to 9223372036854775807"):
        config(seed=MAX_SEED + 1)
