"""Pictures of a registered model: the same ones however it is loaded, and clear answers to bad requests."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
from PIL import Image

from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.registry import package
from imagerag.registry.fetch import download, pull
from imagerag.registry.serving import make_rows
from imagerag.registry.versions import register
from imagerag.training.tracking import tracking_uri
from tests.registry.conftest import Home

PROMPT, PARAMS = "a red dragon", {"seed": 7, "num_images": 2, "num_references": 2, "scale": 1.5}


@pytest.fixture(scope="module")
def pipeline(champion: Home, tmp_path_factory: pytest.TempPathFactory) -> ImageRAGTurboPipeline:
    return package.load(download(champion.settings, 1, tmp_path_factory.mktemp("model") / "model"))


def test_each_picture_has_its_seed_and_its_references(pipeline: ImageRAGTurboPipeline) -> None:
    rows = make_rows(pipeline, [PROMPT, "a castle"], seed=3, num_images=2, num_references=2)
    assert [row["seed"] for row in rows] == [3, 4, 3, 4]
    assert [row["references"][0]["caption"] for row in rows] == ["red dragon"] * 2 + ["castle"] * 2
    assert Image.open(io.BytesIO(base64.b64decode(rows[0]["image"]))).size == (16, 16)
    assert make_rows(pipeline, ["a castle"], seed=4, num_references=2) == rows[3:], "whatever else is asked for"
    plain = make_rows(pipeline, [PROMPT], fusion="none")
    assert make_rows(pipeline, [PROMPT], scale=0.0)[0]["image"] == plain[0]["image"]
    assert make_rows(pipeline, [PROMPT], fusion="slerp", w=1.0)[0]["image"] == plain[0]["image"]
    assert plain[0]["references"] == []
    assert plain[0]["image"] != make_rows(pipeline, [PROMPT])[0]["image"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_images": 0}, "num_images must be between 1 and 64; got 0"),
        ({"num_images": 65}, "num_images must be between 1 and 64; got 65"),
        ({"seed": -1}, "seeds are 0 to 9223372036854775807; got -1"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seeds are 0 to"),
        ({"num_references": 65}, "num_references must be between 0 and 64; got 65"),
        ({"num_references": 9}, "num_references can't be more than the index has rows: 9 of 8"),
        ({"fusion": "mean"}, "fusion is one of adapter, slerp, none; got 'mean'"),
        ({"scale": 11}, "adapter_scale, of what the adapter adds, must be between 0 and 10; got 11"),
        ({"fusion": "slerp", "w": 1.1}, "between 0 and 1; got 1.1"),
        ({"steps": 0}, "the number of steps must be between 1 and 1000; got 0"),
    ],
)
def test_parameters_are_checked(pipeline: ImageRAGTurboPipeline, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_rows(pipeline, [PROMPT], **params)


def test_a_portable_model_needs_no_store(home: Home, tmp_path: Path) -> None:
    register(home.finetuned("first"), home.settings)
    register(home.finetuned("first"), home.settings, portable=True)
    expected = make_rows(package.load(download(home.settings, 1, tmp_path / "model")), [PROMPT], **PARAMS)
    shutil.rmtree(home.settings.index_uri)
    assert make_rows(package.load(download(home.settings, 2, tmp_path / "other")), [PROMPT], **PARAMS) == expected
    pull(home.settings, "2", tmp_path / "pulled")
    shutil.move(tmp_path / "pulled", tmp_path / "moved")
    pulled = ImageRAGTurboPipeline.from_pretrained(tmp_path / "moved")
    assert make_rows(pulled, [PROMPT], **PARAMS) == expected
    with pytest.raises(UserError, match="is not to be had: there is no such table"):
        pull(home.settings, "1", tmp_path / "more")


def test_a_version_states_its_dtype(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("imagerag.generation.base.default_dtype", lambda _: "bf16")  # as on another machine
        register(home.finetuned("first"), home.settings)
    folder = download(home.settings, 1, tmp_path / "model")
    pull(home.settings, "1", tmp_path / "pulled")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model")).unwrap_python_model()._pipeline
    ways = [package.load(folder), served, ImageRAGTurboPipeline.from_pretrained(tmp_path / "pulled")]
    assert [each.unet.dtype for each in ways] == [torch.bfloat16] * 3
    first, *others = (make_rows(each, [PROMPT], **PARAMS) for each in ways)
    assert others == [first, first]
    chosen = {"dtype": "fp32", "device": "cpu"}
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=chosen).unwrap_python_model()._pipeline
    assert served.unet.dtype == torch.float32


OF_PYFUNC = """
import json, sys, mlflow
model = mlflow.pyfunc.load_model("models:/imagerag-turbo@champion")
prompt, params = json.loads(sys.argv[1])
print(json.dumps(model.predict([{"prompt": prompt}], params=params)))
"""
OF_FOLDER = """
import base64, io, json, sys, torch
from imagerag.generation.pipeline import ImageRAGTurboPipeline
prompt, params = json.loads(sys.argv[1])
pipeline, images = ImageRAGTurboPipeline.from_pretrained(sys.argv[2]), []
for seed in range(params["seed"], params["seed"] + params["num_images"]):
    generator, buffer = torch.Generator().manual_seed(seed), io.BytesIO()
    chosen = {"num_references": params["num_references"], "adapter_scale": params["scale"]}
    made = pipeline(prompt, generator=generator, **chosen)
    made.images[0].save(buffer, "PNG")
    images.append(base64.b64encode(buffer.getvalue()).decode())
print(json.dumps(images))
"""


@pytest.mark.engines
def test_all_ways_to_load_it_give_the_same_pictures(
    champion: Home, pipeline: ImageRAGTurboPipeline, tmp_path: Path
) -> None:
    expected = json.loads(json.dumps(make_rows(pipeline, [PROMPT], **PARAMS)))
    pull(champion.settings, "champion", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "README.md").is_file()
    asked = json.dumps([PROMPT, PARAMS])
    with served(champion, tmp_path) as url:  # which takes its time to start
        assert run(champion, tmp_path, OF_PYFUNC, asked) == expected
        assert run(champion, tmp_path, OF_FOLDER, asked, str(tmp_path / "pulled")) == [row["image"] for row in expected]
        await_server(url, tmp_path / "serve.log")
        request = {"dataframe_records": [{"prompt": PROMPT}], "params": PARAMS}
        assert post(url, request) == (200, {"predictions": expected})
        status, answer = post(url, request | {"params": {"num_images": 0}})
        assert status == 400
        assert "num_images must be between 1 and 64; got 0" in answer["message"]
        assert post(url, {"dataframe_records": [{"text": PROMPT}]})[0] == 400
        assert post(url, request | {"params": {"seed": "one"}})[0] == 400


def environment(home: Home) -> dict[str, str]:
    """Of a process that knows MLflow and nothing else of the home."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("IMAGERAG_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    return own | {"MLFLOW_TRACKING_URI": tracking_uri(home.settings), "PATH": path}


def run(home: Home, folder: Path, script: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def served(home: Home, folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/imagerag-turbo@champion",
               "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment(home), stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()


def await_server(url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url.replace("/invocations", "/ping"), timeout=10):
                return
        except urllib.error.URLError:
            time.sleep(0.3)
    raise AssertionError(log.read_text())


def post(url: str, content: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
