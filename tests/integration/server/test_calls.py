"""The gRPC service over a real server: what is answered, and what is refused how."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import xxhash
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.clock import ManualClock
from kvstore.types import LayoutSpec
from kvstore.wire.columns import pack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.calls import SERVICE_NAME
from kvstore_server.limits import MAX_BLOCKS, MAX_CHAINS, MAX_KEYS
from tests.integration.server.harness import (
    BLOCK_BYTES,
    LAYOUT,
    MIB,
    acquire,
    attached,
    commit,
    eventually,
    in_loop,
    key,
    keys,
    payload,
    put,
    read,
    refused,
    register,
    remote_session,
    reserve,
    segment,
    serving,
    slot_ids,
    stub_for,
    tcp_target,
    unix_target,
    write_messages,
)

Status = grpc.StatusCode
EXPIRED = ("RESERVATION_EXPIRED", Status.FAILED_PRECONDITION)
STORED, PRESENT = pb.CommitResponse.STORED, pb.CommitResponse.PRESENT
CONFLICT, ABSENT = pb.CommitResponse.CONFLICT, pb.CommitResponse.ABSENT


async def outcomes(commit: Awaitable[Any]) -> list[int]:
    return list((await commit).outcomes)


def checksum(number: int) -> int:
    return xxhash.xxh3_64_intdigest(payload(number))


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
        (slot,) = slot_ids(await reserve(stub, session, layout_id, 1))
        data = payload(7, size)
        messages = [
            pb.WriteRequest(slot=slot, data=data[at : at + MIB]) for at in range(0, size, MIB)
        ]
        await stub.Write(iter(messages), metadata=session)
        await commit(stub, session, layout_id, segment([slot], 1, checksums=[1]))
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
        chain = pb.Chain(layout_ids=[layout_id], keys=key(1))

        def lookup(*chains: pb.Chain) -> Any:
            return stub.Lookup(pb.LookupRequest(chains=chains))

        short = pb.Chain(layout_ids=[layout_id], keys=b"short")
        assert await refused(lookup(short)) == ("BAD_KEY", Status.INVALID_ARGUMENT)
        many = pb.Chain(layout_ids=[layout_id], keys=key(1) * (MAX_KEYS + 1))
        assert await refused(lookup(many)) == ("TOO_LARGE", Status.INVALID_ARGUMENT)
        shards = pb.Chain(layout_ids=[layout_id] * 2, keys=key(1) * (MAX_KEYS // 2 + 1))
        assert await refused(lookup(shards)) == ("TOO_LARGE", Status.INVALID_ARGUMENT)
        chains = [chain] * (MAX_CHAINS + 1)
        assert await refused(lookup(*chains)) == ("TOO_LARGE", Status.INVALID_ARGUMENT)
        shards = pb.Chain(layout_ids=[layout_id] * (MAX_KEYS // MAX_CHAINS + 1))
        chains = [shards] * MAX_CHAINS
        assert await refused(lookup(*chains)) == ("TOO_LARGE", Status.INVALID_ARGUMENT)
        none = pb.Chain(keys=key(1))
        assert await refused(lookup(none)) == ("BAD_REQUEST", Status.INVALID_ARGUMENT)
        strange = pb.Chain(layout_ids=[b"x" * 16], keys=key(1))
        assert await refused(lookup(strange)) == ("UNKNOWN_LAYOUT", Status.NOT_FOUND)
        impatient = pb.AcquireRequest(chains=[chain], wait_ms=60_001)
        assert (await refused(stub.Acquire(impatient, metadata=session)))[0] == "BAD_REQUEST"
        talkative = pb.AcquireRequest(reader=bytes(65))
        assert (await refused(stub.Acquire(talkative, metadata=session)))[0] == "BAD_REQUEST"
        huge = pb.Layout(model="m", dtype="x", block_tokens=1, block_bytes=MIB + 1)
        assert (await refused(register(stub, huge)))[0] == "BAD_REQUEST"
        empty = pb.Layout()
        assert (await refused(register(stub, empty)))[0] == "BAD_REQUEST"
        assert await refused(stub.Flush(pb.FlushRequest())) == (
            "NO_LOWER_TIER",
            Status.FAILED_PRECONDITION,
        )


@in_loop
async def test_bad_requests_to_write_have_their_documented_errors(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        layout_id = await register(stub)
        stranger = b"x" * 16
        unknown = ("UNKNOWN_LAYOUT", Status.NOT_FOUND)
        assert await refused(reserve(stub, session, stranger, 1)) == unknown
        assert await refused(commit(stub, session, stranger)) == unknown
        too_large = ("TOO_LARGE", Status.INVALID_ARGUMENT)
        assert await refused(reserve(stub, session, layout_id, MAX_BLOCKS + 1)) == too_large
        assert (await refused(reserve(stub, session, layout_id, 1, wait_ms=60_001)))[0] == (
            "BAD_REQUEST"
        )
        bad_key = ("BAD_KEY", Status.INVALID_ARGUMENT)
        for bad in (
            pb.Segment(keys=b"short", slots=bytes(8), checksums=bytes(8)),
            pb.Segment(parent=b"short", keys=key(1), slots=bytes(8), checksums=bytes(8)),
            pb.Segment(parent=b"short"),
        ):
            assert await refused(commit(stub, session, layout_id, bad)) == bad_key
        many = pb.Segment(
            keys=key(1) * (MAX_BLOCKS + 1),
            slots=bytes(8 * (MAX_BLOCKS + 1)),
            checksums=bytes(8 * (MAX_BLOCKS + 1)),
        )
        assert await refused(commit(stub, session, layout_id, many)) == too_large
        segments = [pb.Segment()] * (MAX_CHAINS + 1)
        assert await refused(commit(stub, session, layout_id, *segments)) == too_large
        ahead = commit(stub, session, layout_id, reserve=MAX_BLOCKS + 1)
        assert await refused(ahead) == too_large
        abort = stub.Abort(pb.AbortRequest(slots=range(MAX_BLOCKS + 1)), metadata=session)
        assert await refused(abort) == too_large
        assert app.store.stats().reservations == 0


@in_loop
async def test_an_oversized_message_is_refused_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        request = pb.LookupRequest(chains=[pb.Chain(keys=bytes(17 << 20))])
        assert (await refused(stub.Lookup(request)))[1] is Status.RESOURCE_EXHAUSTED
        assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).max_keys == MAX_KEYS


@in_loop
@pytest.mark.parametrize("name", ["Lookup", "Read"])
async def test_what_is_no_request_is_the_callers_mistake_and_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    async with serving(tmp_path) as app, grpc.aio.insecure_channel(tcp_target(app)) as channel:
        # One call that is answered with a message, and one with a stream.
        call: Any = channel.unary_unary if name == "Lookup" else channel.unary_stream
        answer = call(f"/{SERVICE_NAME}/{name}")(b"\xff" * 16)
        wrong = answer if name == "Lookup" else answer.read()
        assert await refused(wrong) == ("BAD_REQUEST", Status.INVALID_ARGUMENT)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


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
        for call in (
            stub.Write(write_messages([1], 1)),
            reserve(stub, (), layout_id, 1),
            commit(stub, (), layout_id),
            stub.Abort(pb.AbortRequest(slots=[1])),
        ):
            assert (await refused(call))[0] == "NO_SESSION"


@in_loop
async def test_an_attached_session_cannot_be_used_over_tcp(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, attached(app) as (_, _, session):
        async with stub_for(unix_target(app)) as stub:
            layout_id = await register(stub, metadata=session)
            await acquire(stub, session, layout_id, 1)
        async with stub_for(tcp_target(app)) as stub:
            assert (await refused(acquire(stub, session, layout_id, 1)))[0] == "NO_SESSION"


@in_loop
async def test_leases_of_others_are_refused(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as mine,
        remote_session(stub) as other,
    ):
        layout_id = await register(stub)
        await put(stub, mine, layout_id, 1)
        lease = await acquire(stub, mine, layout_id, 1)
        foreign_lease = ("FOREIGN_LEASE", Status.PERMISSION_DENIED)
        assert await refused(read(stub, other, lease.lease_id)) == foreign_lease
        release = pb.ReleaseRequest(lease_ids=[lease.lease_id])
        assert await refused(stub.Release(release, metadata=other)) == foreign_lease
        renew = pb.RenewRequest(lease_ids=[lease.lease_id])
        assert await refused(stub.Renew(renew, metadata=other)) == foreign_lease
        assert await read(stub, mine, lease.lease_id) == payload(1)


@in_loop
async def test_slots_of_others_are_as_good_as_none(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as mine,
        remote_session(stub) as other,
    ):
        layout_id = await register(stub)
        slots = slot_ids(await reserve(stub, mine, layout_id, 2))
        await stub.Write(write_messages(slots, 1, 2), metadata=mine)
        write = stub.Write(write_messages(slots, 3, 4), metadata=other)
        assert await refused(write) == EXPIRED
        theirs = slot_ids(await reserve(stub, other, layout_id, 1))
        for stolen in (segment(slots, 1, 2), segment([*theirs, slots[0]], 3, 4)):
            assert await refused(commit(stub, other, layout_id, stolen)) == EXPIRED
        await stub.Abort(pb.AbortRequest(slots=[*slots, 0, 2**64 - 1]), metadata=other)
        assert await outcomes(commit(stub, mine, layout_id, segment(slots, 1, 2))) == [STORED] * 2
        lease = await acquire(stub, other, layout_id, 1, 2)
        assert await read(stub, other, lease.lease_id) == payload(1) + payload(2)
        assert await outcomes(commit(stub, other, layout_id, segment(theirs, 1))) == [PRESENT]
        assert app.store.stats().reservations == 0


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
        slots = slot_ids(await reserve(unix, local, layout_id, 1))
        async with remote_session(stub) as session:
            await put(stub, session, layout_id, 1)
            lease = await acquire(stub, session, layout_id, 1)
            assert lease.held == 1
            clock.advance_ms(49)
            await asyncio.sleep(0.3)
            assert await read(stub, session, lease.lease_id) == payload(1)
            clock.advance_ms(2)
            await eventually(lambda: app.store.stats().leases == 0)
            expired = ("LEASE_EXPIRED", Status.FAILED_PRECONDITION)
            assert await refused(read(stub, session, lease.lease_id)) == expired
            renew = pb.RenewRequest(lease_ids=[lease.lease_id])
            assert await refused(stub.Renew(renew, metadata=session)) == expired
        clock.advance_ms(40)
        await eventually(lambda: app.store.counters().expired_reservations == 1)
        assert await refused(commit(unix, local, layout_id, segment(slots, 9))) == EXPIRED
        write = unix.Write(write_messages(slots, 9), metadata=local)
        assert await refused(write) == EXPIRED
        # Its client may be writing into it for as long as it says nothing.
        assert app.store.stats().reservations == 1
        await unix.Abort(pb.AbortRequest(slots=slots), metadata=local)
        assert app.store.stats().reservations == 0


@in_loop
async def test_a_commit_that_is_refused_publishes_nothing_and_closes_no_slot(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    async with (
        serving(tmp_path, clock=clock, server__reservation_ms="80") as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        layout_id = await register(stub)
        another = await register(
            stub, pb.Layout(model="n", dtype="x", block_tokens=1, block_bytes=BLOCK_BYTES)
        )
        (late,) = slot_ids(await reserve(stub, session, layout_id, 1))
        clock.advance_ms(60)
        a, b = slot_ids(await reserve(stub, session, layout_id, 2))
        (foreign,) = slot_ids(await reserve(stub, session, another, 1))
        clock.advance_ms(30)
        await eventually(lambda: app.store.counters().expired_reservations == 1)
        await stub.Write(write_messages([a, b], 1, 2), metadata=session)
        bad_request = ("BAD_REQUEST", Status.INVALID_ARGUMENT)
        short = segment([a, b], 1, 2)
        short.checksums = short.checksums[:8]
        unpaired = segment([a], 1)
        unpaired.slots += pack_numbers([b])
        for name, segments, answer in (
            ("named twice", [segment([a, b, a], 1, 2, 3)], bad_request),
            ("named twice, far apart", [segment([a], 1), segment([b, a], 2, 3)], bad_request),
            ("another layout's", [segment([a, b], 1, 2), segment([foreign], 3)], bad_request),
            ("fewer checksums", [short], bad_request),
            ("more slots", [unpaired], bad_request),
            ("expired", [segment([a, late, b], 1, 3, 2)], EXPIRED),
            ("never there", [segment([a, 12345, b], 1, 3, 2)], EXPIRED),
            ("a key cut short", [segment([a], 1), pb.Segment(keys=b"x", slots=pack_numbers([b]))],
                ("BAD_KEY", Status.INVALID_ARGUMENT)),
        ):  # fmt: skip
            call = commit(stub, session, layout_id, *segments, reserve=5)
            assert await refused(call) == answer, name
            assert (await acquire(stub, session, layout_id, 1)).held == 0, name
            assert app.store.stats().reservations == 2, name
        done = commit(stub, session, layout_id, segment([a, b], 1, 2))
        assert await outcomes(done) == [STORED, STORED]
        lease = await acquire(stub, session, layout_id, 1, 2)
        assert await read(stub, session, lease.lease_id) == payload(1) + payload(2)
        await stub.Abort(pb.AbortRequest(slots=[foreign]), metadata=session)
        assert app.store.stats().reservations == 0


@in_loop
async def test_numbers_without_a_key_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        layout_id = await register(stub)
        monkeypatch.delattr("kvstore_server.service.unpack_numbers")
        for slots, checksums in ((8, 8), (16, 8), (8, 16), (0, 8), (9, 9)):
            numbers = pb.Segment(slots=bytes(slots), checksums=bytes(checksums))
            assert (await refused(commit(stub, session, layout_id, numbers)))[0] == "BAD_REQUEST"


@in_loop
async def test_a_commit_whose_answer_was_lost_can_be_repeated(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
        remote_session(stub) as other,
    ):
        layout_id = await register(stub)
        slots = slot_ids(await reserve(stub, session, layout_id, 3))
        await stub.Write(write_messages(slots, 1, 2, 3), metadata=session)
        whole = segment(slots, 1, 2, 3)
        assert await outcomes(commit(stub, session, layout_id, whole)) == [STORED] * 3
        for again in (session, other):
            assert await outcomes(commit(stub, again, layout_id, whole)) == [PRESENT] * 3
        stats = app.store.stats()
        assert (stats.committed_blocks, stats.reservations) == (3, 0)
        # Among them one that is not there: then it is no repetition.
        more = segment([*slots, slots[-1] + 1000], 1, 2, 3, 4)
        assert await refused(commit(stub, session, layout_id, more)) == EXPIRED
        lease = await acquire(stub, session, layout_id, 1, 2, 3)
        assert await read(stub, session, lease.lease_id) == b"".join(map(payload, (1, 2, 3)))


@in_loop
async def test_each_block_of_a_commit_has_its_own_outcome(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
    ):
        layout_id = await register(stub)
        await put(stub, session, layout_id, 1, 2)
        free = app.store.stats().tiers[0].used_bytes
        a, b, c, d = slot_ids(await reserve(stub, session, layout_id, 4))
        await stub.Write(write_messages([a, b, c, d], 1, 2, 3, 4), metadata=session)
        mixed = pb.Segment(
            keys=keys(1, 2, 3, 1, 2, 9, 4),
            slots=pack_numbers([a, b, c, 0, 0, 0, d]),
            checksums=pack_numbers(
                [checksum(1), checksum(9), checksum(3), checksum(1), 5, 5, checksum(4)]
            ),
        )
        assert await outcomes(commit(stub, session, layout_id, mixed)) == [
            PRESENT, CONFLICT, STORED, PRESENT, CONFLICT, ABSENT, STORED
        ]  # fmt: skip
        stats = app.store.stats()
        assert stats.reservations == 0, "slots of blocks that were there are free again"
        assert stats.tiers[0].used_bytes == 2 * free, "a slot for each block"
        lease = await acquire(stub, session, layout_id, 1, 2, 3, 4)
        assert await read(stub, session, lease.lease_id) == b"".join(map(payload, (1, 2, 3, 4)))


@in_loop
async def test_slots_come_ahead_with_a_commit_and_their_ids_are_never_used_again(
    tmp_path: Path,
) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as session,
        remote_session(stub) as other,
    ):
        layout_id = await register(stub)
        seen: set[int] = set()

        def new(slots: Any) -> range:
            ids = slot_ids(slots)
            assert ids and 0 not in ids and not seen.intersection(ids)
            seen.update(ids)
            return ids

        ours = new(await reserve(stub, session, layout_id, 3))
        for number in range(0, 30, 3):
            await stub.Write(write_messages(ours, *range(number, number + 3)), metadata=session)
            done = await commit(
                stub, session, layout_id, segment(ours, *range(number, number + 3)), reserve=3
            )
            assert list(done.outcomes) == [STORED] * 3
            ours = new(done.slots)
            theirs = new(await reserve(stub, other, layout_id, 2))
            await stub.Abort(pb.AbortRequest(slots=theirs), metadata=other)
        for old in seen.difference(ours):
            assert await refused(commit(stub, session, layout_id, segment([old], 99))) == EXPIRED
        # Slots can also be asked for alone, and need not be used.
        more = new((await commit(stub, session, layout_id, reserve=2)).slots)
        await stub.Abort(pb.AbortRequest(slots=[*ours, *more, *more]), metadata=session)
        assert app.store.stats().reservations == 0


@in_loop
async def test_two_sessions_that_store_a_block_at_once_both_succeed(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as app,
        stub_for(tcp_target(app)) as stub,
        remote_session(stub) as one,
        remote_session(stub) as two,
    ):
        layout_id = await register(stub)
        slots = {}
        for session in (one, two):
            slots[session] = slot_ids(await reserve(stub, session, layout_id, 2))
            await stub.Write(write_messages(slots[session], 1, 2), metadata=session)
        commits = [
            outcomes(commit(stub, session, layout_id, segment(slots[session], 1, 2)))
            for session in (one, two)
        ]
        answers = await asyncio.gather(*commits)
        assert sorted(answers) == [[STORED, STORED], [PRESENT, PRESENT]]
        lease = await acquire(stub, one, layout_id, 1, 2)
        assert await read(stub, one, lease.lease_id) == payload(1) + payload(2)
        stats = app.store.stats()
        assert (stats.committed_blocks, stats.reservations, stats.tiers[0].blocks) == (2, 0, 2)


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
        first, second = slot_ids(await reserve(stub, session, await register(stub), 2))
        messages = [pb.WriteRequest(slot=first, data=bytes(size)) for size in sizes]
        answer = await refused(stub.Write(iter(messages), metadata=session))
        assert answer == ("BAD_SIZE", Status.INVALID_ARGUMENT)
        # A slot left half written does not let the next one begin.
        messages = [pb.WriteRequest(slot=slot, data=b"x") for slot in (first, second)]
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
            slots = await reserve(stub, session, layout_id, 1)
            reading = stub.Read(pb.ReadRequest(lease_id=lease.lease_id), metadata=session)
            await reading.read()
            writing = stub.Write(metadata=session)
            await writing.write(pb.WriteRequest(slot=slots.first_slot, data=b"half"))
            waiting = asyncio.ensure_future(acquire(stub, session, layout_id, 99))
            await asyncio.sleep(0.05)
            assert app.store.stats().leases == 1
        await asyncio.gather(waiting, return_exceptions=True)
        await eventually(lambda: app.store.stats().sessions == 0)
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


@in_loop
async def test_layouts_that_differ_by_their_codec_are_not_the_same(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        fields = _fields(LAYOUT)
        coded = await register(stub, pb.Layout(**fields, codec="fp8"))
        assert coded == LayoutSpec(**fields, codec="fp8").layout_id
        assert coded != await register(stub)
        unknown = register(stub, pb.Layout(**fields, codec="fp9"))
        assert (await refused(unknown))[0] == "BAD_REQUEST"


@in_loop
async def test_no_refusal_is_longer_than_a_client_takes(tmp_path: Path) -> None:
    async with serving(tmp_path) as app, stub_for(tcp_target(app)) as stub:
        endless = register(stub, pb.Layout(**_fields(LAYOUT), codec="x" * MIB))
        assert await refused(endless) == ("BAD_REQUEST", Status.INVALID_ARGUMENT)


def _fields(message: Any) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}
