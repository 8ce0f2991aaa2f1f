"""Calls under way in the background: each is made once, in bounded time, by few threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kvstore.client import background
from kvstore.client.background import MOST_THREADS, Background
from kvstore.errors import BadKey, Unavailable


def until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_what_was_started_is_done_while_its_caller_goes_on() -> None:
    going = threading.Event()
    outcome = Background().start(lambda: going.wait(60))
    going.set()
    assert outcome.wait(60) is True
    assert outcome.wait(0) is True, "and can be asked for again"


def test_an_error_is_raised_to_whoever_waits() -> None:
    def fail() -> None:
        raise BadKey("no")

    outcome = Background().start(fail)
    for _ in range(2):
        with pytest.raises(BadKey):
            outcome.wait(60)


def test_nobody_waits_longer_than_he_wants() -> None:
    going = threading.Event()
    outcome = Background().start(lambda: going.wait(60))
    with pytest.raises(Unavailable):
        outcome.wait(0.01)
    going.set()
    assert outcome.wait(60) is True


def test_what_nobody_waits_for_is_done_all_the_same() -> None:
    done = threading.Event()
    Background().start(done.set)
    assert done.wait(60)


def test_no_call_waits_for_another_until_there_are_very_many() -> None:
    going, counted = threading.Event(), threading.Semaphore(0)

    def work() -> bool:
        counted.release()
        return going.wait(60)

    pool = Background()
    outcomes = [pool.start(work) for _ in range(3 * MOST_THREADS)]
    for _ in range(MOST_THREADS):
        assert counted.acquire(timeout=60)
    assert not counted.acquire(timeout=0.05), "no more threads than that"
    going.set()
    assert all(outcome.wait(60) for outcome in outcomes)


def test_threads_are_used_again_and_end_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "IDLE_S", 60.0)
    pool = Background()
    used = set()
    for _ in range(20):
        used.add(pool.start(threading.get_ident).wait(60))
        until(lambda: pool._free == 1)
    assert len(used) == 1
    monkeypatch.setattr(background, "IDLE_S", 0.1)
    assert pool.start(threading.get_ident).wait(60) in used
    until(lambda: pool._threads == 0)
    assert pool._free == 0
    assert pool.start(lambda: 5).wait(60) == 5


def test_a_machine_without_threads_is_an_error_and_not_a_call_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Background()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(Unavailable):
            pool.start(lambda: 1)
    assert pool.start(lambda: 1).wait(60) == 1
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        until(lambda: pool._free == 1)
        # What there is does the work.
        assert [pool.start(lambda: 2).wait(60) for _ in range(3)] == [2, 2, 2]
