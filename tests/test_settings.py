"""Settings: where they come from, what they refuse, what they show; and names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imagerag.cli import app
from imagerag.errors import UserError
from imagerag.settings import Settings, check_name, masked, sources, unknown_variables


@pytest.fixture(autouse=True)
def _no_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_everything_lies_under_the_home_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    settings = Settings()
    assert settings.index_uri == str(tmp_path / "home" / "index")
    assert settings.shards_of("cats") == str(tmp_path / "home" / "shards" / "cats")

    monkeypatch.setenv("IMAGERAG_SHARDS_URI", "s3://bucket/shards/")
    assert Settings().shards_of("cats") == "s3://bucket/shards/cats"
    assert not (tmp_path / "home").exists(), "reading settings makes nothing"


def test_relative_folders_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=Path("here"), training_uri="there/training")
    monkeypatch.chdir("/")
    assert settings.home == tmp_path / "here"
    assert settings.index_uri == str(tmp_path / "here" / "index")
    assert settings.training_uri == str(tmp_path / "there" / "training")


def test_the_environment_wins_over_the_file_and_what_is_empty_is_unset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("IMAGERAG_HOME=from-file\nIMAGERAG_RAY_ADDRESS=auto\n")
    monkeypatch.setenv("IMAGERAG_HOME", "from-environment")
    monkeypatch.setenv("IMAGERAG_INDEX_URI", "")
    settings = Settings()
    assert (settings.home.name, settings.ray_address) == ("from-environment", "auto")
    assert settings.index_uri == str(settings.home / "index")
    assert sources() == {"home": "environment", "ray_address": ".env"}


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("HOME", __file__, "must be a folder"),
        ("HOME", "/data/[old] pictures", "must have no [ in its path, which means any file where files are listed"),
        ("INDEX_URI", "/data/what?", "must have no ? in its path"),
        ("SHARDS_URI", "~nobody-of-this-name/shards", "can't begin with ~ here"),
        ("MODEL_NAME", "mugs/best", "must be a model name: 1 to 63 letters, digits, '-' and '_', starting"),
        ("SHARDS_URI", "ftp://host/shards", "must be a folder or s3://bucket/folder, got 'ftp://host/shards'"),
        ("INDEX_URI", "s3:///index", "must be a folder or s3://bucket/folder"),
        ("TRAINING_URI", "s3://key:sesame@bucket/training", "must not hold credentials"),
        ("NIGHTLY", '["list.csv"]', "must be a JSON object, got "),
        ("RAY_ADDRESS", "head", "must be auto or host:port, got 'head'"),
        ("RAY_ADDRESS", "ray://me:sesame@head:10001", "must be auto or host:port"),
        ("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db", "must be a server's http:// or https:// URL"),
        ("MLFLOW_TRACKING_URI", "https://me:sesame@mlflow.example", "must not hold credentials"),
        (
            "PREFECT_API_URL",
            "http://prefect.example:4200",
            "must be the API's URL, as in http://prefect.example:4200/api",
        ),
    ],
)
def test_a_bad_value_is_refused_with_its_variable_and_rule(
    variable: str, value: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"IMAGERAG_{variable}", value)
    with pytest.raises(UserError) as refusal:
        Settings()
    message = str(refusal.value)
    assert message.startswith(f"IMAGERAG_{variable} {rule}")
    assert "sesame" not in message
    assert message.count("IMAGERAG_") == 1, "one fault, told once"


def test_values_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="SHARDS_URI and IMAGERAG_INDEX_URI need a folder each"):
        Settings(shards_uri="s3://bucket/all", index_uri="s3://bucket/all/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.example:9000")
    with pytest.raises(UserError, match="AWS_ALLOW_HTTP=true"):
        Settings(shards_uri="s3://bucket/shards")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    assert Settings(shards_uri="s3://bucket/shards").shards_uri == "s3://bucket/shards"


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("HOEM", "HOME"), ("INDEXURI", "INDEX_URI"), ("RAY_ADRESS", "RAY_ADDRESS"), ("PREFECT_URL", "PREFECT_API_URL")],
)
def test_a_misspelt_variable_is_refused_with_what_is_meant(
    misspelt: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text(f"IMAGERAG_{misspelt}=x\n")
    with pytest.raises(UserError, match=f"no setting IMAGERAG_{misspelt}; did you mean IMAGERAG_{meant}"):
        Settings()


def test_what_is_set_for_others_is_no_misspelling(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in ("PREFECT", "PREFECT_API", "MLFLOW", "RAY_HEAD_SVC"):
        for suffix in ("SERVICE_HOST", "SERVICE_PORT", "PORT", "PORT_4200_TCP_ADDR"):
            monkeypatch.setenv(f"IMAGERAG_{service}_{suffix}", "x")
    monkeypatch.setenv("IMAGERAG_IMAGE_TAG", "x")
    Settings()
    assert list(unknown_variables()) == [("IMAGERAG_IMAGE_TAG", "environment", None)]


def test_the_command_shows_values_sources_and_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(
        "IMAGERAG_SHARDS_URI=s3://bucket/shards\n"
        "AWS_SECRET_ACCESS_KEY=sesame\n"
        "PREFECT_API_DATABASE_CONNECTION_URL=postgresql+asyncpg://me:sesame@db/prefect\n"
    )
    for name in ("AWS_SECRET_ACCESS_KEY", "PREFECT_API_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sesame")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/run/token")
    monkeypatch.setenv("IMAGERAG_IMAGE_TAG", "x")
    result = subprocess.run(
        [sys.executable, "-m", "imagerag.cli", "settings", "--json"], capture_output=True, text=True, check=True
    )
    assert "sesame" not in result.stdout + result.stderr
    assert "IMAGERAG_IMAGE_TAG (environment) is not read" in result.stderr
    shown = {each["variable"]: (each["value"], each["source"]) for each in json.loads(result.stdout)}
    assert shown["IMAGERAG_SHARDS_URI"] == ("s3://bucket/shards", ".env")
    assert shown["IMAGERAG_RAY_ADDRESS"] == (None, "default")
    assert shown["AWS_SECRET_ACCESS_KEY"] == ("***", ".env")
    assert shown["MLFLOW_TRACKING_PASSWORD"] == ("***", "environment")
    assert shown["PREFECT_API_DATABASE_CONNECTION_URL"] == ("postgresql+asyncpg://***@db/prefect", ".env")
    assert shown["RAY_AUTH_TOKEN_PATH"] == ("/run/token", "environment")

    table = CliRunner().invoke(app, ["settings"], env={"COLUMNS": "200"})
    assert table.exit_code == 0
    assert "s3://bucket/shards" in table.output
    assert "sesame" not in table.output


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("https://me:pass@word@host/x", "https://***@host/x"),
        (
            "postgresql://host/db?user=me&password=x&sslmode=require",
            "postgresql://host/db?user=me&password=***&sslmode=require",
        ),
    ],
)
def test_credentials_in_urls_are_masked(value: str, shown: str) -> None:
    assert masked(value) == shown


@pytest.mark.parametrize("name", ["", "../other", "Cats", "a b", "-cats", "a" * 64, "cats.lance"])
def test_a_bad_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(UserError, match="1 to 63 characters"):
        check_name(name)
