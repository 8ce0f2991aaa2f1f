"""What clients see of a server that is about to stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.app import App
from kvstore_server.limits import MAX_WAIT_MS
from tests.integration.server.harness import (
    PATIENCE_S,
    RawAttachment,
    acquire,
    commit,
    eventually,
    http_get,
    in_loop,
    in_thread,
    read,
    refused,
    register,
    remote_session,
    reserve,
    segment,
    slot_ids,
    small_config,
    stub_for,
    tcp_target,
    write_messages,
)

DRAINING = ("DRAINING", grpc.StatusCode.UNAVAILABLE)


@in_loop
async def test_a_draining_server_refuses_new_work_and_finishes_what_runs(tmp_path: Path) -> None:
    app = App(small_config(tmp_path, server__drain_s=str(PATIENCE_S)))
    await app.start()
    assert app.admin_port is not None
    async with stub_for(tcp_target(app)) as stub, remote_session(stub) as session:
        layout_id = await register(stub)
        full = await reserve(stub, session, layout_id, 200)
        running = asyncio.ensure_future(reserve(stub, session, layout_id, 1, wait_ms=MAX_WAIT_MS))
        await eventually(app.busy)
        stopping = asyncio.ensure_future(app.stop())
        await eventually(lambda: not app.health.ready)

        async with grpc.aio.insecure_channel(tcp_target(app)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", "kvstore.wire.v1.KVStore"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await http_get(app.admin_port, "/readyz") == (503, "draining\n")
        assert (await http_get(app.admin_port, "/livez"))[0] == 200
        assert await refused(acquire(stub, session, layout_id, 1)) == DRAINING
        assert await refused(reserve(stub, session, layout_id, 1)) == DRAINING
        assert await refused(stub.OpenSession(pb.OpenSessionRequest()).read()) == DRAINING
        raw = await in_thread(RawAttachment, app.config.attach_path)
        answer = await in_thread(raw.ask, {"op": "attach", "protocol": 2})
        assert answer["code"] == "DRAINING"
        raw.close()

        assert not running.done()
        assert not stopping.done()
        # What was written before is still published, but nothing more is promised.
        first, *others = slot_ids(full)
        await stub.Write(write_messages([first], 1), metadata=session)
        done = await commit(stub, session, layout_id, segment([first], 1), reserve=4)
        assert (list(done.outcomes), done.slots.addresses) == ([pb.CommitResponse.STORED], b"")
        await stub.Abort(pb.AbortRequest(slots=others), metadata=session)
        assert len(slot_ids(await running)) == 1
        await stopping


@in_loop
async def test_a_drain_ends_in_time_with_calls_still_running(tmp_path: Path) -> None:
    app = App(small_config(tmp_path, server__drain_s="0.3"))
    await app.start()
    async with stub_for(tcp_target(app)) as stub, remote_session(stub) as session:
        layout_id = await register(stub)
        await reserve(stub, session, layout_id, 200)
        running = asyncio.ensure_future(reserve(stub, session, layout_id, 1, wait_ms=MAX_WAIT_MS))
        await eventually(app.busy)
        began = asyncio.get_running_loop().time()
        await app.stop()
        assert asyncio.get_running_loop().time() - began < MAX_WAIT_MS / 2000
        await asyncio.gather(running, return_exceptions=True)
        assert (await refused(read(stub, session, 1)))[1] is grpc.StatusCode.UNAVAILABLE


@in_loop
async def test_a_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    from kvstore.errors import AddressInUse

    first = App(small_config(tmp_path))
    await first.start()
    (tmp_path / "b").mkdir()
    second = App(small_config(tmp_path / "b", server__listen=f"127.0.0.1:{first.tcp_port}"))
    try:
        await second.start()
        raise AssertionError("two servers on one port")
    except AddressInUse:
        pass
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["k.sock.serving"]
    again = App(small_config(tmp_path / "b"))
    await again.start()
    await again.stop()
    await first.stop()
