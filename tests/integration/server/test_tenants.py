"""Tenants by principal: nobody finds, reads, clears or counts another's blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.integration.server.harness import (
    acquire,
    attached,
    in_loop,
    in_thread,
    key,
    payload,
    put,
    read,
    refused,
    register,
    remote_session,
    serving,
    stub_for,
    tcp_target,
    unix_target,
)


@in_loop
async def test_a_tenant_does_not_see_another_ones_blocks(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, tenants__tcp="bob", tenants__default="alice") as app,
        stub_for(unix_target(app)) as alice,
        stub_for(tcp_target(app)) as bob,
        attached(app) as (_, answer, hers),
        remote_session(bob) as his,
    ):
        assert answer["tenant"] == "alice"
        layout_id = await register(alice)
        chain = pb.Chain(layout_ids=[layout_id], keys=[key(1)])
        lookup = pb.LookupRequest(chains=[chain])
        assert (await refused(bob.Lookup(lookup)))[0] == "UNKNOWN_LAYOUT"
        assert await register(bob) == layout_id
        await put(alice, hers, layout_id, 1)
        assert (await bob.Lookup(lookup)).chains[0].held == 0
        assert (await acquire(bob, his, layout_id, 1)).held == 0
        assert (await bob.GetStats(pb.GetStatsRequest())).tenant_blocks == 0
        assert (await bob.Clear(pb.ClearRequest())).blocks == 0
        # The same key may hold other bytes for each.
        await put(bob, his, layout_id, 1)
        lease = await acquire(alice, hers, layout_id, 1)
        assert await read(alice, hers, lease.lease_id) == payload(1)
        assert (await alice.GetStats(pb.GetStatsRequest())).tenant_blocks == 1


@in_loop
async def test_callers_over_tcp_can_be_refused_altogether(tmp_path: Path) -> None:
    async with serving(tmp_path, tenants__tcp="") as app, stub_for(tcp_target(app)) as stub:
        for call in (
            stub.GetServerInfo(pb.GetServerInfoRequest()),
            stub.GetStats(pb.GetStatsRequest()),
            stub.OpenSession(pb.OpenSessionRequest()).read(),
            register(stub),
        ):
            assert (await refused(call))[0] == "NO_TENANT"


ATTACH_AS = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect(sys.argv[1])
peer.send(b'{"op":"attach","protocol":1}')
print(peer.recv(4096).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@in_loop
async def test_the_kernels_word_on_the_user_decides_the_tenant() -> None:
    def attach_as(uid: int, path: Path) -> str:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", ATTACH_AS, str(path), str(uid)],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
        document = json.loads(answer.stdout)
        return str(document.get("tenant") or document["code"])

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        flags = {"server__socket_mode": "0666", "tenants__default": ""}
        uids = "1001=alice,1002=bob"
        async with serving(Path(directory), tenants__uids=uids, **flags) as app:
            path = app.config.attach_path
            assert await in_thread(attach_as, 1001, path) == "alice"
            assert await in_thread(attach_as, 1002, path) == "bob"
            assert await in_thread(attach_as, 1003, path) == "NO_TENANT"
            # On a socket open to all, a call without a session is nobody's.
            async with stub_for(unix_target(app)) as stub:
                assert (await refused(register(stub)))[0] == "NO_TENANT"
                assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).attach_path
