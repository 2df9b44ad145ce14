"""What a cluster is made of, started on this machine: PostgreSQL, an S3 server, Prefect, MLflow and two Ray nodes.

Servers listen on loopback; Ray's own ports are open to other machines, which its token keeps out.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import boto3
import psutil
import psycopg2

from imagerag.processes import answers, free_port
from imagerag.services import prefect_environment
from imagerag.settings import Settings

BUCKET = "imagerag"
NODE_IPS = ("127.0.0.2", "127.0.0.3")
_INITDB = shutil.which("initdb") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
POSTGRES = None if _INITDB is None else Path(_INITDB).resolve().parent
"""Where PostgreSQL's programs are, if they are anywhere."""
_START_TIMEOUT_S = 180.0
_BIN = Path(sys.executable).parent
_FORWARD = """
import asyncio, contextlib, sys

async def pass_on(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()

async def serve(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer))

async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(main())
"""
"""Passes connections from one port on to another."""


@dataclass
class Process:
    """A process with all that it starts."""

    command: Sequence[str | Path]
    log: Path
    environment: Mapping[str, str]
    user: str | None = None

    def start(self) -> None:
        """Start it in the background; what it says is added to `log`."""
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(
                [str(word) for word in self.command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                cwd=self.log.parent,
                user=self.user,
                start_new_session=True,
            )

    def await_ready(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not is_ready():
            assert self.popen.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.3)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.popen.pid)
            for process in [*parent.children(recursive=True), parent]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.popen.wait()

    def quit(self) -> None:
        """Have it end at once, but for what only itself can clean up."""
        self.popen.send_signal(signal.SIGQUIT)
        self.popen.wait()


@dataclass
class Cluster:
    """What a machine has to be told of it, and what tests look into it with."""

    environment: dict[str, str]
    """Of the machines: addresses, and credentials."""
    database: str
    """PostgreSQL's URL, up to the name of a database."""
    secrets: list[str]
    """What must be seen nowhere."""
    folder: Path
    home: Path
    """Of the machine that runs the flows; Ray's nodes don't see what is in it."""
    disk: Path
    """A disk of 700 kB that all machines see."""
    logs: list[Path]
    """Folders of them."""
    jobs_address: str = ""
    """Of Ray's Jobs API."""
    processes: dict[str, Process] = field(default_factory=dict)
    """What can be lost: `node`, the second one of Ray, `s3`, the way to the store, and `prefect`."""

    def begin(self, name: str) -> None:
        """Start one of `processes`, and wait until it can be used."""
        process = self.processes[name]
        written = process.log.stat().st_size if process.log.exists() else 0
        process.start()
        ready: dict[str, Callable[[], bool]] = {
            "node": lambda: b"Ray runtime started" in process.log.read_bytes()[written:],
            "s3": lambda: answers(f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/"),
            "prefect": lambda: _is_healthy(f"{self.environment['IMAGERAG_PREFECT_API_URL']}/health"),
        }
        process.await_ready(ready[name])

    def query(self, database: str, statement: str) -> list[tuple[object, ...]]:
        with psycopg2.connect(f"postgresql://{self.database}/{database}") as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def objects(self, prefix: str) -> dict[str, datetime]:
        """When each object was written."""
        pages = boto3.client("s3", **_credentials(self.environment)).get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=prefix)
        return {entry["Key"]: entry["LastModified"] for page in found for entry in page.get("Contents", ())}

    def traces(self) -> Iterator[str]:
        """All that engines keep of what was run: their logs and databases."""
        for folder in self.logs:
            yield from (path.read_text(errors="replace") for path in folder.rglob("*") if _is_log(path))
        for name in ("prefect", "mlflow"):
            dump = [POSTGRES / "pg_dump", f"postgresql://{self.database}/{name}"]
            yield subprocess.run(dump, check=True, capture_output=True, text=True).stdout


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start everything, and end it."""
    with ExitStack() as stack:
        # What a local Ray was told in this process is not for these.
        here = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-")))  # their paths have to be short
        names, ports = ("postgres", "moto", "s3", "prefect", "mlflow", "ray", "client", "jobs"), set[int]()
        while len(ports) < len(names):  # a port that was found free may be found again
            ports.add(free_port())
        port = dict(zip(names, ports, strict=True))
        database_password, auth_string = secrets.token_hex(16), f"imagerag:{secrets.token_hex(16)}"
        machine = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port['s3']}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_DEFAULT_REGION": "us-east-1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PREFECT_API_AUTH_STRING": auth_string,
        }
        (folder / "token").write_text(token := secrets.token_hex(32))
        (folder / "prefect").mkdir()
        home, disk = folder / "home", folder / "disk"
        home.mkdir(0o700)
        disk.mkdir()
        # Before the nodes start, which do not see what is mounted later.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", disk], check=True)

        def run(name: str, *command: str | Path, user: str | None = None, **environment: str) -> Process:
            process = Process(command, folder / f"{name}.log", here | environment, user)
            process.start()
            stack.callback(process.kill)
            return process

        # What moto keeps is in its memory: a store that can't be reached is one whose way is closed.
        moto = run("moto", _BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port["moto"]))
        way = run("s3", sys.executable, "-c", _FORWARD, str(port["s3"]), str(port["moto"]))
        postgres = _start_postgres(stack, run, port["postgres"], database_password)
        made = Cluster(
            environment=machine,
            database=f"imagerag:{database_password}@127.0.0.1:{port['postgres']}",
            secrets=[database_password, auth_string, token, machine["AWS_SECRET_ACCESS_KEY"]],
            folder=folder,
            home=home,
            disk=disk,
            logs=[folder, sockets],
        )
        head = run(
            "ray-head", *_ray(0, home), "--head", f"--port={port['ray']}", f"--ray-client-server-port={port['client']}",
            f"--temp-dir={sockets}", f"--dashboard-port={port['jobs']}", "--disable-usage-stats", **machine,
        )  # fmt: skip
        postgres.await_ready(lambda: _accepts(made))
        _create_databases(made)
        prefect_url, mlflow_url = f"http://127.0.0.1:{port['prefect']}", f"http://127.0.0.1:{port['mlflow']}"
        prefect = run(
            "prefect", sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
            "--port", str(port["prefect"]),
            PREFECT_API_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{made.database}/prefect",
            PREFECT_SERVER_API_AUTH_STRING=auth_string,
            **prefect_environment(Settings(home=folder, prefect_api_url=f"{prefect_url}/api"), f"{prefect_url}/api"),
        )  # fmt: skip
        moto.await_ready(lambda: answers(f"http://127.0.0.1:{port['s3']}/moto-api/"))
        boto3.client("s3", **_credentials(machine)).create_bucket(Bucket=BUCKET)
        mlflow = run(
            "mlflow", sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port["mlflow"]),
            "--workers", "1", "--backend-store-uri", f"postgresql+psycopg2://{made.database}/mlflow",
            "--artifacts-destination", f"s3://{BUCKET}/mlflow",
            MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            PATH=f"{_BIN}{os.pathsep}{here['PATH']}", **machine,
        )  # fmt: skip
        head.await_ready(lambda: b"Next steps" in head.log.read_bytes())
        node = run("ray-node", *_ray(1, home), f"--address={NODE_IPS[0]}:{port['ray']}", **machine)
        node.await_ready(lambda: b"Ray runtime started" in node.log.read_bytes())
        prefect.await_ready(lambda: _is_healthy(f"{prefect_url}/api/health"))
        mlflow.await_ready(lambda: answers(f"{mlflow_url}/health"))
        made.processes |= {"node": node, "s3": way, "prefect": prefect}
        made.environment |= {
            "IMAGERAG_SHARDS_URI": f"s3://{BUCKET}/shards",
            "IMAGERAG_INDEX_URI": f"s3://{BUCKET}/index",
            "IMAGERAG_TRAINING_URI": f"s3://{BUCKET}/training",
            "IMAGERAG_RAY_ADDRESS": f"{NODE_IPS[0]}:{port['ray']}",
            "IMAGERAG_MLFLOW_TRACKING_URI": mlflow_url,
            "IMAGERAG_PREFECT_API_URL": f"{prefect_url}/api",
        }
        made.jobs_address = f"http://127.0.0.1:{port['jobs']}"
        yield made


def _ray(number: int, home: Path) -> list[str | Path]:
    """The command of a node for which `home` is an empty folder of its own, as on another machine."""
    memory = f"--object-store-memory={200 * 2**20}"
    agent = f"--dashboard-agent-listen-port={free_port()}"  # by default the same on every machine
    apart = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', home]
    start = [_BIN / "ray", "start", "--block", f"--node-ip-address={NODE_IPS[number]}", "--num-cpus=1"]
    return [*apart, *start, memory, agent]


def _start_postgres(stack: ExitStack, run: Callable[..., Process], port: int, password: str) -> Process:
    assert POSTGRES is not None
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL does not run as root
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagerag-")))
    (home / "password").write_text(password)
    if user is not None:
        for path in (home, home / "password"):
            shutil.chown(path, user)
    subprocess.run(
        [
            POSTGRES / "initdb", "-D", home / "data", "-U", "imagerag", "--auth", "scram-sha-256",
            "--pwfile", home / "password", "--encoding", "UTF8", "--locale", "C", "--no-sync",
        ],
        check=True, capture_output=True, user=user, cwd=home,
    )  # fmt: skip
    process = run(
        "postgres", POSTGRES / "postgres", "-D", home / "data", "-h", "127.0.0.1", "-p", str(port), "-k", home, "-F",
        user=user,
    )  # fmt: skip
    stack.callback(process.quit)
    return process


def _accepts(made: Cluster) -> bool:
    try:
        return made.query("postgres", "SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False


def _create_databases(made: Cluster) -> None:
    connection = psycopg2.connect(f"postgresql://{made.database}/postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        for name in ("prefect", "mlflow"):
            cursor.execute(f"CREATE DATABASE {name}")
    connection.close()


def _credentials(machine: Mapping[str, str]) -> dict[str, str]:
    return {
        "aws_access_key_id": machine["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": machine["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": machine["AWS_ENDPOINT_URL"],
        "region_name": machine["AWS_DEFAULT_REGION"],
    }


def _is_log(path: Path) -> bool:
    return path.is_file() and path.suffix in (".log", ".out", ".err", ".txt", ".json")


def _is_healthy(url: str) -> bool:
    """Whether a server answers, if only that it needs credentials."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
