"""Leases and reservations at the low level, as connectors use them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import xxhash

import kvstore
from kvstore import ChainQuery, CommitOutcome, Segment
from kvstore.errors import (
    BadRequest,
    ForeignLease,
    LeaseExpired,
    ReservationExpired,
)
from kvstore.types import GPU_ONLY, MAX_READER_BYTES
from tests.integration.client.conftest import Server, block, key, layout_of, until_nothing_is_held


@pytest.fixture
def chain(client: Any, layout: kvstore.Layout) -> list[bytes]:
    """Three stored positions and one that is not."""
    n = layout.block_bytes
    keys = [key(number) for number in range(4)]
    client.put_many(layout, keys[:3], [block(number, n) for number in range(3)])
    return keys


def test_a_lease_reads_the_held_prefix(
    client: Any, layout: kvstore.Layout, chain: list[bytes], place: str
) -> None:
    assert client.lookup(layout, chain) == (3, 3)
    with client.acquire(layout, chain) as lease:
        assert (lease.held, len(lease), lease.from_dram) == (3, 3, 3)
        assert not lease.expired
        for index in range(3):
            data = block(index, layout.block_bytes)
            assert lease.read(index) == data
            assert lease.checksums[index] == xxhash.xxh3_64_intdigest(data)
            if place == "local":
                view = lease.view(index)
                assert view.readonly
                assert bytes(view) == data
            else:
                with pytest.raises(BadRequest):
                    lease.view(index)
        with pytest.raises(BadRequest):
            lease.read(3)
        lease.renew()
        assert client.stats().leases == 1
    assert lease.expired
    with pytest.raises(LeaseExpired):
        lease.read(0)
    with pytest.raises(LeaseExpired):
        lease.renew()
    lease.release()
    assert client.stats().leases == 0


def test_a_reader_that_reads_nowhere_is_given_blocks_in_host_memory(
    client: Any, layout: kvstore.Layout, chain: list[bytes]
) -> None:
    with client.acquire(layout, chain, reader=b"engine") as lease:
        assert [lease.read(index) for index in range(lease.held)] == [
            block(number, layout.block_bytes) for number in range(3)
        ]
    (grant,) = client.acquire_many([ChainQuery([layout.id], chain)], 0, reader=b"engine")
    assert max(grant.addresses) < GPU_ONLY
    client.release([grant.lease_id])
    with pytest.raises(BadRequest):
        client.acquire(layout, chain, reader=bytes(MAX_READER_BYTES + 1))


def test_a_lease_on_nothing_needs_no_release(client: Any, layout: kvstore.Layout) -> None:
    with client.acquire(layout, [key(99)]) as lease:
        assert (lease.lease_id, lease.held, len(lease)) == (0, 0, 0)
        lease.renew()


def test_a_position_counts_only_where_every_layout_holds_it(client: Any) -> None:
    ranks = [
        client.register_layout(
            kvstore.LayoutSpec("m", "f", 16, block_bytes=3000 + rank, rank=rank, world=2)
        )
        for rank in range(2)
    ]
    keys = [key(1), key(2)]
    client.put_many(ranks[0], keys, [block(1, 3000), block(2, 3000)])
    client.put_many(ranks[1], keys[:1], [block(3, 3001)])
    with client.acquire(ranks, keys) as lease:
        assert (lease.held, len(lease)) == (1, 2)
        assert lease.read(0) == block(1, 3000)
        assert lease.read(1) == block(3, 3001)


def test_an_expired_lease_gives_no_bytes(fresh_server: Server, connect: Any) -> None:
    fresh_server.kill()
    fresh_server.start("--lease-ms", "300")
    client = connect(fresh_server)
    layout = layout_of(client, 5000)
    client.put(layout, key(1), block(1, 5000))
    lease = client.acquire(layout, [key(1)])
    assert lease.held == 1
    time.sleep(0.5)
    assert lease.expired
    with pytest.raises(LeaseExpired):
        lease.read(0)
    with pytest.raises(LeaseExpired):
        client.renew([lease.lease_id])
    lease.release()


def test_slots_that_were_not_committed_in_time_are_not_open_any_more(
    fresh_server: Server, connect: Any, place: str
) -> None:
    fresh_server.kill()
    fresh_server.start("--reservation-ms", "2000")
    client = connect(fresh_server)
    layout = layout_of(client, 5000)
    late = client.reserve(layout, 2, 0)
    time.sleep(2.3)
    good = client.reserve(layout, 2, 0)
    # A local client may be writing still: its slots stay as they are until it aborts.
    assert client.stats().reservations == (2 if place == "local" else 1)
    slots = [good.first_slot, late.first_slot, good.first_slot + 1]
    with pytest.raises(ReservationExpired):
        client.commit(layout, [Segment(b"", [key(2), key(3), key(4)], slots, [7, 7, 7])])
    assert client.lookup(layout, [key(2)]).held == 0, "nothing of the commit is published"
    client.abort([late.first_slot, late.first_slot + 1])
    segment = Segment(b"", [key(2), key(4)], slots[::2], [7, 7])
    assert client.commit(layout, [segment]).outcomes == [CommitOutcome.STORED] * 2
    assert client.stats().reservations == 0


def test_leases_and_slots_of_another_session_are_not_ones_own(
    client: Any, layout: kvstore.Layout, chain: list[bytes], server: Server
) -> None:
    with kvstore.Client(server.socket) as other:
        lease = other.acquire(layout, chain)
        grant = other.reserve(layout, 1, 0)
        with pytest.raises(ForeignLease):
            client.renew([lease.lease_id])
        with pytest.raises(ForeignLease):
            client.release([lease.lease_id])
        segment = Segment(b"", [key(50)], [grant.first_slot], [7])
        with pytest.raises(ReservationExpired):
            client.commit(layout, [segment])
        client.abort([grant.first_slot])
        assert client.stats().reservations == 1
        assert other.commit(layout, [segment]).outcomes == [CommitOutcome.STORED]
        assert lease.read(0) == block(0, layout.block_bytes)


def test_a_connector_writes_slots_itself_and_other_processes_read_them(
    client: Any, layout: kvstore.Layout, place: str
) -> None:
    if place == "remote":
        with pytest.raises(BadRequest):
            client.slot(0, 10)
        return
    n = layout.block_bytes
    slots = client.reserve(layout, 2, 0)
    for pair in range(0, 6, 2):
        assert len(slots.addresses) == 2
        ids = [slots.first_slot, slots.first_slot + 1]

        def write(views: list[memoryview], first: int = pair) -> list[int]:
            for number, view in enumerate(views):
                view[:] = block(first + number, n)
            return [xxhash.xxh3_64_intdigest(view) for view in views]

        sums = client.write_slots(ids, slots.addresses, n, write)
        parent = key(pair - 1) if pair else b""
        segment = Segment(parent, [key(pair), key(pair + 1)], ids, sums)
        # The slots for the next two come with the answer.
        answer = client.commit(layout, [segment], ahead=2)
        assert answer.outcomes == [CommitOutcome.STORED] * 2
        assert client.commit(layout, [segment]).outcomes == [CommitOutcome.PRESENT] * 2
        slots = answer.slots
    client.abort([slots.first_slot, slots.first_slot + 1])
    assert client.stats().reservations == 0
    missing = Segment(key(5), [key(6)], [0], [7])
    assert client.commit(layout, [missing]).outcomes == [CommitOutcome.ABSENT]
    keys = [key(number) for number in range(7)]
    (lease,) = client.acquire_many([ChainQuery([layout.id], keys)], 0)
    assert lease.held == 6
    for number, address in enumerate(lease.addresses):
        assert bytes(client.slot(address, n)) == block(number, n)
    client.release([lease.lease_id])
    with pytest.raises(LeaseExpired):
        client.slot(lease.addresses[1], n, epoch=b"another")


def test_slots_are_nobody_elses_while_they_are_being_written(
    client: Any, layout: kvstore.Layout, server: Server
) -> None:
    """A client that is closed, or finds its session gone, in the middle of a copy."""
    writer = kvstore.Client(server.socket)
    grant = writer.reserve(layout, 1, 0)
    kept = []

    def write(views: list[memoryview]) -> None:
        writer.close()
        kept.append(client.stats().reservations)

    writer.write_slots([grant.first_slot], grant.addresses, layout.block_bytes, write)
    assert kept == [1]
    until_nothing_is_held(client)
