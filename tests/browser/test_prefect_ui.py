"""A flow from Prefect's UI alone: its form, its refusal, its run, its report, and what follows from it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from imagerag import services
from imagerag.retrieval.publish import published_rows
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tests.browser.conftest import MARKS, shoot
from tests.corpus.web import picture

pytestmark = MARKS

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 6
_RUN_TIMEOUT_MS = 300_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("ui"))


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    """The address of Prefect's UI, of all that `make up` starts."""
    try:
        server, *_ = services.up(settings, project=ROOT)
        yield server.url
    finally:
        services.down(settings.home)


@pytest.fixture
def page(page: Page, url: str, settings: Settings) -> Page:
    """A page that has followed the link which `make up` prints."""
    server = services.find(settings.home, services.PREFECT)
    assert server is not None
    page.goto(services.link(server, settings.home))
    page.wait_for_url(f"{url}/dashboard**")
    return page


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "mugs"
    folder.mkdir()
    for seed in range(NUM_IMAGES):
        (folder / f"red mug {seed}.png").write_bytes(picture(seed, image_format="PNG"))
    return folder


def field(page: Page, label: str) -> Locator:
    """The box below a label of a form."""
    below = "following::*[self::input or self::textarea]"
    return page.locator(f"xpath=(//*[starts-with(normalize-space(text()), '{label}')]/{below})[1]")


def open_run(page: Page, url: str, flow: str) -> None:
    """Go to the one run of a flow, and wait until it has ended well."""
    page.goto(f"{url}/flows")
    page.get_by_role("link", name=flow, exact=True).first.click()
    page.locator("a[href*='/runs/flow-run/']").first.click(timeout=_RUN_TIMEOUT_MS)
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=_RUN_TIMEOUT_MS)


def test_ingest_is_filled_in_refused_run_watched_and_read(
    page: Page, url: str, settings: Settings, images: Path
) -> None:
    page.goto(f"{url}/deployments")
    page.get_by_role("link", name="ingest", exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    field(page, "Folder or URL list").fill(str(images))
    field(page, "Name").fill("mugs")
    shoot(page, "form")
    field(page, "Num workers").fill("0")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.get_by_text("0 is less than the minimum of 1").first).to_be_visible()

    field(page, "Num workers").fill("1")
    page.get_by_role("button", name="Submit", exact=True).click()
    page.wait_for_url("**/deployments/deployment/*?tab=Runs")
    open_run(page, url, "ingest")
    shoot(page, "prefect")
    page.get_by_role("listitem").filter(has_text="Artifacts").click()
    expect(page.get_by_text(f"embed: {NUM_IMAGES} of {NUM_IMAGES} images").first).to_be_visible()
    page.get_by_role("link", name="corpus-mugs").click()
    expect(page.get_by_text(f"{NUM_IMAGES} fine, 0 failed")).to_be_visible()
    expect(page.get_by_text("machine-seconds").first).to_be_visible()
    shoot(page, "report")
    assert published_rows(Store(settings.index_uri, "mugs")) == NUM_IMAGES

    # A published index gets its features: nobody started this one.
    open_run(page, url, "features")
    expect(page.get_by_role("link", name="A published index gets its features")).to_be_visible()
