"""The command line, run as a user runs it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from imagerag.cli import main


def _imagerag(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "imagerag.cli", *arguments],
        env=os.environ | {"IMAGERAG_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["ingest", "urls.csv", "--encoder", "no such encoder"], "an encoder is `tiny`"),
        (["ingest", "urls.csv", "--name", "../up"], "1 to 63 characters"),
        (["ingest", "urls.csv", "--parameters", "missing.json"], "--parameters has to be a readable JSON file"),
        (
            ["ingest", "no folder"],
            "there is no folder no folder on this machine; a list is a file, or a folder or a glob of files, named",
        ),
        (["ingest", "urls.csv", "--captions", "captions.csv"], "captions (captions.csv) go with a folder of images"),
        (["search"], "give either a text or --image"),
        (["search", "a cat", "--image", "cat.png"], "give either a text or --image"),
        (["search", "a cat"], "there is no table 'images'"),
        (["index", "status", "--name", "Cats"], "1 to 63 characters"),
        (["index", "rollback"], "there is no table 'images'"),
        (["index", "remove", "--yes"], "name at least one"),
    ],
)
def test_the_users_mistake_is_one_line_and_starts_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    rule: str,
) -> None:
    """In this process: starting others takes seconds each, and the next tests do."""
    monkeypatch.setattr(sys, "argv", ["imagerag", *arguments])
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert rule in line
    assert not {path.name for path in (tmp_path / "home").glob("*")} - {"prefect", "password"}, "Prefect needs these"


def test_a_parameter_out_of_bounds_is_named_with_its_value(tmp_path: Path) -> None:
    parameters = tmp_path / "parameters.json"
    parameters.write_text('{"download": {"retries": -1}, "publish": {"min_recal": 0.9}}')
    result = _imagerag(tmp_path / "home", "ingest", "urls.csv", "--parameters", str(parameters))
    assert result.returncode == 2
    assert "download.retries: Input should be greater than or equal to 0; got -1" in result.stderr
    assert "publish.min_recal: Extra inputs are not permitted; got 0.9" in result.stderr


def test_the_doctor_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    result = _imagerag(tmp_path / "home", "doctor")
    assert result.returncode == 1, "a home without an index is something to see to"
    assert "384 dimensions" in result.stdout
    assert "make demo" in result.stdout


def test_sample_serve_answers_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "imagerag.cli", "sample", "serve", "--limit", "3"]
    environment = os.environ | {"IMAGERAG_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}

    def heed_interrupts() -> None:
        """A shell's background jobs, and all that they start, ignore SIGINT otherwise."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(5)]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    url_list = pq.read_table(tmp_path / "sample" / "urls.parquet")
    assert lines[0].split()[1] in url_list["url"][0].as_py()
    assert f"imagerag ingest {tmp_path}/sample/urls.parquet" in lines[3]
