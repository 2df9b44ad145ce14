import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.fetch import fetch_shard
from imagerag.corpus.names import Names, ascii_host
from imagerag.corpus.shards import PLAN_SCHEMA, Shard
from imagerag.errors import UserError

ADDRESS = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))


class Resolver:
    """Knows some hosts; may be silent until it is let go."""

    def __init__(self, *known: str, silent: bool = False) -> None:
        self.asked: Counter[str] = Counter()
        self.go_on = threading.Event()
        self._known, self._silent = known, silent

    def __call__(self, host: str, *_: object, **__: object) -> list[Any]:
        self.asked[host] += 1
        if self._silent:
            self.go_on.wait(30)
        if host not in self._known:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return [ADDRESS]


def test_looking_up_takes_no_longer_than_it_may() -> None:
    resolver = Resolver("a.example", silent=True)
    names = Names(resolver)
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(socket.gaierror, match=r"no answer within 0\.1 s"):
            names.look_up("a.example", 80, 0.1)
    assert time.monotonic() - started < 5
    assert resolver.asked == {"a.example": 1}, "the one that hangs is waited for, not asked again"
    resolver.go_on.set()
    assert names.look_up("a.example", 80, 5) == [ADDRESS]


def test_an_answer_is_used_again_and_a_failure_is_not() -> None:
    resolver = Resolver("a.example")
    names = Names(resolver)
    for _ in range(3):
        assert names.look_up("a.example", 80, 5) == [ADDRESS]
        with pytest.raises(socket.gaierror, match="not known"):
            names.look_up("b.example", 80, 5)
    assert resolver.asked == {"a.example": 1, "b.example": 3}


@pytest.mark.parametrize(
    ("hosts", "known"),
    [([], ()), (["a.example", "b.example"], ("b.example",)), (["a.example"], ("a.root-servers.net",))],
    ids=["none needed", "one of them", "none of them, but another"],
)
def test_a_machine_that_can_look_up_some_name_can(hosts: list[str], known: tuple[str, ...]) -> None:
    Names(Resolver(*known)).require(hosts, 5)


def test_a_machine_without_dns_ends_with_one_line_and_nothing_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver()
    monkeypatch.setattr("imagerag.corpus.fetch.Names", lambda: Names(resolver))
    rows = [{"url": f"http://host{number}.example/x.jpg", "caption": "c", "source": "s"} for number in range(500)]
    with pytest.raises(UserError, match=r"can look up no names \(host0\.example, .*next run goes on"):
        fetch_shard(Shard(str(tmp_path), 0), pa.Table.from_pylist(rows, PLAN_SCHEMA), DownloadConfig())
    assert sum(resolver.asked.values()) < 20
    assert not Shard(str(tmp_path), 0).is_finished()


@pytest.mark.parametrize(
    ("host", "ascii_form"),
    [
        ("a.example", "a.example"),
        ("my_site.example", "my_site.example"),
        ("Bücher.example", "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("b%C3%BCcher.example", "xn--bcher-kva.example"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("☃.example", "xn--n3h.example"),
    ],
)
def test_hosts_are_written_as_browsers_write_them(host: str, ascii_form: str) -> None:
    assert ascii_host(host) == ascii_form


@pytest.mark.parametrize("host", ["a%2Fb.example", "a%40b.example", "a%00.example", "%FF.example", "a%20b.example"])
def test_hosts_that_there_can_not_be(host: str) -> None:
    with pytest.raises(ValueError, match="no host can be named"):
        ascii_host(host)
