"""What a request says of its blocks reaches the store, and can never cost the request."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.types import Retention, Reuse
from kvstore_connectors.vllm.hints import reuse_of, urgency_of
from kvstore_connectors.vllm.positions import Wanted, queries
from tests.unit.connectors.fakes import BLOCK_TOKENS, FULL, FakeRequest
from tests.unit.connectors.test_scheduler import World

END = 1 << 53


def told(params: Any = None, **fields: Any) -> Reuse:
    request: Any = FakeRequest([1, 2], "r", kv_transfer_params=params, **fields)
    return reuse_of(request)


def test_a_request_that_says_nothing_is_a_usual_one() -> None:
    assert told() == Reuse(50, (), b"", "", b"r")


def test_vllms_priority_counts_the_other_way_round_and_within_bounds() -> None:
    assert [told(priority=each).priority for each in (-1000, -7, 0, 7, 1000)] == [
        100,
        57,
        50,
        43,
        0,
    ]


def test_what_is_worth_keeping_is_no_more_urgent_for_that() -> None:
    request: Any = FakeRequest([1, 2], priority=10, kv_transfer_params={"kvstore_priority": 90})
    assert (urgency_of(request), reuse_of(request).priority) == (40, 90)


def test_all_that_can_be_said_is_understood() -> None:
    params = {
        "kvstore_priority": 80,
        "kvstore_category": "chat",
        "kvstore_retention": [
            {"first_token": 0, "stop_token": 4096, "priority": 100, "ttl_ms": 600_000},
            {"first_token": 8192},
        ],
        "do_remote_decode": True,
    }
    retention = (Retention(0, 4096, 100, 600_000), Retention(8192, END, 80, None))
    expected = Reuse(80, retention, b"agent-7", "chat", b"r")
    assert told(params, priority=3, session_id="agent-7") == expected


@pytest.mark.parametrize(
    "params",
    [
        "nonsense",
        ["kvstore_priority"],
        {"kvstore_priority": 101},
        {"kvstore_priority": -1},
        {"kvstore_priority": True},
        {"kvstore_priority": 50.0},
        {"kvstore_priority": "high"},
        {"kvstore_category": "c" * 65},
        {"kvstore_category": "\udcff" * 65},
        {"kvstore_category": 7},
        {"kvstore_category": "output"},
        {"kvstore_retention": {"first_token": 0}},
        {"kvstore_retention": [7, None, {"first_token": 5, "stop_token": 5}]},
        {"kvstore_retention": [{"priority": 101}, {"ttl_ms": 0}, {"ttl_ms": -1}]},
        {"kvstore_retention": [{"first_token": -1}, {"stop_token": 1 << 64}]},
    ],
)
def test_what_is_not_understood_counts_as_not_said(params: Any) -> None:
    assert told(params) == told()


def test_no_more_is_sent_than_the_server_takes() -> None:
    assert len(told({"kvstore_retention": [{}] * 1000}).retention) == 16


def test_long_names_are_told_apart_within_64_bytes() -> None:
    names = {told(session_id="s" * length).session for length in (64, 65, 66, 1000)}
    assert len(names) == 4
    assert all(len(name) <= 64 for name in names)


def test_leases_and_stores_bring_what_their_request_says() -> None:
    world = World()
    request: Any = FakeRequest(list(range(4 * BLOCK_TOKENS + 1)), priority=-20, session_id="s")
    world.side.on_new_request(request)
    world.match(request)
    asked = world.queue.tickets[0].wanted
    assert asked is not None
    assert (asked.reuse, asked.urgency) == (reuse_of(request), 70)
    (job,) = world.compute(request, 2 * BLOCK_TOKENS, [1, 2]).stores
    assert job.reuse == reuse_of(request)
    assert job.reuse.priority == 70


def test_of_a_request_that_says_nothing_its_name_is_all_that_is_known() -> None:
    world = World()
    (job,) = world.compute(world.request(), 2 * BLOCK_TOKENS, [1, 2]).stores
    assert job.said is None
    assert job.reuse == Reuse(request=job.request_id.encode())


def test_every_part_of_a_long_prompt_is_asked_for_with_what_its_request_says() -> None:
    reuse = Reuse(70, request=b"r")
    wanted = Wanted({BLOCK_TOKENS: [bytes(32)] * 10}, 10 * BLOCK_TOKENS, 0, reuse)
    asked = queries(FULL, wanted, 10 * BLOCK_TOKENS, lambda band: [b"layout"], most_keys=4)
    assert [query.chain.reuse for query in asked] == [reuse] * 3
