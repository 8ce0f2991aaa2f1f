"""Memory of the server that is not what was stored: whoever notices says so, and nobody is
given it again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvstore
from kvstore.types import Segment
from tests.integration.client.conftest import Server, block, key, layout_of

UntilDropped = Callable[[Callable[[], object]], None]

KEYS = [key(number) for number in range(4)]


def damage(writer: kvstore.Client, layout: kvstore.Layout, number: int) -> None:
    """As a process may that has the memory mapped."""
    with writer.acquire(layout, [key(number)]) as lease:
        assert writer._core.link is not None
        arena = writer._core.link.arena
        assert arena is not None
        arena.view(lease.addresses[0], layout.block_bytes, writable=True)[7] ^= 1


@pytest.fixture
def writer(server: Server) -> Iterator[kvstore.Client]:
    with kvstore.Client(server.socket) as client:
        yield client


def found_damaged(client: kvstore.Client) -> int:
    stats = client.stats()
    return stats.corrupt_blocks + stats.mismatched_blocks


@pytest.fixture
def until_dropped(writer: kvstore.Client) -> UntilDropped:
    """Reads until one more block was found damaged. The first time is mostly enough, but
    the server does not listen to everything."""
    before = found_damaged(writer)

    def wait(read: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while found_damaged(writer) == before:
            assert time.monotonic() < deadline
            read()
            time.sleep(0.02)
        assert found_damaged(writer) == before + 1

    return wait


def test_what_a_get_finds_damaged_is_read_from_nvme_next(
    client: Any, layout: kvstore.Layout, writer: kvstore.Client, until_dropped: UntilDropped
) -> None:
    datas = [block(number, layout.block_bytes) for number in range(4)]
    writer.put_many(layout, KEYS, datas)
    writer.flush()
    damage(writer, layout, 1)
    assert client.get_many(layout, KEYS) == [datas[0], None, *datas[2:]]
    assert client.counters.corrupt == 1
    until_dropped(lambda: client.get(layout, KEYS[1]))
    seen = client.counters.corrupt
    assert client.get_many(layout, KEYS) == datas
    assert client.counters.corrupt == seen


def test_what_is_nowhere_else_is_gone_and_can_be_stored_again(
    client: Any, layout: kvstore.Layout, writer: kvstore.Client, until_dropped: UntilDropped
) -> None:
    datas = [block(number, layout.block_bytes) for number in range(4)]
    writer.put_many(layout, KEYS, datas)
    damage(writer, layout, 3)
    with client.acquire(layout, KEYS) as lease:
        until_dropped(lambda: lease.read(3))
        assert lease.read(3) is None, "who has it keeps it"
        assert lease.read(0) == datas[0]
    seen = client.counters.corrupt
    assert client.get_many(layout, KEYS) == [*datas[:3], None]
    assert client.counters.corrupt == seen
    assert set(client.put_many(layout, KEYS, datas)) == {
        kvstore.PutOutcome.PRESENT,
        kvstore.PutOutcome.STORED,
    }
    assert client.get_many(layout, KEYS) == datas


def test_nobody_can_have_good_blocks_dropped(
    client: Any, layout: kvstore.Layout, writer: kvstore.Client
) -> None:
    datas = [block(number, layout.block_bytes) for number in range(4)]
    writer.put_many(layout, KEYS, datas)
    before = found_damaged(writer)
    with writer.acquire(layout, KEYS) as lease:
        for _ in range(20):
            client.report_damage(lease.addresses)
            client.report_damage([0, 1, lease.addresses[0] + 1, (1 << 64) - 1])
    assert client.get_many(layout, KEYS) == datas
    assert found_damaged(writer) == before


def test_a_wrong_checksum_is_found_out_once(
    connect: Callable[..., Any],
    server: Server,
    writer: kvstore.Client,
    until_dropped: UntilDropped,
) -> None:
    """A client that lies at its commit, and so has its own block dropped."""
    layout = layout_of(writer, 5000)
    grant = writer.reserve(layout, 1, 0)
    writer.commit(layout, [Segment(b"", [KEYS[0]], [grant.first_slot], [12345])])
    client = connect(server)
    layout_of(client, 5000)
    until_dropped(lambda: client.get(layout, KEYS[0]))
    seen = client.counters.corrupt
    assert seen
    assert client.get(layout, KEYS[0], into=bytearray(5000)) is None
    assert client.counters.corrupt == seen
