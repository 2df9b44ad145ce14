"""What is installed without `[pipeline]`: enough to use a model, and a sentence for the rest."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from imagerag.errors import UserError
from imagerag.services import deployments_file

ROOT = Path(__file__).parent.parent
OF_THE_PIPELINE = ("fastapi", "img2dataset", "prefect", "ray", "sqlalchemy", "torch-fidelity")
WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("img2dataset", "prefect", "ray", "torch_fidelity"))  # as if they were not there
"""
USE = f"""{WITHOUT}
from typer.testing import CliRunner
import imagerag.registry.fetch, imagerag.registry.serving, imagerag.retrieval.page, imagerag.retrieval.search
import imagerag.evaluation.compare_page
from imagerag import cli
for arguments in (["--help"], ["generate", "a mug", "--seeds", "1", "--out", sys.argv[1]]):
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
sys.argv[1:] = ["ingest", "urls.csv"]
cli.main()
"""


def test_a_model_is_used_without_the_pipelines_packages(tmp_path: Path) -> None:
    environment = os.environ | {"IMAGERAG_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(tmp_path / "made")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    said = "error: this command needs prefect, which is not installed: pip install 'imagerag-turbo[pipeline]'"
    assert done.stderr.splitlines()[-1] == said
    assert (tmp_path / "made" / "grid.png").is_file()


def test_the_pipelines_packages_are_an_extra_that_make_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not [each for each in project["dependencies"] if each.startswith(OF_THE_PIPELINE)]
    for name in OF_THE_PIPELINE:
        assert any(each.startswith(name) for each in extras["pipeline"]), name
    assert "imagerag-turbo[pipeline]" in extras["cluster"]
    assert any("cluster" in each for each in extras["dev"] if each.startswith("imagerag-turbo["))


def test_a_wheel_has_every_file_of_the_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    files = [path for path in (ROOT / "imagerag").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 100
    assert [path for path in files if path.suffix != ".py" and not any(map(path.match, patterns))] == []


def test_a_wheel_has_the_deployments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of data, which pip does not install next to the packages."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    ((folder, (file,)),) = data.items()
    assert (ROOT / file).name == "prefect.yaml"
    assert deployments_file(ROOT) == ROOT / file

    packages, installed = tmp_path / "lib" / "site-packages", tmp_path / folder / "prefect.yaml"
    described = packages / "imagerag_turbo-0.1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: imagerag-turbo\nVersion: 0.1.0\n")
    (described / "RECORD").write_text(f"../../{folder}/prefect.yaml,,\n")
    installed.parent.mkdir(parents=True)
    installed.write_text("deployments: []")
    monkeypatch.syspath_prepend(packages)
    assert deployments_file(packages).samefile(installed)
    (described / "RECORD").write_text("")
    with pytest.raises(UserError, match="does not exist: install imagerag-turbo again"):
        deployments_file(packages)
