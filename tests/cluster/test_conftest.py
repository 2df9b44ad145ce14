"""Where the tests of this folder can't run, `make test-cluster` does not pass, and CI runs it where they can."""

from pathlib import Path

import pytest
import yaml

from tests.cluster import conftest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("required", "outcome"), [(True, pytest.fail.Exception), (False, pytest.skip.Exception)])
def test_what_can_not_run_fails_if_it_has_to(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, required: bool, outcome: type[BaseException]
) -> None:
    monkeypatch.delenv("CLUSTER_REQUIRED", raising=False)
    if required:
        monkeypatch.setenv("CLUSTER_REQUIRED", "1")
    monkeypatch.setattr(conftest, "NEEDED", {"there is no such engine": False})
    conftest.pytest_runtest_setup(request.node)  # this test needs none
    request.node.add_marker("cluster")
    with pytest.raises(outcome, match="no such engine"):
        conftest.pytest_runtest_setup(request.node)


def test_ci_runs_them_as_root() -> None:
    """Of whom `sudo` does not keep the environment."""
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "test-cluster" in step.get("run", "")]
    assert command.startswith('sudo env "PATH=$PATH"')
    assert "CLUSTER_REQUIRED=1" in (ROOT / "Makefile").read_text().partition("test-cluster: ")[2].partition("\n\n")[0]
