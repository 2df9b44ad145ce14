"""What `from imagerag import …` gives."""

import doctest
import subprocess
import sys

import pytest

import imagerag


@pytest.mark.parametrize("name", imagerag.__all__)
def test_what_is_public_is_there(name: str) -> None:
    assert getattr(imagerag, name).__name__ == name
    assert name in dir(imagerag)


def test_what_is_not_is_an_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Pipeline' from 'imagerag'"):
        from imagerag import Pipeline  # type: ignore[attr-defined]  # noqa: F401


def test_the_examples_run() -> None:
    done = doctest.testmod(imagerag)
    assert done.attempted > 5
    assert done.failed == 0


def test_importing_it_imports_nothing_heavy() -> None:
    script = "import sys, imagerag; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "diffusers", "transformers", "lancedb"} & set(loaded) == set()
