"""A real server in a process of its own, and clients of every kind.

`AsyncClient` is driven through `Blocking`, so that one test body serves both.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.errors import Unavailable

MIB = 1 << 20


class Server:
    """`python -m kvstore_server`, to be killed, stopped and started again."""

    def __init__(self, directory: Path, *, nvme: bool = False) -> None:
        self.socket = str(directory / "s")
        self.arguments = ["--socket", self.socket, "--listen", "127.0.0.1:0", "--admin", ""]
        self.arguments += ["--dram-capacity", "64MiB", "--dram-extent", "8MiB"]
        self.arguments += ["--nvme-capacity", "256MiB" if nvme else "0"]
        self.arguments += ["--nvme-path", str(directory / "data")]
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.remote = ""

    def start(self, *extra: str) -> None:
        known_epoch = self._state().get("epoch")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore_server", *self.arguments, *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while self._state().get("epoch") in (None, known_epoch):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)
        self.remote = self._state()["listen"]

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(Path(f"{self.socket}.json").read_text())
        except (OSError, ValueError):
            return {}
        return state

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def terminate(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)
        self._process = None


class Blocking:
    """An `AsyncClient` (or `AsyncLease`) used like its synchronous twin."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Any) -> None:
        self._loop = loop
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not inspect.iscoroutinefunction(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._wait(value(*args, **kwargs))

        return call

    def __len__(self) -> int:
        return len(self._target)

    def __enter__(self) -> Blocking:
        self._wait(self._target.__aenter__())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._wait(self._target.__aexit__(*exc_info))

    def _wait(self, coroutine: Any) -> Any:
        result = asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)
        return Blocking(self._loop, result) if isinstance(result, kvstore.AsyncLease) else result


@pytest.fixture
def event_loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[Server]:
    """A server of this test's own, to be mistreated."""
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), nvme=True)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The server all gentle tests share, emptied for this one."""
    with kvstore.Client(shared_server.socket) as client:
        client.clear()
    yield shared_server


@pytest.fixture(params=["sync", "async"])
def driver(
    request: pytest.FixtureRequest, event_loop_thread: asyncio.AbstractEventLoop
) -> Callable[..., Any]:
    """Makes clients: `driver(endpoint, timeout_s=...)`."""
    if request.param == "sync":
        return kvstore.Client

    def make(endpoint: str, **kwargs: Any) -> Any:
        client = Blocking(event_loop_thread, kvstore.AsyncClient(endpoint, **kwargs))
        return client.__enter__()

    return make


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def connect(driver: Callable[..., Any], place: str) -> Iterator[Callable[..., Any]]:
    """`connect(server)` makes a client of the kind under test, closed at the end."""
    made: list[Any] = []

    def make(server: Server, **kwargs: Any) -> Any:
        client = driver(server.socket if place == "local" else server.remote, **kwargs)
        made.append(client)
        assert client.is_local == (place == "local")
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(connect: Callable[..., Any], server: Server) -> Any:
    return connect(server)


@pytest.fixture
def layout(client: Any) -> kvstore.Layout:
    return layout_of(client, 12_345)


def layout_of(client: Any, block_bytes: int) -> kvstore.Layout:
    spec = kvstore.LayoutSpec(model="m", dtype="bfloat16", block_tokens=16, block_bytes=block_bytes)
    made: kvstore.Layout = client.register_layout(spec)
    return made


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def block(number: int, nbytes: int) -> bytes:
    """Bytes that differ between any two blocks, also in their last piece."""
    piece = number.to_bytes(8, "big")
    return (piece * (nbytes // 8 + 1))[:nbytes]


def eventually(action: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The action's result, once it no longer raises `Unavailable`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def until_nothing_is_held(client: Any, seconds: float = 30.0) -> None:
    """A lease that a call needed is given back without waiting for it to be gone."""
    deadline = time.monotonic() + seconds
    while (held := client.stats()[3:5]) != (0, 0):
        assert time.monotonic() < deadline, f"(leases, reservations) are {held}"
        time.sleep(0.01)
