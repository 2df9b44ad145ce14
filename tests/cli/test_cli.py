"""The command line, run as a user runs it."""

import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import version
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


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"IMAGERAG_HOME": "/proc/home"}, 2, "error: the home /proc/home can't be made: No such file or directory"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, 0, "IMAGERAG_HOME"),
        ({"HOME": None}, 0, "IMAGERAG_HOME"),
    ],
)
def test_an_odd_environment_works_or_is_told_of_in_a_sentence(
    tmp_path: Path, changes: dict[str, str | None], code: int, said: str
) -> None:
    environment = os.environ | {"IMAGERAG_HOME": str(tmp_path / "Zuhause für Bilder")} | changes
    command = ["settings"] if code == 0 else ["ingest", "urls.csv"]
    result = subprocess.run(
        [sys.executable, "-m", "imagerag.cli", *command],
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        timeout=120,
    )
    output = (result.stdout + result.stderr).decode(errors="replace")
    assert result.returncode == code, output
    assert said in output
    assert "Traceback" not in output


def test_a_file_that_cant_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise PermissionError(errno.EROFS, "Read-only file system", "/data/home/x")

    monkeypatch.setattr("imagerag.cli.app", app)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capfd.readouterr().err == "error: /data/home/x: Read-only file system\n"


def test_the_doctor_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    result = _imagerag(tmp_path / "home", "doctor")
    assert result.returncode == 1, "a home without an index is something to see to"
    assert "384 dimensions" in result.stdout
    assert "make demo" in result.stdout
    assert ("built for CUDA" in " ".join(result.stdout.split())) == (
        version("torch").endswith("+cpu") and not version("torchvision").endswith("+cpu")
    )


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
