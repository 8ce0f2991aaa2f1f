"""Lookups on the server's host: answered from shared memory, and kept true."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

import kvstore
from kvstore.client.presence import OPEN_FOR_NS
from kvstore.errors import BadKey, BadRequest, UnknownLayout
from kvstore.types import LayoutSpec
from tests.integration.client.conftest import Server, block, key, layout_of


def keys_of(count: int, start: int = 0) -> list[bytes]:
    return [key(number) for number in range(start, start + count)]


def test_a_lookup_makes_no_rpc_whether_it_hits_or_misses(server: Server) -> None:
    with kvstore.Client(server.socket) as client:
        layout = layout_of(client, 4096)
        held = keys_of(40, 1000)
        client.put_many(layout, held, [block(1, 4096)] * 40)
        before = client.counters.rpcs
        for ask in (client.lookup, lambda layout, keys: client.peek([layout.id], keys)):
            for _ in range(100):
                assert ask(layout, held) == (40, 40)
                assert ask(layout, held + keys_of(216, 5000)) == (40, 40)
                assert ask(layout, held[:1]) == (1, 1)
                assert ask(layout, keys_of(256, 6000)) == (0, 0)
                assert ask(layout, []) == (0, 0)
        assert client.counters.rpcs == before
        client.stats()
        assert client.counters.rpcs == before + 1, "it does count"


def test_an_async_lookup_makes_no_rpc_either(server: Server) -> None:
    async def run() -> None:
        async with kvstore.AsyncClient(server.socket) as client:
            spec = LayoutSpec(model="m", dtype="f", block_tokens=1, block_bytes=4096)
            layout = await client.register_layout(spec)
            held = keys_of(40, 1000)
            await client.put_many(layout, held, [block(1, 4096)] * 40)
            before = client.counters.rpcs
            for _ in range(100):
                assert await client.lookup(layout, held + keys_of(5, 5000)) == (40, 40)
                assert await client.lookup(layout, keys_of(256, 6000)) == (0, 0)
                assert client.peek([layout.id], held) == (40, 40)
            assert client.counters.rpcs == before

    asyncio.run(run())


def test_a_lookup_takes_nothing_of_the_server_and_outlives_its_pauses(
    fresh_server: Server,
) -> None:
    """Answered while the server is stopped, but not for longer than it may be trusted."""
    with kvstore.Client(fresh_server.socket) as client:
        layout = layout_of(client, 4096)
        client.put(layout, key(1), block(1, 4096))
        fresh_server.send(signal.SIGSTOP)
        stopped = time.monotonic()
        assert client.lookup(layout, [key(1), key(2)]) == (1, 1)
        assert client.lookup(layout, [key(2)]) == (0, 0)
        while True:
            asked = time.monotonic()
            found = client.peek([layout.id], [key(1)])
            if found is None:
                break
            assert found == (1, 1)
            assert asked - stopped < 2.5
            time.sleep(0.01)
        fresh_server.send(signal.SIGCONT)
        assert client.lookup(layout, [key(1)]) == (1, 1)


def test_a_server_that_was_killed_is_not_believed_for_long(fresh_server: Server) -> None:
    """Its directory looks alive for two seconds more."""
    with kvstore.Client(fresh_server.socket) as client:
        layout = layout_of(client, 4096)
        client.put(layout, key(1), block(1, 4096))
        for _ in range(3):
            assert client.peek([layout.id], [key(1)]) == (1, 1)
        fresh_server.kill()
        time.sleep(OPEN_FOR_NS / 1e9)
        assert client.peek([layout.id], [key(1)]) is None


def test_a_closed_client_does_not_look_up(server: Server) -> None:
    with kvstore.Client(server.socket) as client:
        layout = layout_of(client, 4096)
        assert client.peek([layout.id], [key(1)]) == (0, 0)
    assert client.peek([layout.id], [key(1)]) is None
    with pytest.raises(BadRequest, match="closed"):
        client.lookup(layout, [key(1)])


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_look_up_with_its_parents_client(server: Server) -> None:
    """Not even right after its parent did, when the connection counts as open."""
    with kvstore.Client(server.socket) as client:
        layout = layout_of(client, 4096)
        client.lookup(layout, [key(1)])
        child = os.fork()
        if child == 0:
            try:
                client.lookup(layout, [key(1)])
            except BadRequest:
                os._exit(client.peek([layout.id], [key(1)]) is not None)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.peek([layout.id], [key(1)]) == (0, 0)


def test_a_lookup_follows_what_the_store_does(fresh_server: Server) -> None:
    with kvstore.Client(fresh_server.socket) as client:
        layout = layout_of(client, 4096)
        keys = keys_of(8)
        assert client.lookup(layout, keys) == (0, 0)
        grant = client.reserve(layout, len(keys), 0)
        assert client.lookup(layout, keys) == (0, 0), "reserved is not held"
        client.abort(range(grant.first_slot, grant.first_slot + len(keys)))
        client.put_many(layout, keys[:5], [block(1, 4096)] * 5)
        assert client.lookup(layout, keys) == (5, 5)
        client.clear()
        assert client.lookup(layout, keys) == (0, 0)


def test_a_lookup_tells_what_must_be_brought_up(server: Server) -> None:
    with kvstore.Client(server.socket) as client:
        layout = layout_of(client, 4096)
        keys = keys_of(8)
        client.put_many(layout, keys, [block(1, 4096)] * 8)
        client.flush(drop=True)
        assert client.lookup(layout, keys) == (8, 0)
        with client.acquire(layout, keys[:3]):
            assert client.lookup(layout, keys) == (8, 3)


def test_a_restart_is_not_answered_from_the_past(fresh_server: Server) -> None:
    with kvstore.Client(fresh_server.socket) as client:
        layout = layout_of(client, 4096)
        client.put(layout, key(1), block(1, 4096))
        assert client.lookup(layout, [key(1)]) == (1, 1)
        fresh_server.kill()
        fresh_server.start()
        deadline = time.monotonic() + 30
        while True:
            try:
                assert client.lookup(layout, [key(1)]) == (0, 0)
                break
            except kvstore.Unavailable:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_a_lookup_that_makes_no_sense_gets_its_error(server: Server) -> None:
    with kvstore.Client(server.socket) as client:
        layout = layout_of(client, 4096)
        with pytest.raises(BadKey):
            client.lookup(layout, [b"short"])
        stranger = kvstore.Layout(b"x" * 16, LayoutSpec("m", "f", 1, 4096))
        with pytest.raises(UnknownLayout):
            client.lookup(stranger, [key(1)])


def test_the_directory_grows_under_its_readers(fresh_server: Server) -> None:
    """64 MiB of 4 KiB blocks fill the first table beyond its load."""
    with (
        kvstore.Client(fresh_server.socket) as client,
        kvstore.Client(fresh_server.socket) as other,
    ):
        layout = layout_of(client, 4096)
        other_layout = layout_of(other, 4096)
        slots = other._core.link.presence._reader.header.slots  # type: ignore[union-attr]
        keys = keys_of(6000, 10**6)
        for start in range(0, 6000, 1000):
            chunk = keys[start : start + 1000]
            parent = keys[start - 1] if start else b""
            client.put_many(layout, chunk, [block(1, 4096)] * 1000, parent=parent)
        deadline = time.monotonic() + 20
        while True:
            found = other.lookup(other_layout, keys)
            grown = other._core.link.presence._reader.header.slots  # type: ignore[union-attr]
            if grown > slots:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert found == (6000, 6000)
        assert client.lookup(layout, keys) == (6000, 6000)
