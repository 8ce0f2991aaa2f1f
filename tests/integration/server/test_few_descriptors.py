"""A server that may have few descriptors stays small, and lets clients and probes in."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

from kvstore import Client
from tests.integration.server.blocks import ask, connected, store
from tests.integration.server.harness import PATIENCE_S, http_get

ALLOWED = 80


def test_a_server_full_of_extents_lets_clients_and_probes_in(tmp_path: Path) -> None:
    sizes = ("--dram-capacity", "64MiB", "--nvme-capacity", "128MiB")
    numbers = range(1, 2001)
    with connected(tmp_path, *sizes) as (server, client, layout):
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (ALLOWED, ALLOWED))
        store(client, layout, numbers)
        client.flush()
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        assert len(list(descriptors.iterdir())) > ALLOWED // 2, "the limit was of consequence"
        for path in ("/livez", "/metrics"):
            port = int(server.state["admin"].rpartition(":")[2])
            assert asyncio.run(asyncio.wait_for(http_get(port, path), PATIENCE_S))[0] == 200
        with Client(str(server.socket_path)) as other:
            assert other.is_local
            assert all(tier.healthy for tier in other.stats().tiers)
        assert ask(client, layout, numbers)
