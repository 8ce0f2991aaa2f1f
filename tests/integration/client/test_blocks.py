"""Putting and getting, with every kind of client against a real server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import kvstore
from kvstore import CommitOutcome, PutOutcome, Segment
from kvstore.client.pieces import PIECE_BLOCKS
from kvstore.client.puts import ASKED_AT_ONCE
from kvstore.errors import (
    BadKey,
    BadRequest,
    BadSize,
    Conflict,
    TooLarge,
    UnknownLayout,
)
from kvstore.local.copy import checksum, copy_checked
from tests.integration.client.conftest import (
    MIB,
    Server,
    block,
    key,
    layout_of,
    until_nothing_is_held,
)


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 100_000, MIB - 1, MIB, MIB + 1, 4 * MIB])
def test_what_was_put_is_got_byte_for_byte(client: Any, nbytes: int) -> None:
    layout = layout_of(client, nbytes)
    data = block(nbytes, nbytes)
    assert client.get(layout, key(nbytes)) is None
    assert client.put(layout, key(nbytes), data) is PutOutcome.STORED
    got = client.get(layout, key(nbytes))
    assert isinstance(got, bytes)
    assert got == data


def test_the_bytes_are_those_for_clients_of_the_other_kind_too(
    client: Any, layout: kvstore.Layout, server: Server
) -> None:
    client.put(layout, key(1), block(1, layout.block_bytes))
    for endpoint in (server.socket, server.remote):
        with kvstore.Client(endpoint) as other:
            assert other.get(layout, key(1)) == block(1, layout.block_bytes)


def test_getting_into_a_buffer_fills_it_and_nothing_behind_it(
    client: Any, layout: kvstore.Layout
) -> None:
    n = layout.block_bytes
    client.put(layout, key(1), block(1, n))
    buffer = bytearray(b"\xee" * (n + 10))
    got = client.get(layout, key(1), into=buffer)
    assert isinstance(got, memoryview)
    assert got.nbytes == n
    assert buffer == block(1, n) + b"\xee" * 10
    assert client.get(layout, key(2), into=buffer) is None


def test_many_blocks_go_in_one_call_and_misses_lie_between_them(client: Any) -> None:
    layout = layout_of(client, 5000)
    keys = [key(number) for number in range(700)]
    datas = [block(number, 5000) for number in range(700)]
    assert client.put_many(layout, keys, datas) == [PutOutcome.STORED] * 700
    asked = [
        name for pair in zip(keys, map(key, range(10_000, 10_700)), strict=True) for name in pair
    ]
    got = client.get_many(layout, asked)
    assert got[0::2] == datas
    assert got[1::2] == [None] * 700
    assert client.put_many(layout, [], []) == []
    assert client.get_many(layout, []) == []


def test_the_same_bytes_again_are_present_and_other_bytes_a_conflict(
    client: Any, layout: kvstore.Layout
) -> None:
    n = layout.block_bytes
    assert client.put(layout, key(1), block(1, n)) is PutOutcome.STORED
    assert client.put(layout, key(1), block(1, n)) is PutOutcome.PRESENT
    with pytest.raises(Conflict):
        client.put(layout, key(1), block(2, n))
    with pytest.raises(Conflict):
        client.put_many(layout, [key(0), key(1)], [block(0, n), block(2, n)])
    assert client.get(layout, key(1)) == block(1, n)
    assert client.get(layout, key(0)) == block(0, n), "the others of the call are stored"
    assert client.stats().reservations == 0, "the failed put keeps its slots"


def test_a_block_that_another_client_stores_meanwhile_is_present(
    client: Any, layout: kvstore.Layout, server: Server
) -> None:
    n = layout.block_bytes
    with kvstore.Client(server.socket) as writer:
        grant = writer.reserve(layout, 1, 0)
        data = memoryview(block(1, n))
        writer.write_slots(
            [grant.first_slot], grant.addresses, n, lambda views: copy_checked(views[0], data)
        )
        assert client.get(layout, key(1)) is None, "nothing is there before the commit"
        assert client.put(layout, key(1), block(1, n)) is PutOutcome.STORED
        segment = Segment(b"", [key(1)], [grant.first_slot], [checksum(block(1, n))])
        assert writer.commit(layout, [segment]).outcomes == [CommitOutcome.PRESENT]
        assert client.get(layout, key(1)) == block(1, n)
        stats = client.stats()
        assert (stats.reservations, stats.tenant_blocks, stats.tiers[0].blocks) == (0, 1, 1)


def test_of_clients_that_put_a_block_at_once_one_stores_it(
    server: Server, connect: Callable[..., Any]
) -> None:
    clients = [connect(server) for _ in range(3)]
    layouts = [layout_of(client, 300_000) for client in clients]
    barrier = threading.Barrier(len(clients))

    def put(index: int, number: int) -> list[PutOutcome]:
        barrier.wait(10)
        keys = [key(number), key(number + 1)]
        datas = [block(number, 300_000), block(number + 1, 300_000)]
        outcomes: list[PutOutcome] = clients[index].put_many(layouts[index], keys, datas)
        return outcomes

    with ThreadPoolExecutor(len(clients)) as pool:
        for number in range(0, 40, 2):
            putting = [pool.submit(put, index, number) for index in range(len(clients))]
            for outcomes in zip(*(each.result(30) for each in putting), strict=True):
                assert sorted(o.value for o in outcomes) == ["present", "present", "stored"]
    assert clients[0].stats().reservations == 0
    for number in range(40):
        assert clients[1].get(layouts[1], key(number)) == block(number, 300_000)


def test_a_put_costs_a_call_a_piece_and_one_more(client: Any, place: str) -> None:
    """From afar two a piece, since the bytes are sent as well."""
    layout = layout_of(client, 4096)
    for pieces, first in ((1, 0), (3, 10_000)):
        numbers = range(first, first + PIECE_BLOCKS * pieces)
        keys = [key(number) for number in numbers]
        datas = [block(number, 4096) for number in numbers]
        asked = -(-len(keys) // ASKED_AT_ONCE)
        before = client.counters.rpcs
        assert client.put_many(layout, keys, datas) == [PutOutcome.STORED] * len(keys)
        calls = 1 + pieces if place == "local" else asked + 2 * pieces
        assert client.counters.rpcs - before == calls
        # And where all is there, only the questions whether it is.
        before = client.counters.rpcs
        assert client.put_many(layout, keys, datas) == [PutOutcome.PRESENT] * len(keys)
        assert client.counters.rpcs - before == asked + (0 if place == "local" else 1)
        assert client.stats().reservations == 0


def test_the_slots_of_a_client_that_is_gone_are_free_again(client: Any, server: Server) -> None:
    layout = layout_of(client, 4 * MIB)
    writer = kvstore.Client(server.socket)
    grant = writer.reserve(layout, 1000, 0)
    assert 8 <= len(grant.addresses) <= 16
    assert client.put(layout, key(1), block(1, 4 * MIB), wait_ms=0) is PutOutcome.DENIED
    writer.close()
    assert client.put(layout, key(1), block(1, 4 * MIB), wait_ms=5000) is PutOutcome.STORED


@pytest.mark.parametrize("wrong", [b"", b"x" * 31, b"x" * 33])
def test_a_key_of_the_wrong_length_is_a_bad_key(
    client: Any, layout: kvstore.Layout, wrong: bytes
) -> None:
    data = block(1, layout.block_bytes)
    with pytest.raises(BadKey):
        client.put(layout, wrong, data)
    with pytest.raises(BadKey):
        client.get(layout, wrong)
    with pytest.raises(BadKey):
        client.lookup(layout, [wrong])
    with pytest.raises(BadKey):
        client.acquire(layout, [wrong])


def test_a_block_of_the_wrong_size_is_a_bad_size(client: Any, layout: kvstore.Layout) -> None:
    n = layout.block_bytes
    for size in (0, n - 1, n + 1):
        with pytest.raises(BadSize):
            client.put(layout, key(1), b"x" * size)
    with pytest.raises(BadSize):
        client.get(layout, key(1), into=bytearray(n - 1))
    with pytest.raises(BadRequest):
        client.get(layout, key(1), into=b"x" * n)
    with pytest.raises(BadRequest):
        client.put_many(layout, [key(1), key(2)], [b"x" * n])


def test_a_layout_nobody_registered_is_unknown(client: Any) -> None:
    spec = kvstore.LayoutSpec(model="other", dtype="f", block_tokens=1, block_bytes=8)
    layout = kvstore.Layout(spec.layout_id, spec)
    with pytest.raises(UnknownLayout):
        client.put(layout, key(1), b"12345678")
    with pytest.raises(UnknownLayout):
        client.lookup(layout, [key(1)])


def test_more_keys_than_the_server_takes_are_too_large(client: Any, layout: kvstore.Layout) -> None:
    limit = client.server_info().max_keys
    with pytest.raises(TooLarge):
        client.lookup(layout, [key(number) for number in range(limit + 1)])
    with pytest.raises(TooLarge):
        # More than a message holds: gRPC itself refuses that.
        client.lookup(layout, [key(number) for number in range(600_000)])
    assert client.lookup(layout, [key(1)]).held == 0


def test_what_does_not_fit_is_denied_and_nothing_is_leaked(client: Any) -> None:
    layout = layout_of(client, 4 * MIB)
    keys = [key(number) for number in range(40)]
    leases = []
    stored = 0
    for number in range(40):
        outcome = client.put(layout, keys[number], block(number, 4 * MIB), wait_ms=0)
        if outcome is PutOutcome.DENIED:
            break
        stored += 1
        leases.append(client.acquire(layout, [keys[number]], wait_ms=0))
    assert 0 < stored < 40
    # Of many at once the first ones are stored, as many as there is room for.
    leases.pop().release()
    leases.pop().release()
    client.flush()
    more = [key(number) for number in range(100, 140)]
    outcomes = client.put_many(layout, more, [block(7, 4 * MIB)] * 40, wait_ms=0)
    room = outcomes.count(PutOutcome.STORED)
    assert outcomes == [PutOutcome.STORED] * room + [PutOutcome.DENIED] * (40 - room)
    assert 2 <= room < 40
    for lease in leases:
        lease.release()
    stats = client.stats()
    assert (stats.leases, stats.reservations) == (0, 0)


def test_counts_are_those_of_this_tenant(client: Any, layout: kvstore.Layout) -> None:
    n = layout.block_bytes
    client.put_many(layout, [key(1), key(2)], [block(1, n), block(2, n)])
    stats = client.stats()
    assert stats.tenant_blocks == 2
    assert {tier.tier.label for tier in stats.tiers} == {"dram", "nvme"}
    assert client.clear() == 2
    assert client.get(layout, key(1)) is None


def test_blocks_flushed_and_dropped_come_back_from_the_next_tier(
    client: Any, layout: kvstore.Layout
) -> None:
    n = layout.block_bytes
    keys = [key(1), key(2)]
    client.put_many(layout, keys, [block(1, n), block(2, n)])
    assert client.flush(drop=True) == 2
    assert client.lookup(layout, keys) == (2, 0)
    assert client.prefetch(layout, keys) in range(3)
    assert client.get_many(layout, keys) == [block(1, n), block(2, n)]


def test_threads_share_one_client(server: Server) -> None:
    with kvstore.Client(server.socket) as client:
        layout = layout_of(client, 70_000)
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for number in range(seed * 1000, seed * 1000 + 15):
                    client.put(layout, key(number), block(number, 70_000))
                    assert client.get(layout, key(number)) == block(number, 70_000)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        until_nothing_is_held(client)


def test_a_get_leaves_no_lease_behind(client: Any, layout: kvstore.Layout) -> None:
    """Its release is sent and not waited for, but it is sent."""
    data = block(1, layout.block_bytes)
    client.put(layout, key(1), data)
    for _ in range(200):
        assert client.get(layout, key(1)) == data
    until_nothing_is_held(client)
