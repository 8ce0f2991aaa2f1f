"""The attach socket, before anything is answered on it."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from kvstore_server.sockets import listen_seqpacket


def test_a_burst_of_connects_is_taken_without_a_server_that_accepts(tmp_path: Path) -> None:
    """As when all workers of a host start at once; a full backlog refuses at once."""
    path = tmp_path / "a"
    with ExitStack() as stack:
        stack.enter_context(listen_seqpacket(path, 0o600))
        for _ in range(200):
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            client.setblocking(False)
            client.connect(str(path))
