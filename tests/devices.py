"""The devices of tests that mean the same on each."""

import pytest

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
