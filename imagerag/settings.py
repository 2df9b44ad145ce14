"""Where things live and which engines to use, read once from the environment."""

import re
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from imagerag.errors import UserError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class Settings(BaseSettings):
    """Every value can be set as `IMAGERAG_<NAME>` in the environment or in `.env`."""

    model_config = SettingsConfigDict(env_prefix="IMAGERAG_", env_file=".env", extra="ignore", frozen=True)

    home: Path = Path(".imagerag")
    """The folder that holds all state of the embedded engines. Two homes never share anything, ports included."""
    shards_uri: str = Field(default_factory=lambda data: str(data["home"] / "shards"))
    """Where downloaded shards are kept: a folder or any fsspec URI (`s3://bucket/shards`)."""
    index_uri: str = Field(default_factory=lambda data: str(data["home"] / "index"))
    """The LanceDB database: a folder or an object-store URI."""
    training_uri: str = Field(default_factory=lambda data: str(data["home"] / "training"))
    """Where training sets, checkpoints and trained adapters are kept: a folder or an object-store URI."""
    ray_address: str | None = None
    """A running Ray cluster (`auto`, `host:port`, `ray://host:port`); unset starts Ray on this machine for the run."""
    mlflow_tracking_uri: str | None = None
    """An MLflow server; unset keeps everything in a database under the home."""
    prefect_api_url: str | None = None
    """A Prefect server; unset uses the one that `imagerag up` started, else one for the duration of the run."""

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    def training_of(self, name: str) -> str:
        """The folder of what trainings on the corpus `name` need and make."""
        return f"{self.training_uri.rstrip('/')}/{check_name(name)}"

    def shards_of(self, name: str) -> str:
        """The shards folder of the corpus `name`."""
        return f"{self.shards_uri.rstrip('/')}/{check_name(name)}"


def check_name(name: str) -> str:
    """Return `name` if it can name a corpus, a folder and a table alike.

    Raises:
        UserError: if it can't.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            "a corpus name has 1 to 63 characters of a-z, 0-9, '-' and '_' and starts with a letter or digit; "
            f"got {name!r}"
        )
    return name
