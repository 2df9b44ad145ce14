"""Settings: where data is stored and which servers are used, read from the environment and `.env`."""

import json
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, NoDecode, SettingsConfigDict

from imagerag.errors import UserError

PREFIX = "IMAGERAG_"
DEFAULT_NAME = "images"
"""Name of a corpus where none is given."""
DEFAULT_MODEL_NAME = "imagerag-turbo"
"""Name of the registered model where none is given."""
_NOT_SETTINGS = {"IMAGERAG_PROJECT"}  # internal: see `imagerag.services`
_OF_KUBERNETES = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT\w*|PORT(_\d+\w*)?)")  # set by Kubernetes
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_PATTERN = re.compile(r"[*?[]")
_RAY_ADDRESS = re.compile(r"auto|([\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")


def _storage(uri: str) -> str:
    """Return a folder as an absolute path and an S3 URI unchanged, both without a trailing slash."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return str(_folder(Path(uri.removeprefix("file://"))))
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"must be a folder or s3://bucket/folder, got {masked(uri)!r}")
    if "@" in parts.netloc or parts.query:
        raise UserError("must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if find_spec("s3fs") is None:
        raise UserError("is on S3, which needs more packages: pip install 'imagerag-turbo[cluster]'")
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") and "AWS_ALLOW_HTTP" not in os.environ:
        raise UserError("would be accessed unencrypted through AWS_ENDPOINT_URL: use https, or set AWS_ALLOW_HTTP=true")
    return uri.rstrip("/")


def _folder(path: Path) -> Path:
    try:
        path = path.expanduser().absolute()
    except RuntimeError as error:  # neither HOME nor the system's users say where `~` is
        raise UserError(f"can't begin with ~ here, because it is not known whose home that is; got {path}") from error
    if found := _PATTERN.search(str(path)):
        raise UserError(f"must have no {found[0]} in its path, which means any file where files are listed; got {path}")
    return path


def _server(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"must be a server's http:// or https:// URL, got {masked(url)!r}")
    if "@" in parts.netloc:
        raise UserError(
            "must not hold credentials: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow, "
            "PREFECT_API_AUTH_STRING for Prefect"
        )
    return url.rstrip("/")


def _json_object(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"must be a JSON object, got {text!r}")
    return value


StorageUri = Annotated[str, AfterValidator(_storage)]
ServerUrl = Annotated[str, AfterValidator(_server)]


class Settings(BaseSettings):
    """Every value can be set as `IMAGERAG_<NAME>` in the environment or in `.env`.

    No setting is a secret: each engine reads its credentials from its own environment variables, on every machine.

    Raises:
        UserError: if a value is invalid, or an unknown variable looks like a misspelt setting.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    home: Path = Path(".imagerag")
    """Folder with all local state. Two homes share nothing, ports included."""
    shards_uri: StorageUri = Field(default_factory=lambda data: str(data["home"] / "shards"))
    """Folder of the downloaded shards, or `s3://bucket/folder`."""
    index_uri: StorageUri = Field(default_factory=lambda data: str(data["home"] / "index"))
    """Folder of the LanceDB database, or `s3://bucket/folder`."""
    training_uri: StorageUri = Field(default_factory=lambda data: str(data["home"] / "training"))
    """Folder of training sets, checkpoints and trained adapters, or `s3://bucket/folder`."""
    ray_address: str | None = None
    """Address of a running Ray cluster (`host:port`, or `auto`). This machine must have joined it, possibly with zero
    CPUs. Unset: Ray is started on this machine for each run."""
    mlflow_tracking_uri: ServerUrl | None = None
    """URL of an MLflow server. Unset: a database under the home."""
    prefect_api_url: ServerUrl | None = None
    """URL of a Prefect server's API. Unset: the server that `imagerag up` started, else a temporary one for the run."""

    model_name: str = DEFAULT_MODEL_NAME
    """Name of the registered model in MLflow. Corpora with a model each have a champion each."""
    nightly: Annotated[dict[str, Any] | None, NoDecode, BeforeValidator(_json_object)] = None
    """Parameters of the nightly `reindex` run, as JSON: `{"url_list": "s3://...", "name": "catalogue"}`. `imagerag up`
    and `deploy` activate its schedule with them. Unset: the schedule is left as it is set in Prefect's UI."""

    compute_slots: Annotated[int, Field(ge=1)] | None = None
    """Number of trainings, evaluations and features jobs that run at a time; further ones wait. It sets a concurrency
    limit in Prefect. Unset: the limit is left as it is set in Prefect's UI, initially 1."""

    def __init__(self, **values: Any) -> None:
        for name, _, nearest in unknown_variables():
            if nearest is not None:
                raise UserError(f"there is no setting {name}; did you mean {nearest}? `imagerag settings` lists all")
        try:
            super().__init__(**values)
        except ValidationError as error:
            # Raised without its cause, which repeats the value and could reveal a secret.
            faults = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
            raise UserError("; ".join(map(_fault, faults))) from None

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        home = _folder(home)
        if home.is_file():
            raise UserError(f"must be a folder; {home} is a file")
        return home

    @field_validator("ray_address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None and not _RAY_ADDRESS.fullmatch(address):
            raise UserError(
                f"must be auto or host:port, got {masked(address)!r}. Ray Data does not work by ray://: have this "
                "machine join the cluster by `ray start --address=host:port --num-cpus=0`"
            )
        return address

    @field_validator("model_name")
    @classmethod
    def _check_model_name(cls, name: str) -> str:
        # Stricter than MLflow's rule, because the name is also a part of `models:/name@alias` and of tags of indexes.
        if not _MODEL_NAME.fullmatch(name):
            raise UserError(
                "must be a model name: 1 to 63 letters, digits, '-' and '_', starting with a letter or digit; "
                f"got {name!r}"
            )
        return name

    @field_validator("prefect_api_url")
    @classmethod
    def _check_api(cls, url: str | None) -> str | None:
        if url is not None and "/api" not in urlsplit(url).path:
            raise UserError(f"must be the API's URL, as in {url}/api, got {url!r}")
        return url

    @model_validator(mode="after")
    def _check_apart(self) -> "Settings":
        by_uri: dict[str, str] = {}
        for name in ("shards_uri", "index_uri", "training_uri"):
            uri = getattr(self, name)
            if (other := by_uri.setdefault(uri, name)) != name:
                raise UserError(f"{variable_of(other)} and {variable_of(name)} need a folder each; both are {uri}")
        return self

    def make_home(self) -> Path:
        """Create the home if it does not exist, accessible to its owner only, and return it.

        Raises:
            UserError: if it can't be made.
        """
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the home {self.home} can't be made: {error.strerror}; IMAGERAG_HOME names another"
            ) from error
        return self.home

    def training_of(self, name: str) -> str:
        """Return the folder of the corpus `name`'s training sets, checkpoints and adapters."""
        return f"{self.training_uri}/{check_name(name)}"

    def shards_of(self, name: str) -> str:
        """Return the shards folder of the corpus `name`."""
        return f"{self.shards_uri}/{check_name(name)}"


def settings_of(model_name: str | None) -> Settings:
    """Return the settings, with another registered model if its name is given.

    Raises:
        UserError: as `Settings`.
    """
    return Settings() if model_name is None else Settings(model_name=model_name)


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def sources() -> dict[str, str]:
    """Return the source, `environment` or `.env`, of each setting that is not a default."""
    from_file = dict.fromkeys(DotEnvSettingsSource(Settings)(), ".env")
    return from_file | dict.fromkeys(EnvSettingsSource(Settings)(), "environment")


def unknown_variables() -> Iterator[tuple[str, str, str | None]]:
    """Yield unknown `IMAGERAG_*` variables: name, source, and the setting that was probably meant, if any."""
    known = [variable_of(name) for name in Settings.model_fields]
    for source, place in ((EnvSettingsSource(Settings), "environment"), (DotEnvSettingsSource(Settings), ".env")):
        for name in map(str.upper, source.env_vars):
            if name.startswith(PREFIX) and name not in {*known, *_NOT_SETTINGS} and not _OF_KUBERNETES.fullmatch(name):
                near = get_close_matches(name, known, 1, cutoff=0.85)
                yield name, place, near[0] if near else None


def masked(text: str) -> str:
    """Return `text` with credentials in URLs replaced by `***`."""
    text = re.sub(r"//\S*@", "//***@", text)
    return re.sub(r"(?i)([?&][^=&]*(?:password|secret|token|key)[^=&]*=)[^&\s]*", r"\1***", text)


def check_name(name: str) -> str:
    """Return `name` if it is a valid corpus name, which also names a folder and a table.

    Raises:
        UserError: if it is not.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            "a corpus name has 1 to 63 characters of a-z, 0-9, '-' and '_' and starts with a letter or digit; "
            f"got {name!r}"
        )
    return name


def _fault(error: Any) -> str:
    """Describe which variable is invalid and why."""
    cause = error.get("ctx", {}).get("error", error["msg"])
    return f"{variable_of(str(error['loc'][0]))} {cause}" if error["loc"] else str(cause)
