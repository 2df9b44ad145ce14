"""The claims that infra/README.md makes of compose.yaml and the image."""

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
TEXT = (INFRA / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
each_service = pytest.mark.parametrize("name", SERVICES)


@each_service
def test_ports_are_published_on_loopback_only(name: str) -> None:
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in SERVICES[name].get("ports", []))


@each_service
def test_services_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].split(":")[0] not in ("0", "root")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory"} <= service["deploy"]["resources"]["limits"].keys()
    assert "cap_add" not in service
    assert "privileged" not in service


@each_service
def test_images_are_pinned_to_a_version(name: str) -> None:
    tag = SERVICES[name]["image"].replace("${IMAGERAG_VERSION:-0.1.0}", "0.1.0").rpartition(":")[2]
    assert re.match(r"\d+\.\d+", tag)


@each_service
def test_a_service_waits_for_what_is_healthy_or_done(name: str) -> None:
    for other, wait in SERVICES[name].get("depends_on", {}).items():
        assert wait["condition"] == (
            "service_completed_successfully" if SERVICES[other]["restart"] == "no" else "service_healthy"
        )
        if wait["condition"] == "service_healthy":
            assert SERVICES[other]["healthcheck"]["test"]


def test_databases_and_objects_are_on_the_internal_network_only() -> None:
    assert yaml.safe_load(TEXT)["networks"]["data"]["internal"] is True
    assert SERVICES["postgres"]["networks"] == SERVICES["s3"]["networks"] == ["data"]


@each_service
def test_no_secret_is_written_down(name: str) -> None:
    for variable, value in SERVICES[name].get("environment", {}).items():
        if re.search(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY", variable):
            assert re.fullmatch(r"\$\{(\w+):\?set \1 in infra/\.env\}", value), variable


def test_the_example_lists_every_secret_and_holds_none() -> None:
    example = dict(
        line.split("=", 1)
        for line in (INFRA / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(example) == set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert not any(example.values())


def test_servers_ask_who_is_there() -> None:
    prefect = SERVICES["prefect-server"]["environment"]
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == SERVICES["flows"]["environment"]["PREFECT_API_AUTH_STRING"]
    assert prefect["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert "--app-name=basic-auth" in SERVICES["mlflow"]["command"]
    assert any(option.startswith("--allowed-hosts=mlflow:5000,") for option in SERVICES["mlflow"]["command"])
    for name in ("ray-head", "ray-worker", "ray-gpu-worker", "flows"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_mlflows_users_are_kept_in_postgresql() -> None:
    config = configparser.ConfigParser()
    config.read(INFRA / "docker" / "mlflow-auth.ini")
    assert config["mlflow"]["database_uri"] == "postgresql://"
    assert "admin_password" not in config["mlflow"]


def test_settings_and_servers_know_the_variables_that_are_set() -> None:
    """A misspelt variable would be ignored in silence: Prefect's are looked up in its own list of settings."""
    from prefect.settings import Settings as PrefectSettings
    from prefect.settings.legacy import _get_valid_setting_names

    from imagerag.settings import Settings, variable_of

    used = {variable for service in SERVICES.values() for variable in service.get("environment", {})}
    prefects = {variable for variable in used if variable.startswith("PREFECT_")} - {"PREFECT_DB_PASSWORD"}
    assert prefects
    assert prefects <= _get_valid_setting_names(PrefectSettings)
    ours = {variable for variable in used if variable.startswith("IMAGERAG_")}
    assert ours
    assert ours <= {variable_of(name) for name in Settings.model_fields}


def test_the_image_is_pinned_and_runs_as_a_user() -> None:
    lines = (INFRA / "docker" / "Dockerfile").read_text().splitlines()
    assert any(re.fullmatch(r"ARG BASE=python:\d+\.\d+\.\d+-slim-\w+", line) for line in lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]
    installs = [line for line in lines if "pip install" in line and "--no-deps" not in line]
    assert installs
    assert all("--constraint infra/constraints.txt" in line for line in installs)
    assert any("pip uninstall" in line and "dataclasses" in line for line in lines)
