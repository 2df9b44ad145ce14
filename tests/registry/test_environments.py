"""The environments that MLflow creates for a model: of its requirements, and offline of a folder of their wheels."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import imagerag
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.registry.fetch import pull_served
from imagerag.registry.versions import register
from tests.generation.with_index import make_pipeline, write_store
from tests.registry import conftest
from tests.registry.conftest import Home
from tests.registry.test_serving import PARAMS, PROMPT, environment

ROOT = Path(imagerag.__file__).parent.parent


def write_packages(requirements: list[str], folder: Path) -> Path:
    """Link what an installation of these requirements would have, of the packages that are installed here."""
    folder.mkdir()
    found, wanted = set[str](), [Requirement(each) for each in requirements]
    while wanted:
        requirement = wanted.pop()
        distribution = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), requirement
        known = f"{canonicalize_name(requirement.name)}{sorted(requirement.extras)}"
        if known in found:
            continue
        found.add(known)
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
        extras = ("", *requirement.extras)
        for each in map(Requirement, distribution.requires or []):
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(each)
    return folder


LOAD = """
import json, sys
sys.path.append(sys.argv[2])
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
import imagerag
print(json.dumps([imagerag.__file__, model.metadata.metadata, model.predict([{"prompt": "a red dragon"}])]))
"""


def test_a_portable_model_needs_its_requirements_and_no_more(home: Home, tmp_path: Path) -> None:
    register(home.finetuned("second"), home.settings, portable=True)
    model = tmp_path / "model"
    pull_served(home.settings, "1", model)
    packages = write_packages((model / "requirements.txt").read_text().splitlines(), tmp_path / "packages")
    assert not (packages / "ray").exists()
    command = [sys.executable, "-I", "-S", "-c", LOAD, str(model), str(packages)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(home), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    file, described, rows = json.loads(done.stdout)
    assert file == str(model / "code" / "imagerag" / "__init__.py")
    assert (described["index_name"], described["portable"]) == ("images", True)
    assert len(rows[0]["references"]) == 4
    sample = model / "code" / "imagerag" / "embedded" / "sample"
    assert sample.is_dir()
    assert not (sample / "data").exists()


ASK = """
set -eu
ip link set lo up
"$1" -m mlflow models serve --model-uri "$2" --env-manager "$3" --host 127.0.0.1 --port 5000 >&2 &
server=$!
until curl --silent --fail http://127.0.0.1:5000/health >&2; do kill -0 $server; sleep 1; done
curl --silent --fail http://127.0.0.1:5000/invocations --header 'Content-Type: application/json' --data "$4"
"""


def ask(model: Path, manager: str, wheels: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the pictures of `mlflow models serve` in an environment that MLflow creates without a network."""
    of_here = ("IMAGERAG_", "PIP_", "PYTHON", "UV_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(of_here)}
    own |= {"UV_OFFLINE": "1", "UV_FIND_LINKS": str(wheels), "UV_CACHE_DIR": str(folder / "cache")}
    own |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    own |= {"HF_HOME": str(folder / "hub"), "MLFLOW_ENV_ROOT": str(folder / "environments")}
    if manager == "virtualenv":  # as `pyenv install 3.11` leaves it, which builds the last patch release that it knows
        known = ["pyenv", "latest", "--known", f"{sys.version_info.major}.{sys.version_info.minor}"]
        latest = subprocess.run(known, capture_output=True, text=True, check=True).stdout.strip()
        versions = folder / "pyenv" / "versions"
        versions.mkdir(parents=True)
        (versions / latest).symlink_to(sys.base_prefix)
        own["PYENV_ROOT"] = str(versions.parent)
    request = json.dumps({"dataframe_records": [{"prompt": PROMPT}], "params": PARAMS})
    apart = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", ASK, "ask"]
    with (folder / "serve.log").open("w") as log:
        done = subprocess.run(
            [*apart, sys.executable, str(model), manager, request],
            cwd=folder, env=own, stdout=subprocess.PIPE, stderr=log, text=True, timeout=1200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, (folder / "serve.log").read_text()[-5_000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)["predictions"]
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a model of `tiny`: `portable` and `plain`; and the wheels of their requirements."""
    folder = tmp_path_factory.mktemp("models")
    home = Home(folder / "home")
    home.base = Path("tiny")
    write_store(Path(home.settings.index_uri), make_pipeline())
    home.publish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "make_adapter", lambda: HSpaceAdapter(channels=192, inner_dim=64, num_heads=2).eval())
        torch.manual_seed(1)
        home.train("first")
    for name in ("plain", "portable"):
        made = register(home.finetuned("first"), home.settings, portable=name == "portable")
        pull_served(home.settings, str(made.version), folder / name)
    source = folder / "source"  # setuptools writes into it
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder / "wheels")]
    subprocess.run([*pip, str(source), "--requirement", str(folder / "plain" / "requirements.txt")], check=True)
    return folder


@pytest.mark.wheels
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "manager"), [("portable", "uv"), ("portable", "virtualenv"), ("plain", "uv")])
def test_mlflow_serves_it_offline_from_a_folder_of_wheels(
    models: Path, name: str, manager: str, tmp_path: Path
) -> None:
    """With the same pictures as here."""
    expected = mlflow.pyfunc.load_model(str(models / name)).predict([{"prompt": PROMPT}], params=PARAMS)
    assert ask(models / name, manager, models / "wheels", tmp_path) == json.loads(json.dumps(expected))
