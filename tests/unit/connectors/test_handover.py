"""What a decode vLLM waits for, how long, and that nothing said in between harms it."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_connectors.vllm import handover
from kvstore_connectors.vllm import scheduler as module
from kvstore_connectors.vllm.groups import Rule
from tests.unit.connectors.fakes import BLOCK_TOKENS, FakeRequest, bands_with, outcome
from tests.unit.connectors.test_scheduler import World

FOR_DECODE = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None}
BY_PREFILL = {"do_remote_prefill": True, handover.TOKENS: 4 * BLOCK_TOKENS}

NONSENSE: list[Any] = [
    {},
    [],
    "do_remote_prefill",
    {"do_remote_prefill": "yes", "do_remote_decode": 1},
    {"do_remote_prefill": None, handover.TOKENS: 1 << 70},
    {"remote_block_ids": [[1, 2], None], "remote_port": {}},
]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def world() -> World:
    return World()


def arrive(world: World, params: Any, seed: int = 0) -> FakeRequest:
    tokens = [seed * 1000 + index for index in range(4 * BLOCK_TOKENS + 1)]
    request = FakeRequest(tokens, kv_transfer_params=params)
    world.side.on_new_request(request)  # type: ignore[arg-type]
    return request


def answered(world: World, request: FakeRequest) -> dict[str, Any] | None:
    return world.side.request_finished(request, ())[1]  # type: ignore[arg-type]


def test_decode_loads_a_prompt_while_it_is_being_stored(world: World, clock: Clock) -> None:
    request = arrive(world, BY_PREFILL)
    world.queue.seen = 0
    assert world.match(request) == (None, False), "no block is held before the first has come"
    clock.now_s += 0.9
    world.queue.seen = 2 * BLOCK_TOKENS
    assert world.match(request, BLOCK_TOKENS) == (3 * BLOCK_TOKENS, True)
    assert not world.queue.tickets, "the workers ask"
    world.alloc(request, 3 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    (job,) = world.meta().loads
    assert job.arrivals is not None and not job.parts
    assert job.arrivals.block_ids == [2, 3, 4]
    assert job.arrivals.keys == request.block_hashes[1:4]
    assert (job.epoch, job.arrivals.patience_s) == (b"epoch", 1.0)
    sources = world.side.get_external_cache_hit_sources(request, 3 * BLOCK_TOKENS)  # type: ignore[arg-type]
    assert sources == {CacheHitSource.HOST: 3 * BLOCK_TOKENS}
    world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    world.alloc(request, 0, [1, 2, 3, 4, 5])
    assert not world.meta().unwanted
    world.finish(request)
    assert not world.meta().unwanted
    assert world.quiet()


def test_what_has_gone_again_while_a_request_waited_is_not_offered(
    world: World, clock: Clock
) -> None:
    request = arrive(world, BY_PREFILL)
    world.queue.seen = 4 * BLOCK_TOKENS
    assert world.match(request) == (4 * BLOCK_TOKENS, True)
    world.queue.seen = 0
    assert world.match(request) == (None, False)
    clock.now_s += 1.1
    assert world.match(request) == (0, False)


def test_an_abort_ends_the_wait_for_what_is_still_to_come(world: World) -> None:
    request = arrive(world, BY_PREFILL)
    world.queue.seen = BLOCK_TOKENS
    world.match(request)
    world.alloc(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    world.meta()
    world.finish(request)
    assert world.meta().unwanted == [request.request_id]
    assert not world.side.is_quiet()
    world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    assert world.quiet()


def test_a_prompt_that_must_not_fail_is_waited_for_as_a_whole(clock: Clock) -> None:
    """Where a failed load fails the request, prefill being late may not."""
    world = World(follows=False)
    request = arrive(world, BY_PREFILL)
    world.queue.seen = 3 * BLOCK_TOKENS
    assert world.match(request) == (None, False)
    assert not world.queue.tickets
    clock.now_s += handover.LOOK_EVERY_S
    world.queue.seen = 4 * BLOCK_TOKENS
    assert world.match(request) == (None, False)
    world.queue.answer(world.queue.tickets[0], 4)
    assert world.match(request) == (4 * BLOCK_TOKENS, True)


def test_windows_that_come_after_the_rest_are_waited_for(clock: Clock) -> None:
    world = World(bands=bands_with(Rule(), Rule(window=2 * BLOCK_TOKENS)))
    request = arrive(world, BY_PREFILL)
    world.queue.seen = 4 * BLOCK_TOKENS
    for held in (0, 2, 4):
        assert world.match(request) == (None, False)
        clock.now_s += handover.ASK_EVERY_S
        world.queue.answer(world.queue.tickets[-1], held, full=4)
        expected = (4 * BLOCK_TOKENS, True) if held == 4 else (None, False)
        assert world.match(request) == expected
        assert len(world.queue.out) == (held == 4), "a lease too short is given back"
        clock.now_s += handover.ASK_EVERY_S
    world.finish(request)
    assert world.quiet()


def test_windows_are_loaded_as_far_as_they_have_come_in_time(clock: Clock) -> None:
    world = World(bands=bands_with(Rule(), Rule(window=2 * BLOCK_TOKENS)))
    request = arrive(world, BY_PREFILL)
    for blocks in (1, 2):
        world.queue.seen = blocks * BLOCK_TOKENS
        assert world.match(request) == (None, False)
        assert not world.queue.tickets, "a look costs no call"
        clock.now_s += 0.9  # Of 1: each block that comes renews the wait.
    clock.now_s += 0.2
    assert world.match(request) == (None, False)
    (ticket,) = world.queue.tickets
    world.queue.answer(ticket, 2)
    assert world.match(request) == (2 * BLOCK_TOKENS, True)
    assert world.side.stats.data["handover_timeouts"] == 1


def test_decode_computes_at_once_when_nothing_came_in_time(world: World, clock: Clock) -> None:
    request = arrive(world, BY_PREFILL)
    world.queue.seen = 0
    assert world.match(request) == (None, False)
    clock.now_s += 1.1
    assert world.match(request) == (0, False)
    assert not world.queue.tickets


def test_looks_are_not_more_frequent_than_blocks_can_come(world: World, clock: Clock) -> None:
    request = arrive(world, BY_PREFILL)
    world.queue.seen = 0
    world.match(request)
    world.queue.seen = 4 * BLOCK_TOKENS
    assert world.match(request) == (None, False)
    clock.now_s += handover.LOOK_EVERY_S
    assert world.match(request) == (4 * BLOCK_TOKENS, True)


def test_decode_does_not_wait_for_a_prefill_that_stored_nothing(world: World) -> None:
    world.queue.seen = 0
    assert world.match(arrive(world, BY_PREFILL | {handover.TOKENS: 0})) == (0, False)


def test_without_a_number_decode_waits_for_the_whole_prompt(world: World, clock: Clock) -> None:
    world.queue.seen = 3 * BLOCK_TOKENS
    request = arrive(world, {"do_remote_prefill": True})
    assert world.match(request) == (4 * BLOCK_TOKENS, True)


@pytest.mark.parametrize("number", [-1, 2.5, True, "8", None, 1 << 70])
def test_a_wrong_number_means_no_more_than_the_prompt(world: World, number: Any) -> None:
    tokens = handover.tokens_to_come({"do_remote_prefill": True, handover.TOKENS: number}, 16)
    assert 0 <= tokens <= 16


@pytest.mark.parametrize("params", NONSENSE)
def test_nonsense_is_served_as_if_nothing_had_been_said(world: World, params: Any) -> None:
    world.queue.seen = 0
    request = arrive(world, params)
    assert world.match(request) == (0, False)
    assert answered(world, request) is None
    assert world.quiet()


def test_prefill_tells_decode_how_far_to_wait(world: World) -> None:
    world.queue.seen = 0
    request = arrive(world, FOR_DECODE)
    assert world.match(request) == (0, False)
    assert answered(world, request) == BY_PREFILL | {"do_remote_decode": False}


@pytest.mark.parametrize("why", ["short", "bypassed", "detached", "consumer"])
def test_prefill_promises_nothing_that_it_does_not_store(why: str) -> None:
    world = World(stores=why != "consumer")
    if why == "detached":
        world.link.up = False
    size = 1 if why == "short" else 4 * BLOCK_TOKENS + 1
    request = FakeRequest(list(range(size)), kv_transfer_params=FOR_DECODE)
    if why == "bypassed":
        request.resumable = True
    world.side.on_new_request(request)  # type: ignore[arg-type]
    answer = answered(world, request)
    assert answer is not None and answer[handover.TOKENS] == 0


@pytest.mark.parametrize("rules", [(Rule(),), (Rule(), Rule(window=2 * BLOCK_TOKENS))])
def test_a_thousand_hand_overs_cancelled_at_any_point_leave_nothing(
    rules: tuple[Rule, ...], clock: Clock
) -> None:
    world = World(bands=bands_with(*rules))
    for number in range(1000):
        request = arrive(world, BY_PREFILL, seed=number)
        world.queue.seen = (number % 5) * BLOCK_TOKENS
        tokens, _ = world.match(request)
        if number % 3 == 0:
            clock.now_s += 1.1
            tokens, _ = world.match(request)
        if number % 2 == 0 and world.queue.tickets:
            world.queue.answer(world.queue.tickets.pop(), 4)
            tokens, _ = world.match(request)
        if tokens and number % 7:
            world.alloc(request, tokens, *[[1, 2, 3, 4, 5]] * len(rules))
            world.meta()
        world.finish(request)
        world.meta()
        world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    assert world.quiet()


def test_an_engine_that_loads_nothing_waits_for_nothing(clock: Clock) -> None:
    for world, skips in ((World(loads=False), False), (World(), True)):
        request = FakeRequest(list(range(4 * BLOCK_TOKENS)), kv_transfer_params=BY_PREFILL)
        request.skip_reading_prefix_cache = skips
        world.side.on_new_request(request)  # type: ignore[arg-type]
        assert world.match(request) == (0, False)
        world.meta()
        assert world.queue.waits == 0, "an idle step is not held up"


def test_a_store_that_goes_away_ends_the_wait(world: World, clock: Clock) -> None:
    request = arrive(world, BY_PREFILL)
    world.queue.seen = 0
    assert world.match(request) == (None, False)
    world.link.up = False
    assert world.match(request) == (0, False)
