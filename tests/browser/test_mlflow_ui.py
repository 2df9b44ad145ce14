"""MLflow's UI over a registry: runs are compared, the model is opened, and its card and pictures can be seen."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from imagerag import services
from imagerag.registry.versions import resolve_version
from tests.browser.conftest import MARKS, shoot
from tests.end_to_end.prefect_api import basic
from tests.registry.conftest import Home

pytestmark = MARKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url(champion: Home) -> Iterator[str]:
    home = champion.settings.home
    try:
        *_, mlflow = services.up(champion.settings, project=ROOT)
        yield mlflow.url
    finally:
        services.down(home)


@pytest.fixture
def page(page: Page, champion: Home) -> Page:
    """A page of someone who trains models and has closed the chat."""
    kept = {
        "mlflow.workflowType_v1": '"machine_learning"',
        "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
        "mlflow.assistant.panelOpen_v1": "false",
    }
    page.set_extra_http_headers({"Authorization": basic(champion.settings.home)})
    page.add_init_script("".join(f"localStorage.setItem({key!r}, {value!r});" for key, value in kept.items()))
    return page


def test_runs_are_compared_and_the_model_is_read(page: Page, url: str, champion: Home) -> None:
    (experiment,) = champion.client.search_experiments(filter_string="name = 'finetune'")
    page.goto(f"{url}/#/experiments/{experiment.experiment_id}/runs")
    for name in ("first", "second"):
        row = page.get_by_role("row").filter(has_text=name).first
        row.get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text(re.compile(r"Comparing 2 Runs")).first).to_be_visible()
    shoot(page, "compared")

    page.goto(f"{url}/#/models/imagerag-turbo")
    expect(page.get_by_text("@ champion").first).to_be_visible()
    page.goto(f"{url}/#/models/imagerag-turbo/versions/1")
    expect(page.get_by_text("One-step text-to-image generation that is shown the nearest rows").first).to_be_visible()
    shoot(page, "model")

    model_id = resolve_version(champion.settings, "1").pinned("logged_model")
    page.goto(f"{url}/#/experiments/{experiment.experiment_id}/models/{model_id}/artifacts")
    page.get_by_text("grid.png", exact=True).first.click()
    expect(page.locator("img[src^='blob:']").first).to_be_visible()
    shoot(page, "grid")
