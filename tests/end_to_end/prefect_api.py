"""Requests to the Prefect server of a home, as its UI makes them: with the password, and a CSRF token for changes."""

import base64
import json
import urllib.request
from pathlib import Path
from typing import Any

from imagerag import credentials

_CLIENT = "tests"


def call(url: str, home: Path, method: str, path: str, body: object = None) -> Any:
    """Return what the API below `url` answers, or None where it answers nothing."""
    csrf = {}
    if method != "GET":
        token = call(url, home, "GET", f"/csrf-token?client={_CLIENT}")["token"]
        csrf = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": _CLIENT}
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": basic(home)} | csrf
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", data, headers, method=method)) as response:
        text = response.read()
    return json.loads(text) if text else None


def basic(home: Path) -> str:
    """Return the header `Authorization` that the servers of `home` ask for."""
    return "Basic " + base64.b64encode(f"{credentials.USER}:{credentials.password(home)}".encode()).decode()
