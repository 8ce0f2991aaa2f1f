"""What callers say of the next use of blocks decides what stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore import Retention, Reuse, SessionState
from kvstore.errors import BadRequest, TooLarge
from kvstore.types import NO_REUSE
from tests.integration.client.conftest import MIB, Server, block, key, layout_of

PROMPT = range(100, 104)


@pytest.fixture(params=["worth", "priority-lru"])
def small_server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Room for 16 blocks of a MiB."""
    server = Server(tmp_path)
    server.start("--dram-capacity", "16MiB", "--policy-eviction", request.param)
    yield server
    server.kill()


def flood(client: Any, layout: kvstore.Layout, reuse: Reuse = NO_REUSE) -> None:
    for number in range(1000, 1040):
        client.put(layout, key(number), block(number, MIB), reuse=reuse)


def held(client: Any, layout: kvstore.Layout) -> int:
    keys = [key(number) for number in PROMPT]
    return client.lookup_many([kvstore.ChainQuery([layout.id], keys)])[0].held  # type: ignore[no-any-return]


def put(client: Any, layout: kvstore.Layout, reuse: Reuse) -> None:
    keys = [key(number) for number in PROMPT]
    client.put_many(layout, keys, [block(number, MIB) for number in PROMPT], reuse=reuse)
    assert held(client, layout) == 4


def test_a_requests_priority_decides_what_stays(small_server: Server) -> None:
    for endpoint in (small_server.socket, small_server.remote):
        with kvstore.Client(endpoint) as client:
            layout = layout_of(client, MIB)
            put(client, layout, Reuse(priority=10))
            flood(client, layout)
            assert held(client, layout) == 0
            put(client, layout, Reuse(priority=90))
            flood(client, layout)
            assert held(client, layout) == 4
            client.clear()


def test_a_lease_says_it_too_and_a_retention_is_for_its_tokens(small_server: Server) -> None:
    with kvstore.Client(small_server.socket) as client:
        layout = layout_of(client, MIB)
        put(client, layout, Reuse())
        keep = Reuse(retention=(Retention(0, 2 * layout.spec.block_tokens, 100),), request=b"r")
        with client.acquire(layout, [key(number) for number in PROMPT], reuse=keep) as lease:
            assert len(lease) == 4
        flood(client, layout)
        assert held(client, layout) == 2


def test_what_is_out_of_bounds_is_refused(client: Any, layout: kvstore.Layout) -> None:
    data = block(1, layout.block_bytes)
    for wrong in (Reuse(priority=101), Reuse(retention=(Retention(0, 9, 101),))):
        with pytest.raises(BadRequest):
            client.put(layout, key(1), data, reuse=wrong)
    many = (Retention(0, 9, 50),) * 17
    for large in (Reuse(session=bytes(65)), Reuse(category="x" * 65), Reuse(retention=many)):
        with pytest.raises(TooLarge):
            client.put(layout, key(1), data, reuse=large)
    with pytest.raises(BadRequest):
        client.hint(b"", SessionState.ENDED)


def test_a_hint_for_a_session_that_is_not_known_changes_nothing(client: Any) -> None:
    client.hint(b"nobody's", SessionState.WAITING, expected_ms=5000)
