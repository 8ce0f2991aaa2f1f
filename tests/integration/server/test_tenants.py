"""Tenants by principal: nobody finds, reads, clears or counts another's blocks."""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import kvstore
from kvstore.wire.columns import unpack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.integration.server.harness import (
    BLOCK_BYTES,
    MIB,
    PATIENCE_S,
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
    reserve,
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
        chain = pb.Chain(layout_ids=[layout_id], keys=key(1))
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


def try_to_write(fd: int, nbytes: int) -> list[str]:
    """The ways that worked to change a file of which only the descriptor is known."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    readable, both = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
    shown = libc.mmap(None, nbytes, readable, mmap.MAP_SHARED, fd, 0)
    keep_size_punch_hole = 3

    def failed(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), "refused")

    def reopen() -> None:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            os.pwrite(again, b"garbage", 4096)
        finally:
            os.close(again)

    ways: dict[str, Callable[[], object]] = {
        "write": lambda: os.pwrite(fd, b"garbage", 4096),
        "map": lambda: mmap.mmap(fd, nbytes),
        "protect": lambda: failed(libc.mprotect(shown, nbytes, both)),
        "punch": lambda: failed(libc.fallocate(fd, keep_size_punch_hole, 0, nbytes)),
        "shrink": lambda: os.ftruncate(fd, 0),
        "grow": lambda: os.ftruncate(fd, 2 * nbytes),
        "seal": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        "reopen": reopen,
    }
    worked = []
    for name, way in ways.items():
        try:
            way()
            worked.append(name)
        except OSError:
            pass
    return worked


@in_loop
async def test_garbage_over_all_that_a_client_can_map_harms_no_other_tenant(
    tmp_path: Path,
) -> None:
    """And what it damages of its own tenant's is a miss, counted."""
    numbers = range(12)
    async with (
        serving(
            tmp_path, tenants__tcp="bob", tenants__default="alice", nvme__capacity="64MiB"
        ) as app,
        stub_for(unix_target(app)) as stub,
        stub_for(tcp_target(app)) as bob,
        remote_session(bob) as his,
        attached(app) as (vandal, _, session),
    ):
        layout_id = await register(stub)
        assert await register(bob) == layout_id
        await put(bob, his, layout_id, *numbers)
        await put(stub, session, layout_id, *numbers)
        slots = await reserve(stub, session, layout_id, 30)
        lease = await acquire(stub, session, layout_id, *numbers)
        assert (await in_thread(vandal.ask, {"op": "directory"}))["op"] == "directory"
        directory = vandal.fds[-1]

        addresses = unpack_numbers(lease.addresses + slots.addresses)
        extents = {address // MIB for address in addresses}
        mapped = set()
        # Those of the others are near: numbers are given one after the other.
        for extent in range(min(extents) - 8, max(extents) + 8):
            answer = await in_thread(vandal.ask, {"op": "map", "extent": extent})
            if answer["op"] == "extent":
                mapped.add(extent)
                with mmap.mmap(vandal.fds[-1], MIB) as memory:
                    memory[:] = os.urandom(MIB)
                assert not {"shrink", "grow", "seal"}.intersection(
                    try_to_write(vandal.fds[-1], MIB)
                )
        assert mapped == extents
        nbytes = os.fstat(directory).st_size
        assert try_to_write(directory, nbytes) == []

        theirs = await acquire(bob, his, layout_id, *numbers)
        assert await read(bob, his, theirs.lease_id) == b"".join(map(payload, numbers))

        def look_at_ones_own() -> None:
            keys = [key(n) for n in numbers]
            datas = [payload(n) for n in numbers]
            with kvstore.Client(str(app.config.socket_path), timeout_s=PATIENCE_S) as alice:
                spec = kvstore.LayoutSpec("m", "bfloat16", 16, BLOCK_BYTES)
                layout = alice.register_layout(spec)
                assert alice.lookup(layout, keys) == (12, 12), "the directory is as it was"
                assert alice.get_many(layout, keys) == [None] * 12
                assert alice.counters.corrupt == 12
                # It does not become true on its way through the other tier either.
                alice.flush(drop=True)
                assert alice.get_many(layout, keys) == [None] * 12
                # And nothing is in the way of what comes next.
                alice.clear()
                assert set(alice.put_many(layout, keys, datas)) == {kvstore.PutOutcome.STORED}
                assert alice.get_many(layout, keys) == datas

        await stub.Release(pb.ReleaseRequest(lease_ids=[lease.lease_id]), metadata=session)
        await in_thread(look_at_ones_own)
        assert await read(bob, his, theirs.lease_id) == b"".join(map(payload, numbers))


ATTACH_AS = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect(sys.argv[1])
peer.send(b'{"op":"attach","protocol":2}')
print(peer.recv(4096).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@in_loop
async def test_the_kernels_word_on_the_user_decides_the_tenant() -> None:
    def attach_as(uid: int, path: Path) -> str:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", ATTACH_AS, str(path), str(uid)],
            capture_output=True, text=True, check=True, timeout=PATIENCE_S,
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
