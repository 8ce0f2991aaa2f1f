"""Blocks for real servers that are mistreated: each is known by its number, and what a get
answers is compared with what was stored."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.types import LayoutSpec
from tests.integration.server.harness import PATIENCE_S, Daemon, daemon

SPEC = LayoutSpec("m", "bfloat16", 16, 40_000)
AT_ONCE = 40


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content(number: int) -> bytes:
    return random.Random(number).randbytes(64) * (SPEC.block_bytes // 64)


@contextmanager
def connected(directory: Path, *args: str) -> Iterator[tuple[Daemon, Client, Layout]]:
    """A server and a client of it. Left without an error, the server was asked to stop, and
    did, unless it had ended before."""
    with daemon(directory, *args) as server:
        server.wait_ready()
        with Client(str(server.socket_path), timeout_s=PATIENCE_S) as client:
            yield server, client, client.register_layout(SPEC)
        if server.process.poll() is None:
            server.process.terminate()
            assert server.process.wait(PATIENCE_S) == 0


def kill(server: Daemon) -> None:
    """At once. It leaves its state file as a crash would; nobody waits for that one."""
    server.process.kill()
    server.process.wait()
    Path(f"{server.socket_path}.json").unlink(missing_ok=True)


def store(client: Client, layout: Layout, numbers: range) -> None:
    for start in range(numbers.start, numbers.stop, AT_ONCE):
        part = range(start, min(start + AT_ONCE, numbers.stop))
        client.put_many(layout, [key(n) for n in part], [content(n) for n in part])


def ask(client: Client, layout: Layout, numbers: range) -> list[int]:
    """Which blocks are there; each as it was stored."""
    held = []
    for start in range(0, len(numbers), AT_ONCE):
        part = numbers[start : start + AT_ONCE]
        for number, got in zip(part, client.get_many(layout, [key(n) for n in part]), strict=True):
            if got is not None:
                assert bytes(got) == content(number)
                held.append(number)
    return held


def find_all(client: Client, layout: Layout, numbers: range) -> None:
    """All of them, each as it was stored. A drive that is slow for a moment costs misses."""
    deadline = time.monotonic() + PATIENCE_S
    while (held := ask(client, layout, numbers)) != list(numbers):
        assert time.monotonic() < deadline, f"only {held}"
        time.sleep(0.1)
