"""The gRPC service over a real server: what is answered, and what is refused how."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.clock import ManualClock
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.limits import MAX_CHAINS, MAX_KEYS
from tests.integration.server.harness import (
    BLOCK_BYTES,
    LAYOUT,
    MIB,
    acquire,
    attached,
    eventually,
    in_loop,
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
    write_messages,
)

Status = grpc.StatusCode


@in_loop
async def test_what_is_written_over_grpc_is_what_is_read(tmp_path: Path) -> None:
    async with serving(tmp_path) as app:
        for target in (tcp_target(app), unix_target(app)):
            async with stub_for(target) as stub, remote_session(stub) as session:
                layout_id = await register(stub)
                await put(stub, session, layout_id, 1, 2, 3)
                lease = await acquire(stub, session, layout_id, 1, 2, 3, 4)
                assert lease.held == 3
                whole = await read(stub, session, lease.lease_id)
                assert whole == payload(1) + payload(2) + payload(3)
                assert await read(stub, session, lease.lease_id, 2) == payload(3)
                await stub.Release(pb.ReleaseRequest(lease_ids=[lease.lease_id]), metadata=session)
                await stub.Clear(pb.ClearRequest())


@in_loop
async def test_a_block_larger_than_a_message_piece_comes_in_pieces(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, dram__extent="4MiB", dram__capacity="16MiB") as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        size = 2 * MIB + 5
        layout = pb.Layout(model="big", dtype="u8", block_tokens=1, block_bytes=size)
        layout_id = await register(stub, layout)
        grant = await reserve(stub, session, layout_id, 1)
        data = payload(7, size)
        messages = [
            pb.WriteRequest(reservation_id=grant.reservation_id, data=data[at : at + MIB])
            for at in range(0, size, MIB)
        ]
        await stub.Write(iter(messages), metadata=session)
        commit = pb.CommitRequest(reservation_id=grant.reservation_id, indices=[0], checksums=[1])
        await stub.Commit(commit, metadata=session)
        lease = await acquire(stub, session, layout_id, 1)
        stream = stub.Read(pb.ReadRequest(lease_id=lease.lease_id), metadata=session)
        pieces = [message.data async for message in stream]
        assert [len(piece) for piece in pieces] == [MIB, MIB, 5]
        assert b"".join(pieces) == data


@in_loop
async def test_bad_requests_have_their_documented_errors(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        layout_id = await register(stub)
        chain = pb.Chain(layout_ids=[layout_id], keys=[key(1)])

        def lookup(*chains: pb.Chain) -> Any:
            return stub.Lookup(pb.LookupRequest(chains=chains))

        short = pb.Chain(layout_ids=[layout_id], keys=[b"short"])
        assert await refused(lookup(short)) == ("BAD_KEY", Status.INVALID_ARGUMENT)
        many = pb.Chain(layout_ids=[layout_id], keys=[key(1)] * (MAX_KEYS + 1))
        assert await refused(lookup(many)) == ("TOO_LARGE", Status.INVALID_ARGUMENT)
        shards = pb.Chain(layout_ids=[layout_id] * 2, keys=[key(1)] * (MAX_KEYS // 2 + 1))
        assert await refused(lookup(shards)) == ("TOO_LARGE", Status.INVALID_ARGUMENT)
        chains = [chain] * (MAX_CHAINS + 1)
        assert await refused(lookup(*chains)) == ("TOO_LARGE", Status.INVALID_ARGUMENT)
        none = pb.Chain(keys=[key(1)])
        assert await refused(lookup(none)) == ("BAD_REQUEST", Status.INVALID_ARGUMENT)
        strange = pb.Chain(layout_ids=[b"x" * 16], keys=[key(1)])
        assert await refused(lookup(strange)) == ("UNKNOWN_LAYOUT", Status.NOT_FOUND)
        entry = pb.ReserveEntry(key=key(1), parent=b"short")
        request = pb.ReserveRequest(layout_id=layout_id, entries=[entry])
        assert (await refused(stub.Reserve(request, metadata=session)))[0] == "BAD_KEY"
        impatient = pb.AcquireRequest(chains=[chain], wait_ms=60_001)
        assert (await refused(stub.Acquire(impatient, metadata=session)))[0] == "BAD_REQUEST"
        unknown = pb.CommitRequest(reservation_id=99)
        answer = await refused(stub.Commit(unknown, metadata=session))
        assert answer == ("UNKNOWN_RESERVATION", Status.NOT_FOUND)
        huge = pb.Layout(model="m", dtype="x", block_tokens=1, block_bytes=MIB + 1)
        assert (await refused(register(stub, huge)))[0] == "BAD_REQUEST"
        empty = pb.Layout()
        assert (await refused(register(stub, empty)))[0] == "BAD_REQUEST"
        assert await refused(stub.Flush(pb.FlushRequest())) == (
            "NO_LOWER_TIER",
            Status.FAILED_PRECONDITION,
        )


@in_loop
async def test_an_oversized_message_is_refused_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        keys = [bytes(1 << 20)] * 17
        request = pb.LookupRequest(chains=[pb.Chain(keys=keys)])
        assert (await refused(stub.Lookup(request)))[1] is Status.RESOURCE_EXHAUSTED
        assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).max_keys == MAX_KEYS


@in_loop
async def test_oversized_metadata_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        metadata = (("x-large", "y" * (32 << 10)),)
        call = stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata)
        assert (await refused(call))[1] is Status.RESOURCE_EXHAUSTED


@in_loop
async def test_calls_that_need_a_session_are_refused_without_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        layout_id = await register(stub)
        missing = await refused(acquire(stub, (), layout_id, 1))
        ended = await refused(acquire(stub, (("kvstore-session-bin", b"x" * 16),), layout_id, 1))
        assert missing == ended == ("NO_SESSION", Status.UNAUTHENTICATED)
        assert (await refused(read(stub, (), 1)))[0] == "NO_SESSION"
        assert (await refused(stub.Write(write_messages(1, 1))))[0] == "NO_SESSION"


@in_loop
async def test_an_attached_session_cannot_be_used_over_tcp(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, attached(app) as (_, _, session):
        async with stub_for(unix_target(app)) as stub:
            layout_id = await register(stub, metadata=session)
            await acquire(stub, session, layout_id, 1)
        async with stub_for(tcp_target(app)) as stub:
            assert (await refused(acquire(stub, session, layout_id, 1)))[0] == "NO_SESSION"


@in_loop
async def test_leases_and_reservations_of_others_are_refused(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as mine,
        remote_session(stub) as other,
    ):
        layout_id = await register(stub)
        await put(stub, mine, layout_id, 1)
        lease = await acquire(stub, mine, layout_id, 1)
        grant = await reserve(stub, mine, layout_id, 2)
        foreign_lease = ("FOREIGN_LEASE", Status.PERMISSION_DENIED)
        assert await refused(read(stub, other, lease.lease_id)) == foreign_lease
        release = pb.ReleaseRequest(lease_ids=[lease.lease_id])
        assert await refused(stub.Release(release, metadata=other)) == foreign_lease
        renew = pb.RenewRequest(lease_ids=[lease.lease_id])
        assert await refused(stub.Renew(renew, metadata=other)) == foreign_lease
        foreign = ("FOREIGN_RESERVATION", Status.PERMISSION_DENIED)
        write = stub.Write(write_messages(grant.reservation_id, 2), metadata=other)
        assert await refused(write) == foreign
        commit = pb.CommitRequest(reservation_id=grant.reservation_id)
        assert await refused(stub.Commit(commit, metadata=other)) == foreign
        assert await read(stub, mine, lease.lease_id) == payload(1)


@in_loop
async def test_expired_leases_and_reservations_are_refused_and_free(tmp_path: Path) -> None:
    clock = ManualClock()
    times = {"server__lease_ms": "50", "server__reservation_ms": "80"}
    async with (
        serving(tmp_path, clock=clock, **times) as app,
        stub_for(tcp_target(app)) as stub,
        attached(app) as (_, _, local),
        stub_for(unix_target(app)) as unix,
    ):
        layout_id = await register(stub)
        grant = await reserve(unix, local, layout_id, 9)
        async with remote_session(stub) as session:
            await put(stub, session, layout_id, 1)
            lease = await acquire(stub, session, layout_id, 1)
            assert lease.held == 1
            clock.advance_ms(49)
            await asyncio.sleep(0.3)
            assert await read(stub, session, lease.lease_id) == payload(1)
            clock.advance_ms(2)
            await eventually(lambda: app.store.stats().leases == 0, within_s=2)
            expired = ("LEASE_EXPIRED", Status.FAILED_PRECONDITION)
            assert await refused(read(stub, session, lease.lease_id)) == expired
            renew = pb.RenewRequest(lease_ids=[lease.lease_id])
            assert await refused(stub.Renew(renew, metadata=session)) == expired
        clock.advance_ms(40)
        await eventually(lambda: app.store.counters().expired_reservations == 1, within_s=2)
        commit = pb.CommitRequest(reservation_id=grant.reservation_id, indices=[0], checksums=[1])
        assert await refused(unix.Commit(commit, metadata=local)) == (
            "RESERVATION_EXPIRED",
            Status.FAILED_PRECONDITION,
        )


@in_loop
async def test_a_second_commit_with_other_bytes_conflicts(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        grant = await reserve(stub, session, await register(stub), 1)
        await stub.Write(write_messages(grant.reservation_id, 1), metadata=session)

        def commit(checksum: int) -> Any:
            return stub.Commit(
                pb.CommitRequest(
                    reservation_id=grant.reservation_id, indices=[0], checksums=[checksum]
                ),
                metadata=session,
            )

        await commit(1)
        await commit(1)
        assert await refused(commit(2)) == ("CONFLICT", Status.ALREADY_EXISTS)


@in_loop
@pytest.mark.parametrize(
    "sizes", [[BLOCK_BYTES - 1], [BLOCK_BYTES, 1], [MIB + 1]], ids=["short", "long", "piece"]
)
async def test_a_write_of_the_wrong_size_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        grant = await reserve(stub, session, await register(stub), 1, 2)
        messages = [
            pb.WriteRequest(reservation_id=grant.reservation_id, data=bytes(size)) for size in sizes
        ]
        answer = await refused(stub.Write(iter(messages), metadata=session))
        assert answer == ("BAD_SIZE", Status.INVALID_ARGUMENT)
        # An entry left half written does not let the next one begin.
        messages = [
            pb.WriteRequest(reservation_id=grant.reservation_id, index=i, data=b"x") for i in (0, 1)
        ]
        assert (await refused(stub.Write(iter(messages), metadata=session)))[0] == "BAD_SIZE"


@in_loop
async def test_a_client_gone_in_mid_stream_leaks_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as app:
        async with stub_for(tcp_target(app)) as stub:
            opened = stub.OpenSession(pb.OpenSessionRequest())
            session = (("kvstore-session-bin", (await opened.read()).session),)
            layout_id = await register(stub)
            await put(stub, session, layout_id, *range(20))
            lease = await acquire(stub, session, layout_id, *range(20))
            grant = await reserve(stub, session, layout_id, 50)
            reading = stub.Read(pb.ReadRequest(lease_id=lease.lease_id), metadata=session)
            await reading.read()
            writing = stub.Write(metadata=session)
            await writing.write(pb.WriteRequest(reservation_id=grant.reservation_id, data=b"half"))
            waiting = asyncio.ensure_future(acquire(stub, session, layout_id, 99))
            await asyncio.sleep(0.05)
            assert app.store.stats().leases == 1
        await asyncio.gather(waiting, return_exceptions=True)
        await eventually(lambda: app.store.stats().sessions == 0, within_s=2)
        assert (app.store.stats().leases, app.store.stats().reservations) == (0, 0)
        faults = app.metrics.registry.get_sample_value(
            "kvstore_unexpected_errors_total", {"where": "call"}
        )
        assert faults == 0


@in_loop
async def test_an_unforeseen_fault_is_internal_counted_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kvstore_server.logs import JsonFormatter

    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:

        def fail(*_: object) -> int:
            raise RuntimeError("secret prompt")

        monkeypatch.setattr(app.store, "clear", fail)
        answer = await refused(stub.Clear(pb.ClearRequest()))
        assert answer == ("INTERNAL", Status.INTERNAL)
        count = app.metrics.registry.get_sample_value(
            "kvstore_unexpected_errors_total", {"where": "call"}
        )
        assert count == 1
        logged = [JsonFormatter().format(record) for record in caplog.records]
        assert any("RuntimeError" in line and "Clear" in line for line in logged)
        assert not any("secret prompt" in line for line in logged)


@in_loop
async def test_health_and_reflection_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, grpc.aio.insecure_channel(tcp_target(app)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvstore.wire.v1.KVStore"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        stream = reflection.ServerReflectionInfo(iter(requests))
        names = [s.name async for r in stream for s in r.list_services_response.service]
        assert "kvstore.wire.v1.KVStore" in names
        assert "grpc.health.v1.Health" in names


@in_loop
async def test_the_attach_path_is_told_only_on_the_unix_socket(tmp_path: Path) -> None:
    async with serving(tmp_path) as app:
        async with stub_for(unix_target(app)) as stub:
            info = await stub.GetServerInfo(pb.GetServerInfoRequest())
            assert info.attach_path == str(app.config.attach_path)
            assert info.max_block_bytes == MIB
        async with stub_for(tcp_target(app)) as stub:
            info = await stub.GetServerInfo(pb.GetServerInfoRequest())
            assert info.attach_path == ""


@in_loop
async def test_every_limit_of_a_layout_is_the_wires(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        first = await register(stub)
        again = await register(stub, pb.Layout(**{**_fields(LAYOUT), "world": 1}))
        assert first == again, "a world of 0 is taken as 1"


def _fields(message: Any) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}
