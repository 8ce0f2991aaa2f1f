"""The attach socket of a real server, spoken to without the client library."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import stat
from pathlib import Path

import pytest

import kvstore_server.attach
from kvstore.wire.columns import unpack_numbers
from kvstore_server.endpoint import GrpcEndpoint
from tests.integration.server.harness import (
    BLOCK_BYTES,
    MIB,
    RawAttachment,
    acquire,
    attached,
    commit,
    eventually,
    in_loop,
    in_thread,
    payload,
    put,
    register,
    remote_session,
    reserve,
    segment,
    serving,
    slot_ids,
    stub_for,
    tcp_target,
    unix_target,
)

ATTACH = {"op": "attach", "protocol": 2}


@in_loop
async def test_an_attached_client_reads_and_writes_the_blocks_themselves(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(unix_target(app)) as stub,
        attached(app) as (raw, answer, session),
    ):
        assert answer["tenant"] == "default"
        assert answer["extent_bytes"] == MIB
        assert bytes.fromhex(answer["epoch"]) == app.store.epoch
        layout_id = await register(stub, metadata=session)
        slots = await reserve(stub, session, layout_id, 1)
        extent, offset = divmod(unpack_numbers(slots.addresses)[0], MIB)
        mapped = await in_thread(raw.ask, {"op": "map", "extent": extent})
        assert mapped == {"op": "extent", "extent": extent, "bytes": MIB}
        with mmap.mmap(raw.fds[0], MIB) as memory:
            memory[offset : offset + BLOCK_BYTES] = payload(1)
            await commit(stub, session, layout_id, segment(slot_ids(slots), 1))
            lease = await acquire(stub, session, layout_id, 1)
            at = unpack_numbers(lease.addresses)[0] % MIB
            assert memory[at : at + BLOCK_BYTES] == payload(1)


@in_loop
async def test_both_sockets_are_for_the_owner_alone(tmp_path: Path) -> None:
    async with serving(tmp_path / "run" / "kvstore") as app:
        for path in (app.config.socket_path, app.config.attach_path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(app.config.socket_path.parent.stat().st_mode) == 0o700
    assert not app.config.socket_path.exists()
    assert not app.config.attach_path.exists()
    assert not app.config.state_path.exists()


@in_loop
async def test_the_end_of_the_connection_ends_the_session(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(unix_target(app)) as stub:
        async with attached(app) as (_, _, session):
            layout_id = await register(stub)
            await put(stub, session, layout_id, 1)
            await acquire(stub, session, layout_id, 1)
            await reserve(stub, session, layout_id, 1)
            stats = app.store.stats()
            assert (stats.sessions, stats.leases, stats.reservations) == (1, 1, 1)
        await eventually(lambda: app.store.stats().sessions == 0)
        stats = app.store.stats()
        assert (stats.leases, stats.reservations) == (0, 0)


@in_loop
@pytest.mark.parametrize(
    "message",
    [b"\xff", b"[]", b"{}", {"op": "what"}, {"op": "map", "extent": 0}, b"x" * 5000],
    ids=["not-utf8", "not-object", "empty", "unknown-op", "map-first", "too-large"],
)
async def test_nonsense_before_attaching_is_refused_and_ends_the_connection(
    tmp_path: Path, message: object
) -> None:
    async with serving(tmp_path) as app:
        raw = await in_thread(RawAttachment, app.config.attach_path)
        answer = await in_thread(raw.ask, message)
        assert (answer["op"], answer["code"]) == ("error", "BAD_REQUEST")
        assert await in_thread(raw.read) is None
        raw.close()
        assert app.store.stats().sessions == 0


@in_loop
async def test_another_protocol_version_is_told_both(tmp_path: Path) -> None:
    async with serving(tmp_path) as app:
        raw = await in_thread(RawAttachment, app.config.attach_path)
        answer = await in_thread(raw.ask, {"op": "attach", "protocol": 7, "new": True})
        assert answer["code"] == "BAD_REQUEST"
        assert "7" in answer["message"] and "2" in answer["message"]
        assert await in_thread(raw.read) is None
        raw.close()


@in_loop
async def test_an_error_after_attaching_leaves_the_session_open(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, attached(app) as (raw, _, _):
        for message in (b"{", {"op": "map", "extent": 5}, {"op": "map", "extent": -1}, ATTACH):
            answer = await in_thread(raw.ask, message)
            assert (answer["op"], answer["code"]) == ("error", "BAD_REQUEST")
        assert app.store.stats().sessions == 1
        assert raw.fds == []


@in_loop
async def test_an_extent_of_another_tenant_is_not_handed_out(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, tenants__tcp="other") as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        await put(stub, session, await register(stub), 1)
        lease = await acquire(stub, session, await register(stub), 1)
        extent = unpack_numbers(lease.addresses)[0] // MIB
        async with attached(app) as (raw, _, _):
            theirs = await in_thread(raw.ask, {"op": "map", "extent": extent})
            absent = await in_thread(raw.ask, {"op": "map", "extent": 1000})
            assert theirs["code"] == absent["code"] == "BAD_REQUEST"
            assert raw.fds == []


@in_loop
async def test_a_user_without_a_tenant_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, tenants__default="") as app:
        raw = await in_thread(RawAttachment, app.config.attach_path)
        answer = await in_thread(raw.ask, ATTACH)
        assert answer["code"] == "NO_TENANT"
        assert await in_thread(raw.read) is None
        raw.close()


@in_loop
async def test_one_session_too_many_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, server__max_sessions="1") as app, attached(app):
        raw = await in_thread(RawAttachment, app.config.attach_path)
        assert (await in_thread(raw.ask, ATTACH))["code"] == "TOO_MANY"
        raw.close()


@in_loop
async def test_a_client_that_does_not_read_is_disconnected_and_delays_nobody(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as app, attached(app) as (raw, _, _):
        raw.socket.setblocking(False)
        gone = False
        for _ in range(200_000):
            try:
                raw.socket.send(b'{"op":"map","extent":1}')
            except BlockingIOError:
                async with attached(app) as (_, answer, _):
                    assert answer["op"] == "attached"
            except OSError:
                gone = True
                break
        assert gone
        await eventually(lambda: app.store.stats().sessions == 0)


@in_loop
async def test_a_silent_connection_is_closed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore_server.attach, "ATTACH_TIMEOUT_S", 0.05)
    async with serving(tmp_path) as app:
        raw = await in_thread(RawAttachment, app.config.attach_path)
        assert await in_thread(raw.read) is None
        raw.close()


@in_loop
async def test_connections_beyond_the_limit_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_server.limits.SPARE_CONNECTIONS", 1)
    async with serving(tmp_path, server__max_sessions="1") as app:
        idle = [await in_thread(RawAttachment, app.config.attach_path) for _ in range(2)]
        third = await in_thread(RawAttachment, app.config.attach_path)
        assert (await in_thread(third.read))["code"] == "TOO_MANY"
        for raw in (*idle, third):
            raw.close()


@in_loop
async def test_descriptors_sent_by_a_client_are_not_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, attached(app) as (raw, _, _):
        mine = os.memfd_create("a client's")
        for _ in range(20):
            socket.send_fds(raw.socket, [b'{"op":"map","extent":1}'], [mine])
            await in_thread(raw.read)
        # By number, because the server of this very process opens and closes others.
        same = os.stat(mine)
        kept = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                kept += [name] * os.path.samestat(os.stat(f"/proc/self/fd/{name}"), same)
        os.close(mine)
        assert len(kept) == 1, "the client's own, and no other"


@in_loop
async def test_who_is_answered_over_grpc_finds_the_attach_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client that comes while the server starts would take it for one elsewhere."""
    answers = GrpcEndpoint.start

    async def start(endpoint: GrpcEndpoint) -> None:
        RawAttachment(tmp_path / "k.sock.attach").close()
        await answers(endpoint)

    monkeypatch.setattr(GrpcEndpoint, "start", start)
    async with serving(tmp_path) as app:
        assert app.config.attach_path == tmp_path / "k.sock.attach"
