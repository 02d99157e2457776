"""Real servers for the tests: redis-server with the module, each with a port and a directory.

`FLORENCE_SERVER` names the binary (default: redis-server), `FLORENCE_SERVER_LIBS` a library
path for it, `FLORENCE_MODULE` the module (default: what `make build` makes).
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import florence_redis

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "models/tiny/samples"
SHAPES, SIGN = (SAMPLES / name for name in ("shapes.png", "sign.png"))
#: Of these two pictures.
SIZE = (360, 280)

_claims: list[socket.socket] = []


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, for as long as we live."""
    while True:
        port = random.randrange(10_000, 30_000)
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0florence-tests-{port}")
            with socket.create_server(("127.0.0.1", port)):
                pass
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port


def eventually(what: str, condition: Callable[[], Any]) -> Any:
    """Polls until the condition gives something; fails after a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            value = condition()
        except redis.RedisError:
            value = None
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"timed out: {what}")


class Server:
    """A running server; `settings` are lines of its configuration."""

    def __init__(self, *settings: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._directory = tempfile.TemporaryDirectory()
        directory = Path(self._directory.name)
        self._config, self._log = directory / "redis.conf", directory / "log"
        module = os.environ.get("FLORENCE_MODULE", ROOT / "target/release/libflorence.so")
        lines = (
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {directory}",
            'save ""',
            f"loadmodule {Path(module).resolve()}",
            "florence.allow-networks 127.0.0.0/8",
            *settings,
        )
        self._config.write_text("\n".join(lines))
        # Without retries: what the tests see is the server's doing.
        self.admin = redis.Redis(port=self.port, decode_responses=True, protocol=3, retry=None)
        self.start()

    def start(self) -> None:
        environment = dict(os.environ)
        if libraries := environment.get("FLORENCE_SERVER_LIBS"):
            environment["LD_LIBRARY_PATH"] = libraries
        binary = environment.get("FLORENCE_SERVER", "redis-server")
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [binary, self._config], env=environment, stdout=log, stderr=log
            )
        eventually("the model is ready", self._is_ready)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        model: Any = self.admin.execute_command("FLORENCE.MODEL")
        return bool(model["state"] == "ready")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop_for(self, seconds: float) -> None:
        """The process stands still, as one that is swapped out or being debugged."""
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

    def clients(self) -> list[dict[str, str]]:
        """The connections of others."""
        mine = self.admin.client_id()
        return [client for client in self.admin.client_list() if int(client["id"]) != mine]

    def close(self) -> None:
        self.admin.close()
        self.kill()
        self._directory.cleanup()


class Cluster:
    """Three masters."""

    def __init__(self) -> None:
        self.nodes = [
            Server(
                "cluster-enabled yes", "cluster-node-timeout 5000", f"cluster-port {free_port()}"
            )
            for _ in range(3)
        ]
        first = self.nodes[0]
        bus = first.admin.config_get("cluster-port")["cluster-port"]
        for i, node in enumerate(self.nodes):
            call = node.admin.execute_command
            call("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            call("CLUSTER", "ADDSLOTSRANGE", 16384 * i // 3, 16384 * (i + 1) // 3 - 1)
            if node is not first:
                call("CLUSTER", "MEET", "127.0.0.1", first.port, bus)
        for node in self.nodes:
            eventually("the cluster is whole", lambda node=node: self._is_whole(node))

    @staticmethod
    def _is_whole(node: Server) -> bool:
        info: Any = node.admin.execute_command("CLUSTER", "INFO")
        info = str(info)
        return "cluster_state:ok" in info and "cluster_known_nodes:3" in info

    def close(self) -> None:
        for node in self.nodes:
            node.close()


class Blocking:
    """An AsyncFlorence that is called like a Florence, so that both stand the same tests."""

    def __init__(self, florence: florence_redis.AsyncFlorence, loop: asyncio.AbstractEventLoop):
        self._florence, self._loop = florence, loop

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._florence, name)

        def blocking(*args: Any, **named: Any) -> Any:
            result = call(*args, **named)
            if inspect.isasyncgen(result):
                return self._items(result)
            return self._loop.run_until_complete(result)

        return blocking

    def _items(self, items: Any) -> Iterator[Any]:
        while True:
            try:
                yield self._loop.run_until_complete(items.__anext__())
            except StopAsyncIteration:
                return

    def close(self) -> None:
        self._loop.run_until_complete(self._florence.aclose())


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A server without data, that many tests use."""
    shared_server.admin.flushall()
    return shared_server


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that may be stopped and killed; what it accepted is on the disk."""
    server = Server("appendonly yes", "appendfsync always")
    yield server
    server.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


Connect = Callable[..., Any]


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of a URL, each test once with either kind."""
    clients: list[Any] = []
    loop = asyncio.new_event_loop()

    async def in_loop(url: str, settings: dict[str, Any]) -> florence_redis.AsyncFlorence:
        # Before Python 3.10 redis-py's clients belong to the loop in which they are made.
        return florence_redis.AsyncFlorence.from_url(url, **settings)

    def connect(url: str, **settings: Any) -> Any:
        if request.param == "blocking":
            client: Any = florence_redis.Florence.from_url(url, **settings)
        else:
            client = Blocking(loop.run_until_complete(in_loop(url, settings)), loop)
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.close()
    loop.close()


@pytest.fixture
def florence(connect: Connect, server: Server) -> Any:
    return connect(server.url)
