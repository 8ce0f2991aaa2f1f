"""Leases and reservations at the low level, as connectors use them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import xxhash

import kvstore
from kvstore import ChainQuery, ReserveOutcome
from kvstore.errors import (
    BadRequest,
    ForeignLease,
    ForeignReservation,
    LeaseExpired,
    ReservationExpired,
    UnknownReservation,
)
from tests.integration.client.conftest import Server, block, key, layout_of


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
    fresh_server.start("--lease-ms", "300", "--reservation-ms", "1000")
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
    grant = client.reserve(layout, [(key(2), b"")], 0)
    time.sleep(1.3)
    # That of a remote client is forgotten at once: nobody else writes its slots.
    with pytest.raises((ReservationExpired, UnknownReservation)):
        client.commit(grant.reservation_id, [0], [0])
    client.abort(grant.reservation_id)
    assert client.get(layout, key(2)) is None


def test_leases_and_reservations_of_another_session_are_foreign(
    client: Any, layout: kvstore.Layout, chain: list[bytes], server: Server
) -> None:
    with kvstore.Client(server.socket) as other:
        lease = other.acquire(layout, chain)
        grant = other.reserve(layout, [(key(50), b"")], 0)
        with pytest.raises(ForeignLease):
            client.renew([lease.lease_id])
        with pytest.raises(ForeignLease):
            client.release([lease.lease_id])
        with pytest.raises(ForeignReservation):
            client.commit(grant.reservation_id, [0], [0])
        with pytest.raises(ForeignReservation):
            client.abort(grant.reservation_id)
        assert lease.read(0) == block(0, layout.block_bytes)


def test_a_connector_writes_slots_itself_and_other_processes_read_them(
    client: Any, layout: kvstore.Layout, place: str
) -> None:
    if place == "remote":
        with pytest.raises(BadRequest):
            client.slot(0, 10, False)
        return
    n = layout.block_bytes
    entries = [(key(1), b""), (key(2), key(1)), (key(1), b"")]
    grant = client.reserve(layout, entries, 0)
    outcomes = [result.outcome for result in grant.results]
    assert outcomes[:2] == [ReserveOutcome.GRANTED] * 2
    assert outcomes[2] is ReserveOutcome.PENDING
    sums = []
    for number in range(2):
        view = client.slot(grant.results[number].address, n, True, epoch=client.epoch)
        view[:] = block(number, n)
        sums.append(xxhash.xxh3_64_intdigest(view))
    client.commit(grant.reservation_id, [0, 1], sums)
    client.commit(grant.reservation_id, [0, 1], sums)
    (lease,) = client.acquire_many([ChainQuery([layout.id], [key(1), key(2)])], 0)
    assert lease.checksums == sums
    assert bytes(client.slot(lease.addresses[1], n, False)) == block(1, n)
    client.release([lease.lease_id])
    with pytest.raises(LeaseExpired):
        client.slot(lease.addresses[1], n, False, epoch=b"another")


def test_a_block_damaged_in_memory_is_a_miss_and_counted(
    client: Any, layout: kvstore.Layout, server: Server
) -> None:
    """Whoever damages it: here a client that committed a checksum of other bytes."""
    with kvstore.Client(server.socket) as writer:
        grant = writer.reserve(layout, [(key(1), b"")], 0)
        writer.commit(grant.reservation_id, [0], [12345])
        assert client.get(layout, key(1)) is None
        assert client.get(layout, key(1), into=bytearray(layout.block_bytes)) is None
        with client.acquire(layout, [key(1)]) as lease:
            assert lease.read(0) is None
        assert client.counters.corrupt == 3
