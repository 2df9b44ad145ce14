"""`imagerag deploy`: what it says of schedules that people made."""

from uuid import uuid4

import pytest
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule

from imagerag.cli.deploy import _check_schedules


def test_a_schedule_whose_runs_would_fail_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    weekly = CronSchedule(cron="0 5 * * 1", timezone="UTC")
    good = DeploymentSchedule(schedule=weekly, slug="good", parameters={"url_list": "s3://lists/mine.parquet"})
    nested = DeploymentSchedule(schedule=weekly, slug="old", parameters={"parameters": good.parameters})
    _check_schedules(DeploymentResponse(name="reindex", flow_id=uuid4(), schedules=[good, nested]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("reindex: its schedule old gives parameters, which the flow does not take")
