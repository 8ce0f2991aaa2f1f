"""The scheduler's half: what it promises vLLM, and that no lease is ever lost."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_connectors.vllm import leasing as module
from kvstore_connectors.vllm.acquire import TicketState
from kvstore_connectors.vllm.groups import Bands, Rule
from kvstore_connectors.vllm.metadata import JobReport, StepMetadata, StoreJob, WorkerReport
from kvstore_connectors.vllm.orders import KnownKeys
from kvstore_connectors.vllm.scheduler import SchedulerSide
from tests.unit.connectors.fakes import (
    BLOCK_TOKENS,
    FULL,
    FakeBlocks,
    FakeLink,
    FakePins,
    FakeQueue,
    FakeRequest,
    bands_with,
    outcome,
    spec,
    step,
)


class World:
    def __init__(self, world: int = 1, bands: Bands = FULL, **options: Any) -> None:
        self.link = FakeLink(world, len(bands.groups))
        self.queue = FakeQueue(self.link, bands)
        self.pins = FakePins()
        arguments: dict[str, Any] = {
            "link": self.link,
            "queue": self.queue,
            "bands": bands,
            "workers": world,
            "acquire_timeout_ms": 1000,
            "handover_timeout_ms": 1000,
            "loads": True,
            "stores": True,
            "follows": True,
            "specs_for": lambda salt: [spec()],
        }
        self.side = SchedulerSide(**(arguments | options))
        self.side.bind_pins(self.pins)

    def request(self, tokens: int = 4 * BLOCK_TOKENS + 1, seed: int = 0) -> FakeRequest:
        request = FakeRequest([seed * 1000 + index for index in range(tokens)])
        self.side.on_new_request(request)  # type: ignore[arg-type]
        return request

    def match(self, request: FakeRequest, computed: int = 0) -> tuple[int | None, bool]:
        return self.side.get_num_new_matched_tokens(request, computed)  # type: ignore[arg-type]

    def alloc(self, request: FakeRequest, external: int, *blocks: list[int]) -> None:
        self.side.update_state_after_alloc(request, FakeBlocks(*blocks), external)  # type: ignore[arg-type]

    def finish(self, request: FakeRequest) -> None:
        self.side.request_finished(request, ())  # type: ignore[arg-type]

    def meta(self, *args: Any, **kwargs: Any) -> StepMetadata:
        return self.side.build_connector_meta(step(*args, **kwargs))

    def compute(self, request: FakeRequest, tokens: int, *blocks: list[int]) -> StepMetadata:
        meta = self.meta({request.request_id: tokens}, blocks={request.request_id: blocks})
        request.num_computed_tokens += tokens
        return meta

    def report(self, *job_ids: int, lost: bool = False, workers: int = 1) -> None:
        jobs = {job_id: JobReport(workers, lost) for job_id in job_ids}
        self.side.update_connector_output(outcome(kv_connector_worker_meta=WorkerReport(jobs)))

    def quiet(self) -> bool:
        self.side.check_integrity()
        return self.side.is_quiet() and not self.queue.out and not self.pins.held


@pytest.fixture
def world() -> World:
    return World()


def test_matching_waits_for_the_answer_then_offers_whole_blocks(world: World) -> None:
    request = world.request()
    assert world.match(request) == (None, False)
    assert world.match(request) == (None, False)
    (ticket,) = world.queue.tickets
    assert ticket.wanted.keys[BLOCK_TOKENS] == request.block_hashes[:4]
    world.queue.answer(ticket, 3)
    assert world.match(request) == (3 * BLOCK_TOKENS, True)
    assert world.match(request, BLOCK_TOKENS) == (2 * BLOCK_TOKENS, True)


def test_what_a_request_needs_that_waits_behind_others_is_foreseen_once(world: World) -> None:
    served, waiting = world.request(seed=1), world.request(seed=2)
    world.match(served)
    world.meta()
    world.meta()
    assert [wanted.keys[BLOCK_TOKENS] for wanted in world.queue.foreseen] == [waiting.block_hashes]
    assert world.queue.foreseen[0].floor == 0


def test_nothing_is_foreseen_without_a_store_or_for_who_does_not_load(world: World) -> None:
    world.link.up = False
    world.request()
    world.meta()
    assert not world.queue.foreseen
    storing = World(loads=False)
    storing.request()
    storing.meta()
    assert not storing.queue.foreseen


def test_at_least_one_token_is_left_to_compute(world: World) -> None:
    request = world.request(tokens=4 * BLOCK_TOKENS)
    world.match(request)
    assert len(world.queue.tickets[0].wanted.keys[BLOCK_TOKENS]) == 3


def test_a_detached_store_costs_no_question_and_no_wait(world: World) -> None:
    world.link.up = False
    request = world.request()
    assert world.match(request) == (0, False)
    assert not world.queue.tickets
    world.link.up = True
    assert world.match(request) == (0, False)


def test_what_the_directory_does_not_show_is_a_miss_at_once(world: World) -> None:
    """A new prompt, the usual case, costs no call and no step."""
    world.queue.seen = 0
    request = world.request()
    assert world.match(request) == (0, False)
    assert not world.queue.tickets
    world.finish(request)
    assert world.quiet()


def test_what_the_directory_shows_no_further_than_the_local_hit_is_not_asked_for(
    world: World,
) -> None:
    world.queue.seen = 2 * BLOCK_TOKENS
    assert world.match(world.request(), computed=2 * BLOCK_TOKENS) == (0, False)
    assert not world.queue.tickets
    assert world.match(world.request(seed=1), computed=BLOCK_TOKENS) == (None, False)
    assert len(world.queue.tickets) == 1


def test_a_full_local_hit_asks_nothing(world: World) -> None:
    request = world.request()
    assert world.match(request, 4 * BLOCK_TOKENS) == (0, False)
    assert not world.queue.tickets


def test_an_answer_no_longer_than_the_local_hit_gives_its_lease_back(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 2)
    assert world.match(request, 2 * BLOCK_TOKENS) == (0, False)
    assert not world.queue.out


@pytest.mark.parametrize("local", [2, 3, 4])
def test_what_was_leased_for_nothing_is_told_so_that_both_sides_counts_agree(
    world: World, local: int
) -> None:
    """vLLM computes the beginning for another request before this one's turn comes."""
    request = world.request()
    world.match(request, BLOCK_TOKENS)
    world.queue.answer(world.queue.tickets[0], 4)
    world.match(request, local * BLOCK_TOKENS)
    if local < 4:
        world.alloc(request, (4 - local) * BLOCK_TOKENS, [1, 2, 3, 4])
    assert world.side.stats.data["unneeded_blocks"] == local - 1


@pytest.mark.parametrize("answer", ["nothing", "failure"])
def test_nothing_held_is_a_miss_and_is_not_asked_again(world: World, answer: str) -> None:
    request = world.request()
    world.match(request)
    if answer == "nothing":
        world.queue.answer(world.queue.tickets[0], 0)
    else:
        world.queue.fail(world.queue.tickets[0])
    assert world.match(request) == (0, False)
    assert world.match(request) == (0, False)
    assert len(world.queue.tickets) == 1


def test_a_hung_server_costs_one_patience_and_then_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    first, second = world.request(seed=1), world.request(seed=2)
    assert world.match(first) == (None, False)
    now[0] += 1.2
    assert world.match(first) == (None, False)
    now[0] += 0.1
    assert world.match(first) == (0, False)
    assert world.link.suspected == 1
    assert world.match(second) == (0, False)
    assert world.queue.tickets[0].state is TicketState.CANCELLED
    world.finish(first)
    world.finish(second)
    assert world.quiet()


def test_a_ticket_nobody_took_to_the_server_does_not_accuse_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    request = world.request()
    world.match(request)
    world.queue.tickets[0].sent_s = 0.0
    now[0] += 2
    assert world.match(request) == (0, False)
    assert world.link.up


def test_a_load_names_every_ranks_own_addresses() -> None:
    world = World(world=2)
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4)
    assert world.match(request, BLOCK_TOKENS) == (3 * BLOCK_TOKENS, True)
    world.alloc(request, 3 * BLOCK_TOKENS, [70, 71, 72, 73, 74])
    (job,) = world.meta().loads
    (part,) = job.parts
    assert part.block_ids == [71, 72, 73]
    assert part.addresses == [[1, 2, 3], [1001, 1002, 1003]]
    assert part.checksums == [[1, 2, 3], [5001, 5002, 5003]]
    assert job.epoch == b"epoch"


def test_the_lease_of_a_load_lasts_until_the_load_is_reported(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4)
    world.match(request)
    world.alloc(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    world.meta()
    world.alloc(request, 0, [1, 2, 3, 4, 5])
    assert len(world.queue.out) == 1
    world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    assert not world.queue.out


def test_an_abort_while_loading_keeps_the_lease_until_the_copy_has_ended(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4)
    world.match(request)
    world.alloc(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    world.meta()
    world.finish(request)
    assert len(world.queue.out) == 1
    world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    assert world.quiet()


@pytest.mark.parametrize("when", ["asked", "answered", "matched"])
def test_an_abort_before_the_load_gives_everything_back(world: World, when: str) -> None:
    request = world.request()
    world.match(request)
    if when != "asked":
        world.queue.answer(world.queue.tickets[0], 4)
    if when == "matched":
        world.match(request)
    world.finish(request)
    assert world.quiet()


def test_a_lease_about_to_end_is_exchanged_for_a_new_one(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4, expires_ns=1)
    assert world.match(request) == (None, False)
    assert not world.queue.out
    assert world.match(request) == (None, False)
    world.queue.answer(world.queue.tickets[1], 4)
    assert world.match(request) == (4 * BLOCK_TOKENS, True)


def test_a_lease_that_begins_beyond_what_vllm_still_has_is_exchanged(world: World) -> None:
    request = world.request()
    world.match(request, 2 * BLOCK_TOKENS)
    world.queue.answer(world.queue.tickets[0], 4)
    assert world.match(request, BLOCK_TOKENS) == (None, False)
    assert not world.queue.out
    assert world.match(request, BLOCK_TOKENS) == (None, False)
    world.queue.answer(world.queue.tickets[1], 4)
    assert world.match(request, BLOCK_TOKENS) == (3 * BLOCK_TOKENS, True)
    world.alloc(request, 3 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    (job,) = world.meta().loads
    assert job.parts[0].block_ids == [2, 3, 4]


def test_a_failed_load_is_not_tried_again_until_the_request_is_preempted(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4)
    world.match(request)
    world.alloc(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    assert world.match(request) == (0, False)
    request.num_preemptions = 1
    assert world.match(request) == (None, False)


def test_an_answer_before_what_the_engine_has_counts_for_nothing() -> None:
    """vLLM's metrics refuse amounts below zero, and with that end every request."""
    world = World(bands=bands_with(Rule(), Rule(window=2 * BLOCK_TOKENS)))
    request = world.request()
    world.match(request, 2 * BLOCK_TOKENS)
    world.queue.answer(world.queue.tickets[0], 0)
    world.finish(request)
    assert "unneeded_blocks" not in world.side.stats.data
    assert world.quiet()


def test_a_lease_on_less_than_a_request_can_begin_after_is_given_back() -> None:
    """vLLM's groups that are not stored may align hits to more than a block."""
    bands = dataclasses.replace(FULL, alignment=2 * BLOCK_TOKENS)
    world = World(bands=bands)
    request = world.request()
    world.match(request)
    (ticket,) = world.queue.tickets
    world.queue.answer(ticket, 1)
    assert ticket.held is not None
    ticket.held.tokens = bands.aligned(ticket.held.tokens)
    assert world.match(request) == (0, False)
    world.finish(request)
    assert world.quiet()


def test_another_connector_chosen_for_the_load_ends_our_lease(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4)
    world.match(request)
    world.alloc(request, 0, [1, 2, 3, 4, 5])
    assert not world.queue.out


def test_waiting_requests_pin_a_bounded_number_of_leases(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OUTSTANDING", 2)
    requests = [world.request(seed=index) for index in range(4)]
    for request in requests:
        assert world.match(request) == (None, False)
    assert len(world.queue.tickets) == 2
    world.finish(requests[0])
    world.match(requests[2])
    assert len(world.queue.tickets) == 3


@pytest.mark.parametrize("attribute", ["resumable", "skip_reading_prefix_cache"])
def test_requests_whose_keys_do_not_say_it_all_bypass_the_store(
    world: World, attribute: str
) -> None:
    request = FakeRequest(list(range(20)))
    setattr(request, attribute, True)
    world.side.on_new_request(request)  # type: ignore[arg-type]
    assert world.match(request) == (0, False)
    assert not world.queue.tickets


def test_hits_are_attributed_to_the_tier_they_came_from(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4, from_dram=3)
    world.match(request, BLOCK_TOKENS)
    world.alloc(request, 3 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    sources = world.side.get_external_cache_hit_sources(request, 3 * BLOCK_TOKENS)  # type: ignore[arg-type]
    assert sources == {CacheHitSource.HOST: 2 * BLOCK_TOKENS, CacheHitSource.DISK: BLOCK_TOKENS}


def test_only_an_idle_step_waits_for_answers(world: World) -> None:
    request, other = world.request(seed=1), world.request(seed=2)
    world.match(request)
    world.compute(other, 3, [9])
    assert world.queue.waits == 0
    assert world.meta().idle
    assert world.queue.waits == 1
    world.queue.answer(world.queue.tickets[0], 0)
    world.match(request)
    world.meta()
    assert world.queue.waits == 1


# -- models of several groups -----------------------------------------------------

HYBRID = bands_with(Rule(), Rule(window=6), Rule(state=True))
"""A window of two blocks, beside full attention and a state."""


def matched(world: World, request: FakeRequest, held: int, local: int = 0) -> None:
    world.match(request, local * BLOCK_TOKENS)
    world.queue.answer(world.queue.tickets[-1], held)
    tokens = (held - local) * BLOCK_TOKENS
    assert world.match(request, local * BLOCK_TOKENS) == (tokens, True)


def test_a_load_fills_of_each_group_what_its_layers_look_at() -> None:
    world = World(world=2, bands=HYBRID)
    request = world.request()
    matched(world, request, 4)
    tables = [10, 11, 12, 13, 14], [0, 0, 22, 23, 24], [0, 0, 0, 33, 34]
    world.alloc(request, 4 * BLOCK_TOKENS, *tables)
    (job,) = world.meta().loads
    assert [part.block_ids for part in job.parts] == [[10, 11, 12, 13], [22, 23], [33]]
    assert [part.group for part in job.parts] == [0, 1, 2]
    assert [part.addresses[1] for part in job.parts] == [
        [1000, 1001, 1002, 1003], [1002, 1003], [1003],
    ]  # fmt: skip


def test_what_the_engine_has_of_a_window_is_not_overwritten() -> None:
    world = World(bands=HYBRID)
    request = world.request()
    matched(world, request, 4, local=3)
    world.alloc(request, BLOCK_TOKENS, *[[1, 2, 3, 4]] * 3)
    (job,) = world.meta().loads
    assert [part.block_ids for part in job.parts] == [[4], [4], [4]]


def test_a_load_of_less_than_was_leased_cannot_succeed() -> None:
    """Its windows and states would be those of another position."""
    world = World(bands=HYBRID)
    request = world.request()
    matched(world, request, 4)
    world.alloc(request, 3 * BLOCK_TOKENS, *[[1, 2, 3, 4]] * 3)
    (job,) = world.meta().loads
    assert job.expires_ns == 0


def test_windows_are_stored_where_a_later_prompt_can_resume() -> None:
    world = World(bands=bands_with(Rule(), Rule(window=6)))
    request = world.request(tokens=6 * BLOCK_TOKENS + 1)
    table = [1, 2, 3, 4, 5, 6, 7]
    full, window = world.compute(request, 6 * BLOCK_TOKENS + 1, table, table).stores
    assert full.block_ids == [1, 2, 3, 4, 5, 6]
    assert window.block_ids == [5, 6]
    assert window.group == 1
    assert window.parents == request.block_hashes[3:5]


def test_windows_are_stored_where_prompts_were_seen_to_part() -> None:
    """Full attention went on in the store, but nothing could be resumed there."""
    world = World(bands=bands_with(Rule(), Rule(window=6)))
    request = world.request(tokens=6 * BLOCK_TOKENS + 1)
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 0, full=3)
    assert world.match(request) == (0, False)
    table = [1, 2, 3, 4, 5, 6, 7]
    full, window = world.compute(request, 6 * BLOCK_TOKENS + 1, table, table).stores
    assert full.block_ids == [4, 5, 6]
    assert window.block_ids == [2, 3, 5, 6]


def test_blocks_that_left_the_window_are_not_read() -> None:
    world = World(bands=bands_with(Rule(), Rule(window=6), retention=None))
    request = world.request(tokens=4 * BLOCK_TOKENS)
    table = [1, 2, 3, 4]
    _, window = world.compute(request, 4 * BLOCK_TOKENS, table, [0, 0, 13, 14]).stores
    assert window.block_ids == [13, 14]
    assert window.keys == request.block_hashes[2:4]


def test_states_are_stored_from_where_vllm_hands_them_over() -> None:
    world = World(bands=bands_with(Rule(), Rule(state=True)))
    request = world.request(tokens=4 * BLOCK_TOKENS + 1)
    request_id = request.request_id
    states = [(1, 77, 4 * BLOCK_TOKENS), (1, 78, 4 * BLOCK_TOKENS + 2), (1, 79, 9 * BLOCK_TOKENS)]
    meta = world.meta(
        {request_id: 4 * BLOCK_TOKENS},
        blocks={request_id: [[1, 2, 3, 4], [0, 0, 0, 9]]},
        states={request_id: states},
    )
    _, state = meta.stores
    assert (state.group, state.block_ids, state.parents) == (1, [77], [b""])
    assert state.keys == request.block_hashes[3:4]


def test_nothing_is_stored_before_blocks_can_be_pinned() -> None:
    world = World()
    world.side._orders.pins = None
    request = world.request()
    assert not world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores


# -- stores -----------------------------------------------------------------------


def test_chunks_store_each_full_prompt_block_once_with_its_parent(world: World) -> None:
    request = world.request(tokens=3 * BLOCK_TOKENS + 2)
    first = world.compute(request, BLOCK_TOKENS + 1, [10, 11])
    second = world.compute(request, BLOCK_TOKENS, [10, 11, 12])
    third = world.compute(request, BLOCK_TOKENS + 1, [10, 11, 12, 13])
    jobs = [*first.stores, *second.stores, *third.stores]
    keys = request.block_hashes
    assert [job.block_ids for job in jobs] == [[10], [11], [12]]
    assert [job.keys for job in jobs] == [keys[:1], keys[1:2], keys[2:3]]
    assert [job.parents for job in jobs] == [[b""], keys[:1], keys[1:2]]


@pytest.mark.parametrize("params", [None, {"do_remote_decode": True}, {"do_remote_decode": "yes"}])
def test_what_another_vllm_is_to_decode_is_stored_as_such(world: World, params: Any) -> None:
    request = FakeRequest(list(range(2 * BLOCK_TOKENS + 1)), kv_transfer_params=params)
    world.side.on_new_request(request)  # type: ignore[arg-type]
    (job,) = world.compute(request, 2 * BLOCK_TOKENS + 1, [10, 11, 12]).stores
    assert job.handed_over == (params == {"do_remote_decode": True})


def test_decoded_tokens_are_not_stored(world: World) -> None:
    request = world.request(tokens=BLOCK_TOKENS + 1)
    world.compute(request, BLOCK_TOKENS + 1, [10, 11])
    for _ in range(2 * BLOCK_TOKENS):
        assert not world.compute(request, 1, [10, 11, 12, 13]).stores


def test_blocks_known_in_the_store_are_not_stored_again(world: World) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 2)
    world.match(request)
    world.alloc(request, 2 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 2 * BLOCK_TOKENS
    (job,) = world.compute(request, 2 * BLOCK_TOKENS + 1, [1, 2, 3, 4, 5]).stores
    assert job.block_ids == [3, 4]
    twin = world.request()
    assert not world.compute(twin, 4 * BLOCK_TOKENS + 1, [6, 7, 8, 9, 10]).stores


def test_what_is_loaded_is_not_looked_for_again_when_it_comes_to_storing(world: World) -> None:
    """It was leased a moment ago; and where all of a prompt is there, nothing is ordered."""
    for rest, stored in ((False, [4]), (True, [])):
        world.queue.seen = None
        request = world.request(tokens=4 * BLOCK_TOKENS, seed=rest)
        world.match(request)
        world.queue.answer(world.queue.tickets[-1], 3, rest=rest)
        world.match(request)
        world.alloc(request, 3 * BLOCK_TOKENS, [1, 2, 3, 4])
        world.side.update_connector_output(outcome(finished_recving={request.request_id}))
        request.num_computed_tokens = 3 * BLOCK_TOKENS
        # As if nothing were there any more.
        world.queue.seen = 0
        world.side._orders.forget()
        jobs = world.compute(request, BLOCK_TOKENS, [1, 2, 3, 4]).stores
        assert [block_id for job in jobs for block_id in job.block_ids] == stored


@pytest.mark.parametrize(
    "said", [{"failed_recving": {"r"}}, {"invalid_block_ids": {2}}], ids=["request", "blocks"]
)
def test_what_could_not_be_loaded_is_stored_when_it_is_computed(
    world: World, said: dict[str, Any]
) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 4, rest=True)
    world.match(request)
    world.alloc(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    world.queue.seen = 0
    world.side.update_connector_output(outcome(**said))
    world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    (job,) = world.compute(request, 4 * BLOCK_TOKENS + 1, [1, 2, 3, 4, 5]).stores
    assert job.block_ids == [1, 2, 3, 4]


def test_what_was_loaded_before_a_reset_is_not_stored_after_it_though_it_failed(
    world: World,
) -> None:
    request = world.request()
    world.match(request)
    world.queue.answer(world.queue.tickets[0], 3)
    world.match(request)
    world.alloc(request, 3 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    world.side.reset()
    ended = {request.request_id}
    world.side.update_connector_output(outcome(finished_recving=ended, invalid_block_ids={3}))
    assert not world.compute(request, 4 * BLOCK_TOKENS + 1, [1, 2, 3, 4, 5]).stores


def test_what_a_worker_lost_is_stored_when_it_comes_up_again(world: World) -> None:
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    world.report(job.job_id, lost=True)
    twin = world.request()
    assert len(world.compute(twin, 4 * BLOCK_TOKENS, [5, 6, 7, 8]).stores) == 1


def test_a_restarted_server_is_known_to_hold_nothing(world: World) -> None:
    request = world.request()
    world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4])
    world.link.generation += 1
    twin = world.request()
    assert len(world.compute(twin, 4 * BLOCK_TOKENS, [5, 6, 7, 8]).stores) == 1


def test_evicted_blocks_are_stored_again(world: World) -> None:
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    world.report(job.job_id)
    twin = world.request()
    world.match(twin)
    world.queue.answer(world.queue.tickets[0], 1)
    world.match(twin)
    (again,) = world.compute(twin, 4 * BLOCK_TOKENS, [5, 6, 7, 8]).stores
    assert again.keys == twin.block_hashes[1:4]


@pytest.mark.parametrize("loads", [True, False], ids=["loads", "only stores"])
def test_what_the_store_is_seen_to_have_evicted_is_stored_again(loads: bool) -> None:
    """An engine that finds a prompt in its own cache, or only stores, asks for no leases."""
    world = World(loads=loads)
    world.queue.seen = 0
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    twin = world.request()
    world.match(twin, 4 * BLOCK_TOKENS)
    assert not world.compute(twin, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores, "under way"
    world.report(job.job_id)
    world.queue.seen = 4 * BLOCK_TOKENS
    twin = world.request()
    world.match(twin, 4 * BLOCK_TOKENS)
    assert not world.compute(twin, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores, "there"
    world.queue.seen = BLOCK_TOKENS
    twin = world.request()
    world.match(twin, 4 * BLOCK_TOKENS)
    (again,) = world.compute(twin, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    assert again.block_ids == [1, 2, 3, 4]


@pytest.mark.parametrize("loads", [True, False], ids=["asks", "only stores"])
@pytest.mark.parametrize("rule", [Rule(window=2 * BLOCK_TOKENS), Rule(state=True)], ids=str)
def test_windows_and_states_that_the_store_has_evicted_are_stored_again(
    rule: Rule, loads: bool
) -> None:
    """They are evicted each by itself; without them what is there of the rest is of no use."""
    world = World(bands=bands_with(Rule(), rule), loads=loads)

    def compute(request: FakeRequest) -> list[StoreJob]:
        mine = request.request_id
        tables = ([1, 2, 3, 4, 5], [] if rule.state else [11, 12, 13, 14, 15])
        at = 4 * BLOCK_TOKENS
        states = {mine: [(1, 14, at)]} if rule.state else {}
        return world.meta({mine: at + 1}, blocks={mine: tables}, states=states).stores

    first = world.request()
    full, partial = compute(first)
    assert (full.group, partial.group, partial.block_ids[-1]) == (0, 1, 14)
    world.report(full.job_id, partial.job_id)
    twin = world.request()
    if loads:
        world.match(twin)
        world.queue.answer(world.queue.tickets[0], 0, full=4)
        assert world.match(twin) == (0, False)
    else:
        assert not compute(world.request()), "there"
        world.queue.gone.add(partial.keys[-1])
    (again,) = compute(twin)
    assert (again.group, again.keys) == (1, partial.keys)


def test_blocks_are_pinned_only_while_a_store_reads_them(world: World) -> None:
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    assert not world.side.has_pending_block_frees()
    world.finish(request)
    assert world.side.has_pending_block_frees()
    assert world.side.has_pending_push_work()
    assert world.pins.held == {1: 1, 2: 1, 3: 1, 4: 1}
    world.report(job.job_id)
    assert not world.side.has_pending_block_frees()
    assert world.quiet()
    twin = world.request()
    world.compute(twin, 4 * BLOCK_TOKENS, [5, 6, 7, 8])
    world.finish(twin)
    assert world.quiet()


def test_blocks_that_a_request_keeps_are_pinned_when_it_ends(world: World) -> None:
    """Most stores are over by then, and pinning costs the engine's thread."""
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    assert not world.pins.held
    world.finish(request)
    assert world.pins.held == {1: 1, 2: 1, 3: 1, 4: 1}
    world.report(job.job_id)
    assert world.quiet()


def test_blocks_that_leave_a_window_are_pinned_at_once() -> None:
    world = World(bands=bands_with(Rule(), Rule(window=6), Rule(state=True)))
    request = world.request(tokens=4 * BLOCK_TOKENS + 1)
    request_id = request.request_id
    meta = world.meta(
        {request_id: 4 * BLOCK_TOKENS + 1},
        blocks={request_id: [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15], [0] * 5]},
        states={request_id: [(2, 77, 4 * BLOCK_TOKENS)]},
    )
    assert world.pins.held == {13: 1, 14: 1, 77: 1}
    world.finish(request)
    assert world.pins.held == dict.fromkeys((1, 2, 3, 4, 13, 14, 77), 1)
    world.report(*(job.job_id for job in meta.stores))
    assert world.quiet()


def test_what_was_computed_before_a_reset_is_not_stored_after_it() -> None:
    world = World(bands=bands_with(Rule(), Rule(state=True)))
    request, again = world.request(tokens=4 * BLOCK_TOKENS + 1), world.request(seed=1)
    world.side.reset()
    for each in (request, again):
        meta = world.meta(
            {each.request_id: 4 * BLOCK_TOKENS},
            blocks={each.request_id: [[1, 2, 3, 4], [0, 0, 0, 9]]},
            states={each.request_id: [(1, 77, 4 * BLOCK_TOKENS)]},
        )
        assert not meta.stores
    # Preempted, it is computed anew.
    meta = world.meta(
        {again.request_id: 4 * BLOCK_TOKENS},
        blocks={again.request_id: [[1, 2, 3, 4], [0, 0, 0, 9]]},
        preempted={again.request_id},
        states={again.request_id: [(1, 77, 4 * BLOCK_TOKENS)]},
    )
    assert [job.group for job in meta.stores] == [0, 1]


def test_a_job_is_over_when_every_rank_has_reported_it() -> None:
    world = World(world=2)
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    world.report(job.job_id)
    world.finish(request)
    assert not world.side.is_quiet()
    world.report(job.job_id)
    assert world.quiet()


def test_a_preempted_requests_stores_are_cancelled_in_the_same_step(world: World) -> None:
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    request.num_computed_tokens = 0
    meta = world.meta(preempted={request.request_id})
    assert meta.cancelled == [job.job_id]
    assert not world.pins.held
    (again,) = world.compute(request, 4 * BLOCK_TOKENS, [5, 6, 7, 8]).stores
    assert again.block_ids == [5, 6, 7, 8]
    world.report(job.job_id, lost=True)
    assert not world.pins.held
    assert not world.compute(world.request(), 4 * BLOCK_TOKENS, [9, 10, 11, 12]).stores


def test_stores_are_cancelled_though_the_preempted_request_was_aborted(world: World) -> None:
    request = world.request()
    (job,) = world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    world.finish(request)
    assert world.meta(preempted={request.request_id}).cancelled == [job.job_id]


def test_roles_decide_what_is_done() -> None:
    consumer, producer = World(stores=False), World(loads=False)
    request = consumer.request()
    assert consumer.match(request) == (None, False)
    assert not consumer.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores
    request = producer.request()
    assert producer.match(request) == (0, False)
    assert producer.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4]).stores


def test_a_reset_takes_new_layouts_and_forgets(world: World) -> None:
    request, twin = world.request(), world.request()
    world.compute(request, 4 * BLOCK_TOKENS, [1, 2, 3, 4])
    world.match(twin)
    world.side.reset()
    assert world.link.layouts_changed
    assert world.meta().salt != ""
    assert world.queue.tickets[0].state is TicketState.CANCELLED
    fresh = world.request()
    assert world.compute(fresh, 4 * BLOCK_TOKENS, [5, 6, 7, 8]).stores


def test_the_memory_of_keys_is_bounded_and_keeps_the_latest() -> None:
    known = KnownKeys(capacity=4)
    for keys in ([b"a", b"b"], [b"a"], [b"c"], [b"d"], [b"a"]):
        known.add(keys)
        assert len(known) <= 4
    assert b"b" not in known
    assert b"d" in known
    assert b"a" in known
    known.discard([b"a", b"x"])
    assert b"a" not in known


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_random_requests_leak_nothing(seed: int) -> None:
    """Aborts, preemptions, lost answers and failed loads at any moment."""
    rng = random.Random(seed)
    bands = rng.choice((FULL, bands_with(Rule(), Rule(window=6), Rule(state=True))))
    world = World(rng.choice((1, 2)), bands)
    live: dict[str, FakeRequest] = {}
    loading: set[str] = set()
    jobs: dict[int, str] = {}
    started = 0
    while started < 1000 or live or loading or jobs:
        if started < 1000 and len(live) < 20:
            request = world.request(rng.randrange(1, 30), seed=rng.randrange(40))
            live[request.request_id] = request
            started += 1
        for ticket in world.queue.tickets:
            if ticket.state is TicketState.SENT and rng.random() < 0.5:
                if rng.random() < 0.2:
                    world.queue.fail(ticket)
                else:
                    world.queue.answer(
                        ticket, rng.randrange(ticket.wanted.limit // BLOCK_TOKENS + 1)
                    )
        world.queue.tickets = [t for t in world.queue.tickets if t.state is TicketState.SENT]
        world.link.up = rng.random() < 0.95
        scheduled: dict[str, int] = {}
        tables: dict[str, list[list[int]]] = {}
        preempted: set[str] = set()
        for request_id, request in list(live.items()):
            if request_id in loading:
                continue
            if rng.random() < 0.1 or request.num_computed_tokens >= request.num_prompt_tokens:
                del live[request_id]
                world.finish(request)
            elif request.num_computed_tokens and rng.random() < 0.1:
                request.num_computed_tokens = 0
                request.num_preemptions += 1
                preempted.add(request_id)
            else:
                if request.num_computed_tokens == 0:
                    tokens, _ = world.match(request)
                    if tokens is None or rng.random() < 0.1:
                        continue
                    tables_now = [list(range(1, 40)) for _ in bands.groups]
                    world.alloc(request, tokens, *tables_now)
                    if tokens:
                        loading.add(request_id)
                        continue
                left = request.num_prompt_tokens - request.num_computed_tokens
                scheduled[request_id] = rng.randint(1, left)
                tables[request_id] = [list(range(1, 40)) for _ in bands.groups]
        states = {each: [(len(bands.groups) - 1, 39, BLOCK_TOKENS)] for each in scheduled}
        meta = world.meta(scheduled, blocks=tables, preempted=preempted, states=states)
        for request_id, tokens in scheduled.items():
            live[request_id].num_computed_tokens += tokens
        jobs |= {job.job_id: job.request_id for job in meta.stores}
        ended = {job_id for job_id in jobs if rng.random() < 0.4}
        for job_id in ended:
            del jobs[job_id]
        loaded = {each for each in loading if rng.random() < 0.4}
        loading -= loaded
        for request_id in loaded:
            request = live[request_id]
            request.num_computed_tokens = rng.choice((0, BLOCK_TOKENS))
        workers = len(world.link.specs) // len(bands.groups)
        reports = {job_id: JobReport(workers, rng.random() < 0.2) for job_id in ended}
        world.side.update_connector_output(
            outcome(
                finished_recving=loaded,
                kv_connector_worker_meta=WorkerReport(reports) if reports else None,
            )
        )
        world.side.check_integrity()
    assert world.quiet()
    assert not world.side.has_pending_block_frees()


def test_the_engines_prefill_is_measured_from_step_to_step(world: World) -> None:
    request = world.request(tokens=1024 * BLOCK_TOKENS)
    world.match(request)
    meta = world.compute(request, 512, [1])
    world.report()
    assert world.queue.prefill.tokens_per_s == 0.0, "the end of another step"
    assert world.compute(request, 1, [1]).prefill == 0, "a step that decodes"
    report = WorkerReport(prefill=meta.prefill)
    world.side.update_connector_output(outcome(kv_connector_worker_meta=report))
    assert world.queue.prefill.tokens_per_s > 0.0
