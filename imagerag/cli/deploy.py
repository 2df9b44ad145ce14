"""`imagerag deploy`: create or update the flows' deployments on a Prefect server; changes made in its UI stay."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from imagerag.errors import UserError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

    from imagerag.cli.run import FlowName
    from imagerag.settings import Settings

_DIGITS = 12
_NIGHTLY = "imagerag_nightly"


def deploy() -> None:
    """Apply infra/prefect.yaml to the Prefect server; schedules and switches set in its UI stay."""
    import asyncio

    from imagerag.cli.project import project as find_project
    from imagerag.services import deployments_file, prefect_api, prefect_environment
    from imagerag.settings import Settings

    settings = Settings()
    api_url = prefect_api(settings)
    if api_url is None:
        raise UserError(f"no Prefect server runs for {settings.home}: `imagerag up` starts one")
    project = find_project()
    path = deployments_file(project)
    # Prefect reads its settings when it is first imported.
    os.environ.update(prefect_environment(settings, api_url) | {"IMAGERAG_PROJECT": str(project)})
    is_cluster = settings.prefect_api_url is not None
    _prepare_slots()
    asyncio.run(_deploy(path, project, nightly_parameters(settings), is_cluster=is_cluster))


def nightly_parameters(settings: "Settings") -> dict[str, Any] | None:
    """Return the parameters of the nightly `reindex` from the settings, or None.

    Raises:
        UserError: if they are not valid parameters of `reindex`.
    """
    if settings.nightly is None:
        return None
    from imagerag.cli.run import parameters_of
    from imagerag.config import validated

    try:
        validated(parameters_of("reindex"), settings.nightly)
    except UserError as error:
        raise UserError(f"IMAGERAG_NIGHTLY has to hold parameters of the flow `reindex`: {error}") from error
    return settings.nightly


async def _deploy(path: Path, project: Path, nightly: dict[str, Any] | None, *, is_cluster: bool) -> None:
    import yaml
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore

    file = yaml.safe_load(path.read_text())
    automations = file.pop("automations")
    async with get_client() as client:
        await _make_pool(client)
        versions = {each.name: each.version for each in await client.read_deployments()}
        enabled = {each.name: each.enabled for each in await client.read_automations()}
        for automation in automations:
            if automation["name"] not in enabled:
                await client.create_automation(AutomationCore.model_validate(automation | {"enabled": is_cluster}))
        changed = []
        for definition in file["deployments"]:
            name, version = definition["name"], _version(definition, file["pull"], project)
            # A deployment is created before its automations, and a killed command may not have created them.
            has_automations = all(each["name"] in enabled for each in definition.get("triggers", []))
            if versions.get(name) == version and has_automations:
                typer.echo(f"{name}: unchanged")
                continue
            triggers = [each | {"enabled": enabled.get(each["name"], True)} for each in definition.get("triggers", [])]
            # Otherwise the file's schedules would replace those that were made in Prefect's UI.
            schedules = [] if name in versions else definition.get("schedules", [])
            changed.append(definition | {"version": version, "triggers": triggers, "schedules": schedules})
        if changed:
            _apply(file | {"deployments": changed}, project)
        if nightly is not None:
            await _schedule_nightly(client, file["deployments"], nightly)
        for deployment in await client.read_deployments():
            if deployment.name in {each["name"] for each in file["deployments"]}:
                _check_schedules(deployment)


def _prepare_slots() -> None:
    from prefect.client.orchestration import get_client

    from tasks.slots import prepare_slots

    with get_client(sync_client=True) as client:
        prepare_slots(client)


async def _make_pool(client: "PrefectClient") -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    from imagerag.services import WORK_POOL

    try:
        await client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=WORK_POOL, type=ProcessWorker.type, base_job_template=template)
        with suppress(ObjectAlreadyExists):  # another process may have been faster
            await client.create_work_pool(pool)


def _version(definition: dict[str, Any], pull: list[dict[str, Any]], project: Path) -> str:
    """Return a digest of a deployment's inputs: definition, pull steps, project folder and parameter schema."""
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Any = load_flow_from_entrypoint(str(project / definition["entrypoint"]))
    made_from = [definition, pull, str(project), parameter_schema(flow).model_dump(mode="json")]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _apply(file: dict[str, Any], project: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(json.dumps(file))  # JSON is valid YAML
        _prefect("deploy", "--all", "--prefect-file", str(path), cwd=project)
    for definition in file["deployments"]:
        typer.echo(f"{definition['name']}: deployed")


async def _schedule_nightly(
    client: "PrefectClient", definitions: list[dict[str, Any]], nightly: dict[str, Any]
) -> None:
    """Create or update the nightly schedule of `reindex`.

    A schedule that was paused in the UI stays paused if the parameters are unchanged. Prefect drops a schedule's
    parameters when it is paused in the UI, so the last ones are also stored in a variable.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate, VariableCreate, VariableUpdate
    from prefect.client.schemas.schedules import CronSchedule

    (described,) = next(each for each in definitions if each["name"] == "reindex")["schedules"]
    reindex = await client.read_deployment_by_name("reindex/reindex")
    own = next((each for each in reindex.schedules if each.slug == described["slug"]), None)
    last = await client.read_variable_by_name(_NIGHTLY)
    if last is None:
        await client.create_variable(VariableCreate(name=_NIGHTLY, value=nightly))
    elif last.value != nightly:
        await client.update_variable(VariableUpdate(name=_NIGHTLY, value=nightly))
    if own is not None:
        active = own.active or last is None or last.value != nightly
        await client.update_deployment_schedule(reindex.id, own.id, active=active, parameters=nightly)
        if not active:
            typer.echo("reindex: its nightly schedule stays paused, as it was set in Prefect's UI")
            return
    else:
        schedule = CronSchedule(cron=described["cron"], timezone=described["timezone"])
        made = DeploymentScheduleCreate(schedule=schedule, active=True, parameters=nightly, slug=described["slug"])
        await client.create_deployment_schedules(reindex.id, [made])
    typer.echo(f"reindex: follows {nightly['url_list']} by {described['cron']!r}, {described['timezone']}")


def _check_schedules(deployment: "DeploymentResponse") -> None:
    """Warn of schedules with parameters that the flow no longer has, because their runs fail."""
    from imagerag.cli.run import parameters_of

    known = parameters_of(cast("FlowName", deployment.name)).model_fields
    for schedule in deployment.schedules:
        if unknown := sorted({*deployment.parameters, *schedule.parameters} - known.keys()):
            name = schedule.slug or schedule.id
            typer.echo(
                f"{deployment.name}: its schedule {name} gives {', '.join(unknown)}, which the flow does not take; its "
                f"runs fail until that is changed in Prefect's UI. The flow takes {', '.join(known)}",
                err=True,
            )


def _prefect(*command: str, cwd: Path | None = None) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *command], cwd=cwd, capture_output=True, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(f"`prefect {' '.join(command)}` failed:\n{result.stdout}{result.stderr}")
