"""Requests to the Prefect server of a home, as its UI makes them: with the password, and a CSRF token for changes."""

import base64
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from imagerag import credentials

_CLIENT = "tests"
_ATTEMPTS = 10


def call(url: str, home: Path, method: str, path: str, body: object = None) -> Any:
    """Return what the API below `url` answers, or None where it answers nothing."""
    csrf = {}
    if method != "GET":
        token = call(url, home, "GET", f"/csrf-token?client={_CLIENT}")["token"]
        csrf = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": _CLIENT}
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": basic(home)} | csrf
    request = urllib.request.Request(f"{url}{path}", data, headers, method=method)
    for left in reversed(range(_ATTEMPTS)):
        try:
            with urllib.request.urlopen(request) as response:
                text = response.read()
                break
        except urllib.error.HTTPError as error:
            if (
                error.code != 503 or not left
            ):  # which Prefect answers while its database is busy, and its client retries
                raise
            time.sleep(1)
    return json.loads(text) if text else None


def basic(home: Path) -> str:
    """Return the header `Authorization` that the servers of `home` ask for."""
    return "Basic " + base64.b64encode(f"{credentials.USER}:{credentials.password(home)}".encode()).decode()
