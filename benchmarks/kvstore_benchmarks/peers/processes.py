"""Servers that a peer needs beside it, for as long as the child lives."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05


def start(stack: ExitStack, command: Sequence[str], *, port: int) -> None:
    """Start a process that ends with the stack, and wait until it listens on `port`.

    Raises `RuntimeError` where it ends instead, or takes too long.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    stack.callback(_stop, process)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _listens(port):
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{command[0]} does not listen after {START_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
