"""Finding, losing and finding the server again; asking it in the background."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from kvstore.errors import TooMany, Unavailable
from kvstore_connectors.vllm import link as link_module
from kvstore_connectors.vllm.acquire import AcquireQueue, Ticket, TicketState
from kvstore_connectors.vllm.config import ConnectorConfig
from kvstore_connectors.vllm.link import StoreLink, connector_of
from kvstore_connectors.vllm.positions import Wanted
from tests.unit.connectors.fakes import BLOCK_TOKENS, FULL, FakeStore, prefills_at, spec


def wanted(*keys: bytes, urgency: int = 50) -> Wanted:
    return Wanted({BLOCK_TOKENS: list(keys)}, len(keys) * BLOCK_TOKENS, 0, urgency=urgency)


def eventually(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(link_module, "BACKOFF_FIRST_S", 0.005)
    monkeypatch.setattr(link_module, "BACKOFF_MOST_S", 0.01)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def link(store: FakeStore) -> Iterator[StoreLink]:
    link = StoreLink(store.connect, [spec()], "test")
    yield link
    store.gate.set()
    link.close()


@pytest.fixture
def queue(link: StoreLink) -> Iterator[AcquireQueue]:
    queue = AcquireQueue(link, FULL, 10, True)
    link.start()
    assert link.wait_attached(30)
    queue.start()
    yield queue
    queue.close()


def test_no_server_makes_nobody_wait_and_one_line_of_log(
    store: FakeStore, link: StoreLink, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("vllm.kvstore")
    logger.addHandler(caplog.handler)
    try:
        store.error = Unavailable("nobody there")
        link.start()
        eventually(lambda: store.calls.count("connect") > 5)
        assert not link.up
        with link.borrow() as attached:
            assert attached is None
        store.error = None
        assert link.wait_attached(30)
    finally:
        logger.removeHandler(caplog.handler)
    # vLLM's loggers may pass records on: each is counted once.
    warnings = {id(r) for r in caplog.records if r.levelno >= logging.WARNING}
    assert len(warnings) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_at_the_default_is_no_store_and_one_line_of_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = tmp_path / f"kvstore-{os.getuid()}"
    directory.mkdir()
    os.chown(directory, 1001, 1001)
    tries = 0

    def connect() -> link_module.StoreClient:
        nonlocal tries
        tries += 1
        return connector_of(ConnectorConfig())()

    logger = logging.getLogger("vllm.kvstore")
    logger.addHandler(caplog.handler)
    link = StoreLink(connect, [spec()], "test")
    try:
        link.start()
        assert not link.wait_first_try(30)
        eventually(lambda: tries > 3)
    finally:
        link.close()
        logger.removeHandler(caplog.handler)
    warnings = {id(r): r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING}
    (warning,) = warnings.values()
    assert "another user" in warning
    assert not list(directory.iterdir())


def test_starting_waits_for_a_server_that_is_coming_and_not_for_one_that_is_not(
    store: FakeStore, link: StoreLink
) -> None:
    store.gate.clear()
    link.start()
    assert not link.wait_first_try(0.02)
    threading.Timer(0.02, store.gate.set).start()
    assert link.wait_first_try(30)
    absent = FakeStore()
    absent.error = Unavailable("nobody there")
    other = StoreLink(absent.connect, [spec()], "test")
    other.start()
    assert not other.wait_first_try(30)
    other.close()


def test_a_dead_server_is_noticed_without_a_request_and_found_again(
    store: FakeStore, link: StoreLink
) -> None:
    link.start()
    assert link.wait_attached(30)
    store.error = Unavailable("gone")
    eventually(lambda: not link.up)
    store.error = None
    eventually(lambda: link.up)
    assert link.generation == 1
    store.epoch = b"another life"
    eventually(lambda: link.generation == 2)
    eventually(lambda: link.up)


def test_a_life_of_the_server_is_looked_for_once_and_past_ones_never(
    store: FakeStore, link: StoreLink
) -> None:
    link.start()
    assert link.wait_attached(30)
    first = link.current
    store.epoch = b"another life"
    assert link.seeks(b"another life")
    assert link.wait_attached(30) and link.generation == 2
    assert not link.seeks(b"epoch")
    second = link.current
    assert link.seeks(b"unheard of")
    eventually(lambda: link.current is not None and link.current is not second)
    third = link.current
    assert link.seeks(b"unheard of")
    assert link.current is third and third is not first


def test_a_client_is_closed_only_after_its_last_user(store: FakeStore, link: StoreLink) -> None:
    link.start()
    assert link.wait_attached(30)
    with link.borrow() as attached:
        assert attached is not None
        store.error = Unavailable("gone")
        link.failed(attached, store.error)
        assert not link.up
        time.sleep(0.02)
        assert not store.closed
    assert store.closed


def test_other_layouts_are_registered_before_they_are_used(
    store: FakeStore, link: StoreLink
) -> None:
    link.start()
    assert link.wait_attached(30)
    other = spec(block_bytes=128)
    link.change_layouts([other])
    eventually(lambda: link.up)
    with link.borrow() as attached:
        assert attached is not None
        assert [layout.id for layout in attached.layouts] == [other.layout_id]


def submit(queue: AcquireQueue, *keys: bytes) -> Ticket:
    ticket = queue.submit(lambda: wanted(*keys))
    queue.wake()
    return ticket


def test_what_is_urgent_is_asked_for_first_and_nothing_else_as_urgently(
    store: FakeStore, link: StoreLink
) -> None:
    """A batch job's blocks must not come up before those that somebody waits for."""
    link.start()
    assert link.wait_attached(30)
    queue = AcquireQueue(link, FULL, 10, True, threads=1)
    urgencies = [50, 20, 60, 50, 90, 0]
    keys = [bytes([urgency]) * 32 for urgency in urgencies]
    tickets = [
        queue.submit(partial(wanted, key, urgency=urgency))
        for key, urgency in zip(keys, urgencies, strict=True)
    ]
    queue.start()
    queue.wake()
    eventually(lambda: all(ticket.state is TicketState.ANSWERED for ticket in tickets))
    calls = zip(store.hints, store.acquired, strict=True)
    asked = [(hints.priority, [chain.keys[0][0] for chain in chains]) for hints, chains in calls]
    assert asked == [(90, [60, 90]), (50, [50, 50]), (20, [20, 0])]
    queue.close()


def test_requests_that_wait_are_asked_for_in_one_call(
    store: FakeStore, queue: AcquireQueue
) -> None:
    store.blocks = {b"a": bytes(64), b"b": bytes(64)}
    store.gate.clear()
    for _ in range(3):  # One for each thread.
        busy = submit(queue, b"a")
        eventually(lambda busy=busy: busy.state is TicketState.SENT)
    eventually(lambda: store.calls.count("acquire") == 3)
    waiting = [submit(queue, b"a", b"b", b"c") for _ in range(5)]
    calls = store.calls.count("acquire")
    store.gate.set()
    eventually(lambda: all(t.state is TicketState.ANSWERED for t in waiting))
    assert store.calls.count("acquire") == calls + 1
    assert [t.held.tokens for t in waiting if t.held] == [2 * BLOCK_TOKENS] * 5


def test_the_store_is_told_how_fast_the_engine_computes(
    store: FakeStore, queue: AcquireQueue
) -> None:
    store.blocks = {b"a": bytes(64)}
    first = submit(queue, b"a")
    eventually(lambda: first.state is TicketState.ANSWERED)
    prefills_at(queue.prefill, 12_345.0)
    second = submit(queue, b"a")
    eventually(lambda: second.state is TicketState.ANSWERED)
    assert [hints.tokens_per_s for hints in store.hints] == [0.0, 12_345.0]


def test_of_what_is_foreseen_that_is_prefetched_which_is_held_and_not_in_memory(
    store: FakeStore, queue: AcquireQueue
) -> None:
    store.shows_directory = True
    store.blocks = dict.fromkeys((b"a", b"b", b"c"), bytes(64))
    store.behind = {b"b"}
    for keys in ((b"a",), (b"a", b"b", b"x"), (b"y",), (b"b", b"c")):
        queue.foresee(partial(wanted, *keys))
    queue.wake()
    eventually(lambda: len(store.prefetched) == 2)
    assert sorted(chain.keys for chain in store.prefetched) == [[b"a", b"b"], [b"b", b"c"]]
    store.error = Unavailable("gone")
    queue.foresee(lambda: wanted(b"b"))
    queue.wake()
    eventually(lambda: queue.errors == 1)


def test_an_answer_nobody_waits_for_any_more_gives_its_lease_back(
    store: FakeStore, queue: AcquireQueue
) -> None:
    store.blocks = {b"a": bytes(64)}
    store.gate.clear()
    late = submit(queue, b"a")
    eventually(lambda: late.state is TicketState.SENT)
    queue.cancel(late)
    kept = submit(queue, b"a")
    store.gate.set()
    eventually(lambda: kept.state is TicketState.ANSWERED)
    queue.cancel(kept)
    queue.wake()
    eventually(lambda: store.calls.count("release") and not store.leases)


def test_only_what_can_be_seen_to_be_gone_counts_as_lacking(
    store: FakeStore, queue: AcquireQueue, link: StoreLink
) -> None:
    (band,) = FULL.bands
    store.blocks = {b"a": bytes(64)}
    assert not queue.lacks(band, b"b"), "nobody can see"
    store.shows_directory = True
    assert queue.lacks(band, b"b")
    assert not queue.lacks(band, b"a")
    link.close()
    assert not queue.lacks(band, b"b"), "nobody is there"


def test_a_prompt_that_nobody_can_ask_for_holds_up_no_other(
    store: FakeStore, queue: AcquireQueue
) -> None:
    def broken() -> Wanted:
        raise RuntimeError("a bug")

    store.blocks = {b"a": bytes(64)}
    broken_one = queue.submit(broken)
    other = submit(queue, b"a")
    eventually(lambda: other.state is TicketState.ANSWERED)
    assert broken_one.state is TicketState.FAILED
    assert queue.errors == 1


def test_a_lost_server_answers_every_ticket(
    store: FakeStore, queue: AcquireQueue, link: StoreLink
) -> None:
    store.error = Unavailable("gone")
    tickets = [submit(queue, b"a") for _ in range(10)]
    eventually(lambda: all(t.state is TicketState.FAILED for t in tickets))


def test_a_refusal_is_a_miss_and_keeps_the_session(
    store: FakeStore, queue: AcquireQueue, link: StoreLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 60.0)
    time.sleep(0.05)
    store.error = TooMany("leases")
    ticket = submit(queue, b"a")
    eventually(lambda: ticket.state is TicketState.FAILED)
    assert store.connects == 1


def test_waiting_for_an_answer_ends_when_one_comes(store: FakeStore, queue: AcquireQueue) -> None:
    store.gate.clear()
    submit(queue, b"a")
    started_s = time.monotonic()
    queue.wait_answer(0.02)
    assert time.monotonic() - started_s >= 0.02
    threading.Timer(0.05, store.gate.set).start()
    queue.wait_answer(30)
    assert time.monotonic() - started_s < 20
