"""Streams that nobody goes on with cost their own places, and nobody else's."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from kvstore import AsyncClient, Client, LayoutSpec
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server import limits
from kvstore_server.app import App
from kvstore_server.service import KVStoreService
from tests.integration.server.harness import (
    BLOCK_BYTES,
    HANGS_S,
    MIB,
    PATIENCE_S,
    Metadata,
    acquire,
    commit,
    eventually,
    http_get,
    in_loop,
    in_thread,
    key,
    payload,
    read,
    refused,
    register,
    remote_session,
    reserve,
    segment,
    serving,
    slot_ids,
    small_config,
    stub_for,
    tcp_target,
)

TOO_MANY = ("TOO_MANY", grpc.StatusCode.RESOURCE_EXHAUSTED)
BIG = pb.Layout(model="big", dtype="u8", block_tokens=1, block_bytes=MIB)
SPEC = LayoutSpec(model="m", dtype="bfloat16", block_tokens=16, block_bytes=BLOCK_BYTES)


async def lease_of_a_big_block(stub: Any, session: Metadata) -> int:
    layout_id = await register(stub, BIG)
    (slot,) = slot_ids(await reserve(stub, session, layout_id, 1))
    message = pb.WriteRequest(slot=slot, data=payload(1, MIB))
    await stub.Write(iter([message]), metadata=session)
    await commit(stub, session, layout_id, segment([slot], 1, checksums=[1]))
    lease_id: int = (await acquire(stub, session, layout_id, 1)).lease_id
    return lease_id


async def unread(stub: Any, session: Metadata, lease_id: int) -> Any:
    """A Read of more than a client takes before anybody asks for it."""
    request = pb.ReadRequest(lease_id=lease_id, indices=[0] * 64)
    stream = stub.Read(request, metadata=session)
    await stream.read()
    return stream


async def silent() -> Any:
    await asyncio.Event().wait()
    yield pb.WriteRequest()


@in_loop
async def test_what_a_session_leaves_unread_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SESSION_STREAMS", 3)
    monkeypatch.setattr(limits, "MAX_STREAMS", 4)
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
        remote_session(stub) as other,
    ):
        lease_id = await lease_of_a_big_block(stub, session)
        streams = [await unread(stub, session, lease_id) for _ in range(3)]
        assert await refused(read(stub, session, lease_id, 0)) == TOO_MANY
        # Others have places still, until there are none.
        theirs = await lease_of_a_big_block(stub, other)
        streams.append(await unread(stub, other, theirs))
        assert await refused(read(stub, other, theirs, 0)) == TOO_MANY
        assert app.admin_port is not None
        _, metrics = await http_get(app.admin_port, "/metrics")
        assert 'kvstore_rejected_total{reason="TOO_MANY"} 2.0' in metrics
        for stream in streams:
            stream.cancel()
        await eventually(lambda: not app.busy())
        assert len(await read(stub, session, lease_id, 0)) == MIB


@in_loop
async def test_a_stop_does_not_wait_for_streams_nobody_goes_on_with(tmp_path: Path) -> None:
    app = App(small_config(tmp_path, server__drain_s=str(HANGS_S)))
    await app.start()
    async with stub_for(tcp_target(app)) as stub, remote_session(stub) as session:
        lease_id = await lease_of_a_big_block(stub, session)
        await unread(stub, session, lease_id)
        writing = asyncio.ensure_future(refused(stub.Write(silent(), metadata=session)))
        async with asyncio.timeout(PATIENCE_S):
            await app.stop()
        assert (await writing)[1] is grpc.StatusCode.UNAVAILABLE


@in_loop
async def test_streams_of_watchers_and_writers_take_no_places_of_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SESSION_STREAMS", 4)
    monkeypatch.setattr(limits, "MAX_STREAMS", 8)
    monkeypatch.setattr(limits, "WATCHES", 4)
    monkeypatch.setattr(limits, "SPARE_CALLS", 8)
    async with (
        serving(tmp_path, server__max_sessions="4") as app,
        stub_for(tcp_target(app)) as stub,
        grpc.aio.insecure_channel(tcp_target(app)) as channel,
        remote_session(stub) as session,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = health_pb2.HealthCheckRequest(service="")
        watching = [health.Watch(question) for _ in range(3)]
        for watch in watching:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        describing = reflection.ServerReflectionInfo()
        await describing.wait_for_connection()
        for _ in range(24):
            assert await refused(health.Watch(question).read()) == TOO_MANY
            assert await refused(reflection.ServerReflectionInfo().read()) == TOO_MANY
        writing = [stub.Write(silent(), metadata=session) for _ in range(4)]
        await eventually(lambda: len(app._service._streams._open) == 4)
        for _ in range(24):
            assert await refused(stub.Write(silent(), metadata=session)) == TOO_MANY
        await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (await health.Check(question)).status == health_pb2.HealthCheckResponse.SERVING
        for call in (*watching, describing, *writing):
            call.cancel()


@in_loop
async def test_a_client_of_many_threads_or_tasks_waits_for_its_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SESSION_STREAMS", 16)
    send = KVStoreService._send_block

    async def slowly(*args: Any) -> None:
        await asyncio.sleep(0.02)
        await send(*args)

    monkeypatch.setattr(KVStoreService, "_send_block", slowly)
    blocks = {key(number): payload(number) for number in range(1, 65)}
    async with serving(tmp_path) as app:
        async with AsyncClient(tcp_target(app)) as client:
            layout = await client.register_layout(SPEC)
            await asyncio.gather(*(client.put(layout, *block) for block in blocks.items()))
            got = await asyncio.gather(*(client.get(layout, each) for each in blocks))
            assert got == list(blocks.values())

        def threads() -> None:
            with Client(tcp_target(app)) as client, ThreadPoolExecutor(64) as pool:
                layout = client.register_layout(SPEC)
                got = pool.map(lambda each: client.get(layout, each), blocks)
                assert list(got) == list(blocks.values())

        await in_thread(threads)


@in_loop
async def test_a_write_that_says_nothing_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WRITE_IDLE_S", 0.2)
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        silence = stub.Write(silent(), metadata=session)
        assert (await refused(silence))[0] == "BAD_REQUEST"
        await eventually(lambda: not app.busy())
        monkeypatch.setattr(limits, "WRITE_IDLE_S", PATIENCE_S)
        await lease_of_a_big_block(stub, session)
