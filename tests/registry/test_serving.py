"""Pictures of a registered model: the same ones however it is loaded, and clear answers to bad requests."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from mlflow.pyfunc.scoring_server import init
from PIL import Image
from starlette.testclient import TestClient

from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.registry import package
from imagerag.registry.fetch import download, pull
from imagerag.registry.serving import ImageRAGTurboModel, make_rows
from imagerag.registry.versions import register
from imagerag.registry.waiting import BusyError, Waiting, WaitingConfig
from imagerag.training.tracking import tracking_uri
from tests.registry.conftest import Home

PROMPT, PARAMS = "a red dragon", {"seed": 7, "num_images": 2, "num_references": 2, "scale": 1.5}


def rows_of(pipeline: ImageRAGTurboPipeline, prompts: list[Any], **params: Any) -> list[dict[str, Any]]:
    return make_rows(Waiting(pipeline), prompts, **params)


def opened(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(row["image"])))


def pixels(rows: list[dict[str, Any]]) -> list[bytes]:
    return [opened(row).tobytes() for row in rows]


@pytest.fixture(scope="module")
def pipeline(champion: Home, tmp_path_factory: pytest.TempPathFactory) -> ImageRAGTurboPipeline:
    return package.load(download(champion.settings, 1, tmp_path_factory.mktemp("model") / "model"))


def test_each_picture_has_its_seed_and_its_references(pipeline: ImageRAGTurboPipeline) -> None:
    rows = rows_of(pipeline, [PROMPT, "a castle"], seed=3, num_images=2, num_references=2)
    assert [row["seed"] for row in rows] == [3, 4, 3, 4]
    assert [row["references"][0]["caption"] for row in rows] == ["red dragon"] * 2 + ["castle"] * 2
    about = json.loads(opened(rows[0]).text["imagerag"])
    assert (about["prompt"], about["seed"], about["references"]) == (PROMPT, 3, rows[0]["references"])
    assert about["references"][0]["licence"] == "CC0-1.0"
    assert (about["num_references"], about["fusion"]) == (2, "adapter")
    assert b"compositeWithTrainedAlgorithmicMedia" in opened(rows[0]).info["xmp"]
    assert (about["index"], len(about["digest"])) == ("images", 64)
    assert opened(rows[0]).size == (16, 16)
    assert rows_of(pipeline, ["a castle"], seed=4, num_references=2) == rows[3:], "whatever else is asked for"
    plain = rows_of(pipeline, [PROMPT], fusion="none")
    assert pixels(rows_of(pipeline, [PROMPT], scale=0.0)) == pixels(plain)
    assert pixels(rows_of(pipeline, [PROMPT], fusion="slerp", w=1.0)) == pixels(plain)
    assert plain[0]["references"] == []
    assert pixels(plain) != pixels(rows_of(pipeline, [PROMPT]))
    other = rows_of(
        pipeline, [PROMPT], fusion="none", guidance_scale=4.0, negative_prompt="a castle", height=32, width=8
    )
    assert opened(other[0]).size == (8, 32)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_images": 0}, "num_images must be between 1 and 64; got 0"),
        ({"num_images": 65}, "num_images must be between 1 and 64; got 65"),
        ({"seed": -1}, "seeds are 0 to 9223372036854775807; got -1"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seeds are 0 to"),
        ({"num_references": 65}, "num_references must be between 0 and 64; got 65"),
        ({"num_references": 9}, "num_references can't be more than the index has rows: 9 of 8"),
        ({"num_images": 2, "seed": 2**63}, "seeds are 0 to 9223372036854775807; got 9223372036854775808"),
        ({"guidance_scale": float("nan")}, "the guidance scale must be between 0 and 100; got nan"),
        ({"height": 0, "width": 0}, "height is a multiple of 8 up to 2048 pixels; got 0"),
        ({"height": 12}, "height is a multiple of 8 up to 2048 pixels; got 12"),
        ({"height": 16}, "height and width are given together; got 16 and None"),
        ({"width": 1_000_000}, "width is a multiple of 8 up to 2048 pixels; got 1000000"),
        ({"fusion": "mean"}, "fusion is one of adapter, slerp, none; got 'mean'"),
        ({"scale": 11}, "adapter_scale, of what the adapter adds, must be between 0 and 10; got 11"),
        ({"fusion": "slerp", "w": 1.1}, "between -1 and 1; got 1.1"),
        ({"negative_prompt": "a castle"}, "negative_prompt has no effect without guidance; got guidance_scale None"),
        ({"negative_prompt": "a castle", "guidance_scale": 1.0}, "without guidance; got guidance_scale 1.0"),
        ({"w": 0.5}, "w has no effect with fusion 'adapter'; got 0.5"),
        ({"fusion": "slerp", "scale": 0.0}, "scale has no effect with fusion 'slerp'; got 0.0"),
        ({"fusion": "none", "num_references": 2}, "num_references has no effect with fusion 'none'; got 2"),
        ({"num_inference_steps": 0}, "the number of steps must be between 1 and 1000; got 0"),
    ],
)
def test_parameters_are_checked(pipeline: ImageRAGTurboPipeline, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(pipeline, [PROMPT], **params)


@pytest.fixture(scope="module")
def loaded(champion: Home, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("loaded") / "model"
    download(champion.settings, 1, folder)
    return mlflow.pyfunc.load_model(str(folder), model_config={"max_images": 4})


@pytest.fixture(scope="module")
def client(loaded: Any) -> TestClient:
    """Of MLflow's server, in this process."""
    return TestClient(init(loaded))


def ask(client: TestClient, content: dict[str, Any]) -> tuple[int, Any]:
    answer = client.post("/invocations", content=json.dumps(content), headers={"Content-Type": "application/json"})
    return answer.status_code, answer.json()


BAD = [
    ([{"prompt": PROMPT}], {"seed": None}, "seed can't be null: leave it out"),
    ([{"prompt": "a \ud83d dragon"}], {}, "a prompt is text in Unicode; at character 2"),
    ([{"prompt": ""}], {}, "a prompt says what to make a picture of; got ''"),
    ([{"prompt": None}], {}, "a prompt is a text; got None"),
    ([{"prompt": PROMPT}] * 3, {"num_images": 2}, "a request is of at most 4 pictures; got 3 prompts, 2 of each"),
    ([{"text": PROMPT}], {}, "prompt"),
    ([{"prompt": PROMPT}], {"seed": "one"}, "seed"),
]


@pytest.mark.parametrize(("records", "params", "message"), BAD)
def test_a_bad_request_is_answered_by_a_sentence(
    loaded: Any, client: TestClient, records: list[Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(mlflow.MlflowException, match=message) as refused:
        loaded.predict(records, params=params)
    assert refused.value.get_http_status_code() == 400
    status, answer = ask(client, {"dataframe_records": records, "params": params})
    assert status == 400
    assert message in answer["message"], "the same by HTTP"
    assert "Traceback" not in json.dumps(answer)


def test_prompts_come_as_a_frame_records_or_a_dict_of_lists(loaded: Any, client: TestClient) -> None:
    frame = pd.DataFrame({"prompt": [PROMPT, "a castle"]})
    expected = loaded.predict(frame)
    assert loaded.predict({"prompt": [PROMPT, "a castle"]}) == expected
    assert loaded.predict([{"prompt": PROMPT}, {"prompt": "a castle"}]) == expected
    assert loaded.predict(pd.DataFrame({"prompt": [PROMPT]})) == expected[:1]
    assert len(loaded.predict(frame, params={"num_images": 2})) == 4, "as many as a request may be of"
    assert ask(client, {"inputs": {"prompt": [PROMPT, "a castle"]}}) == (200, {"predictions": expected})
    with pytest.raises(mlflow.MlflowException, match="at least one prompt is needed") as refused:
        loaded.predict(frame[:0])
    assert refused.value.get_http_status_code() == 400
    empty = {"dataframe_split": {"columns": ["prompt"], "data": []}}
    for bad in (empty, {"dataframe_records": []}, {"inputs": {}}):
        assert ask(client, bad)[0] == 400, bad
    assert client.get("/health").status_code == 200


def test_versions_of_early_releases_have_another_name_for_the_steps(loaded: Any) -> None:
    frame = pd.DataFrame({"prompt": [PROMPT]})
    named = loaded.unwrap_python_model().predict(None, frame, {"steps": 2})
    assert named == loaded.predict(frame, params={"num_inference_steps": 2}) != loaded.predict(frame)


class Slow:
    """A pipeline that takes as long as its test wants, and writes down what it is given."""

    def __init__(self, pipeline: ImageRAGTurboPipeline) -> None:
        self.pipeline, self.batches, self.go = pipeline, list[list[str]](), threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self, prompts: list[str], **arguments: Any) -> Any:
        self.batches.append(prompts)
        self.begun.release()
        assert self.go.wait(60)
        return self.pipeline(prompts, **arguments)


def test_requests_that_wait_together_run_together(pipeline: ImageRAGTurboPipeline) -> None:
    slow = Slow(pipeline)
    waiting = Waiting(slow, WaitingConfig(batch_size=3))  # type: ignore[arg-type]
    asked = [("a", {"num_references": 1})] + [(name, {"num_references": 2}) for name in "bcde"]
    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(waiting.make, [("a", 0)], asked[0][1])]
        assert slow.begun.acquire(timeout=60)
        for number, (name, arguments) in enumerate(asked[1:], 1):
            futures.append(threads.submit(waiting.make, [(name, number)], arguments))
            while len(waiting._jobs) < number:
                pass
        bad = threads.submit(waiting.make, [("f" * 3_000, 0)], {"num_references": 2})
        while len(waiting._jobs) < len(asked):
            pass
        slow.go.set()
        made = [future.result() for future in futures]
        with pytest.raises(UserError, match="at most 2,000 characters"):
            bad.result()
    assert slow.batches[:3] == [["a"], ["b", "c", "d"], ["e", "f" * 3_000]]
    assert slow.batches[3:] == [["e"], ["f" * 3_000]], "one request's fault is not the others'"
    for (each,), (name, arguments), seed in zip(made, asked, range(5), strict=True):
        assert (each.prompt, each.seed) == (name, seed)
        (alone,) = Waiting(pipeline).make([(name, seed)], arguments)
        difference = np.abs(np.asarray(each.image, int) - np.asarray(alone.image, int))
        assert difference.max() <= 1
        assert [row.id for row in each.references] == [row.id for row in alone.references]


def test_clients_that_ask_again_and_again_share_their_batches(pipeline: ImageRAGTurboPipeline) -> None:
    slow = Slow(pipeline)
    waiting = Waiting(slow, WaitingConfig(batch_size=2, batch_wait_s=60))  # type: ignore[arg-type]

    def ask(prompts: str) -> None:
        for prompt in prompts:
            waiting.make([(prompt, 0)], {})

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, "abc")
        assert slow.begun.acquire(timeout=60)
        second = threads.submit(ask, "xy")
        while not waiting._jobs:
            pass
        slow.go.set()
        first.result(), second.result()
    assert [sorted(batch) for batch in slow.batches] == [["a"], ["b", "x"], ["c", "y"]]


def test_a_model_that_batches_makes_the_same_pictures_but_for_their_last_digits(
    champion: Home, pipeline: ImageRAGTurboPipeline, tmp_path: Path
) -> None:
    download(champion.settings, 1, tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"batch_size": 2})
    unet = model.unwrap_python_model()._waiting.pipeline.unet
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    ours = model.predict([{"prompt": PROMPT}, {"prompt": "a castle"}], params={"num_references": 2})
    for own, single in zip(ours, rows_of(pipeline, [PROMPT, "a castle"], num_references=2), strict=True):
        difference = np.abs(np.asarray(opened(own), int) - np.asarray(opened(single), int))
        assert difference.max() <= 1
        assert [row["id"] for row in own["references"]] == [row["id"] for row in single["references"]]


def test_who_would_wait_for_too_long_is_told_so(pipeline: ImageRAGTurboPipeline) -> None:
    slow = Slow(pipeline)
    waiting = Waiting(slow, WaitingConfig(max_waiting=2, max_wait_s=0.05))  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(waiting.make, [("a", 0), ("b", 1)], {})
        assert slow.begun.acquire(timeout=60)
        with pytest.raises(BusyError, match="1 pictures wait already, of at most 2"):
            waiting.make([("c", 0), ("d", 0)], {})
        with pytest.raises(BusyError, match=r"no picture was begun in 0\.05 s"):
            waiting.make([("c", 0)], {})
        model = ImageRAGTurboModel()
        model._waiting = waiting
        with pytest.raises(mlflow.MlflowException) as refused:
            model.predict(None, pd.DataFrame({"prompt": ["c", "d"]}))
        slow.go.set()
        assert len(first.result()) == 2
    assert "of at most 2: ask again later" in str(refused.value)
    assert refused.value.get_http_status_code() == 429
    assert slow.batches == [["a"], ["b"]], "nobody waits for c any more"


def test_a_portable_model_needs_no_store(home: Home, tmp_path: Path) -> None:
    register(home.finetuned("first"), home.settings)
    register(home.finetuned("first"), home.settings, portable=True)
    expected = rows_of(package.load(download(home.settings, 1, tmp_path / "model")), [PROMPT], **PARAMS)
    shutil.rmtree(home.settings.index_uri)
    assert rows_of(package.load(download(home.settings, 2, tmp_path / "other")), [PROMPT], **PARAMS) == expected
    pull(home.settings, "2", tmp_path / "pulled")
    shutil.move(tmp_path / "pulled", tmp_path / "moved")
    pulled = ImageRAGTurboPipeline.from_pretrained(tmp_path / "moved")
    assert rows_of(pulled, [PROMPT], **PARAMS) == expected
    with pytest.raises(UserError, match="is not to be had: there is no such table"):
        pull(home.settings, "1", tmp_path / "more")


def test_a_version_states_its_dtype(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("imagerag.base.model.default_dtype", lambda _: "bf16")  # as on another machine
        register(home.finetuned("first"), home.settings)
    folder = download(home.settings, 1, tmp_path / "model")
    pull(home.settings, "1", tmp_path / "pulled")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model")).unwrap_python_model()._waiting.pipeline
    ways = [package.load(folder), served, ImageRAGTurboPipeline.from_pretrained(tmp_path / "pulled")]
    assert [each.unet.dtype for each in ways] == [torch.bfloat16] * 3
    first, *others = (rows_of(each, [PROMPT], **PARAMS) for each in ways)
    assert others == [first, first]
    chosen = {"dtype": "fp32", "device": "cpu"}
    served = (
        mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=chosen).unwrap_python_model()._waiting.pipeline
    )
    assert served.unet.dtype == torch.float32


FRESH = """
import base64, io, json, sys, mlflow, torch
prompt, params = json.loads(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/imagerag-turbo@champion")
rows = model.predict([{"prompt": prompt}], params=params)
from imagerag.generation.pipeline import ImageRAGTurboPipeline
pipeline, images = ImageRAGTurboPipeline.from_pretrained(sys.argv[2]), []
for seed in range(params["seed"], params["seed"] + params["num_images"]):
    generator, buffer = torch.Generator().manual_seed(seed), io.BytesIO()
    chosen = {"num_references": params["num_references"], "adapter_scale": params["scale"]}
    made = pipeline(prompt, generator=generator, **chosen)
    made.images[0].save(buffer, "PNG")
    images.append({"image": base64.b64encode(buffer.getvalue()).decode()})
print(json.dumps([rows, images]))
"""


@pytest.mark.engines
def test_all_ways_to_load_it_give_the_same_pictures(
    champion: Home, pipeline: ImageRAGTurboPipeline, tmp_path: Path
) -> None:
    expected = json.loads(json.dumps(rows_of(pipeline, [PROMPT], **PARAMS)))
    pull(champion.settings, "champion", tmp_path / "pulled")
    assert all((tmp_path / "pulled" / name).is_file() for name in ("README.md", "grid.png", "imagerag.json"))
    asked = json.dumps([PROMPT, PARAMS])
    with served(champion, tmp_path) as url:  # which takes its time to start
        of_pyfunc, of_folder = run(champion, tmp_path, FRESH, asked, str(tmp_path / "pulled"))
        assert of_pyfunc == expected
        assert pixels(of_folder) == pixels(expected)
        await_server(url, tmp_path / "serve.log")
        request = {"dataframe_records": [{"prompt": PROMPT}], "params": PARAMS}
        assert post(url, request) == (200, {"predictions": expected})
        status, answer = post(url, request | {"params": {"num_images": 0}})
        assert status == 400
        assert "num_images must be between 1 and 4; got 0" in answer["message"]


def environment(home: Home) -> dict[str, str]:
    """Of a process that knows MLflow and nothing else of the home."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("IMAGERAG_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    return own | {"MLFLOW_TRACKING_URI": tracking_uri(home.settings), "PATH": path}


def run(home: Home, folder: Path, script: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def served(home: Home, folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/imagerag-turbo@champion",
               "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    own = environment(home) | {"SERVING_MODEL_CONFIG": json.dumps({"max_images": 4})}
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=own, stdout=log, stderr=log)
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
            with urllib.request.urlopen(url.replace("/invocations", "/health"), timeout=10):
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
