"""Sharing work: every item once, and nobody still at it when the call is over."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections import Counter

import pytest

from kvstore.local import crew
from kvstore.local.crew import Crew


class Busy:
    """Work that takes a moment and knows who is inside."""

    def __init__(self, seconds: float = 0.002) -> None:
        self._seconds = seconds
        self.inside = 0
        self.threads: set[int] = set()
        self.items: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __call__(self, start: int, stop: int) -> None:
        with self._lock:
            self.inside += 1
            self.threads.add(threading.get_ident())
            self.items.update(range(start, stop))
        try:
            time.sleep(self._seconds)
            self.at(start)
        finally:
            with self._lock:
                self.inside -= 1

    def at(self, start: int) -> None:
        """What happens besides, at the end of a part."""


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """As many cores as the tests' crews have threads, whatever machine this is."""
    cores = set(range(8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(cores))
    return cores


@pytest.mark.parametrize(("count", "part"), [(0, 1), (1, 1), (7, 3), (40, 1), (8, 100)])
@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_each_item_is_worked_on_once(count: int, part: int, threads: int) -> None:
    work = Busy()
    Crew(threads).share(work, count, part)
    assert work.items == Counter(range(count))
    assert work.inside == 0


def test_helpers_do_help() -> None:
    both_in = threading.Barrier(2, timeout=10)

    def work(start: int, stop: int) -> None:
        both_in.wait()

    Crew(2).share(work, 2, 1)


def test_helpers_are_kept_off_the_callers_core_and_the_caller_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: dict[int, list[set[int]]] = {}
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda thread, on: kept.setdefault(thread, []).append(on)
    )
    shared, everywhere = Crew(3), set(range(8))
    for here in (3, 3, 5):
        monkeypatch.setattr(crew, "_current_core", lambda here=here: here)
        shared.share(Busy(), 9, 1)
    assert kept.pop(0) == [{3}, everywhere, {3}, everywhere, {5}, everywhere]
    assert list(kept.values()) == [[everywhere - {3}, everywhere - {5}]] * 2


@pytest.mark.parametrize("failing", [False, True])
def test_afterwards_the_caller_may_run_where_it_might_before(
    monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    monkeypatch.undo()
    before = os.sched_getaffinity(0)

    def work(start: int, stop: int) -> None:
        if failing:
            raise LookupError

    with contextlib.suppress(LookupError):
        Crew(3).share(work, 9, 1)
    assert os.sched_getaffinity(0) == before


def test_a_caller_with_one_core_works_alone(cores: set[int]) -> None:
    cores.intersection_update({0})
    work = Busy()
    Crew(4).share(work, 5, 1)
    assert work.threads == {threading.get_ident()}


def test_cores_that_are_taken_away_do_not_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, on: set[int]) -> None:
        raise OSError(errno.EINVAL, "no such core")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    work = Busy()
    Crew(3).share(work, 9, 1)
    assert work.items == Counter(range(9))


def test_many_callers_share_the_same_helpers() -> None:
    shared = Crew(3)
    works = [Busy(0.0005) for _ in range(6)]
    callers = [threading.Thread(target=shared.share, args=(work, 30, 1)) for work in works]
    before = threading.active_count()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(work.items == Counter(range(30)) for work in works)
    assert threading.active_count() <= before + 2


@pytest.mark.parametrize("bad", range(6))
def test_an_error_anywhere_is_raised_when_nobody_works_any_more(bad: int) -> None:
    class Failing(Busy):
        def at(self, start: int) -> None:
            if start == bad:
                raise LookupError(f"item {start}")

    work, shared = Failing(), Crew(3)
    with pytest.raises(LookupError, match=f"item {bad}"):
        shared.share(work, 60, 1)
    assert work.inside == 0
    done = work.items.total()
    assert done < 60
    again = Busy()
    shared.share(again, 6, 1)
    assert again.items.total() == 6
    assert work.items.total() == done


def test_a_signal_is_raised_when_nobody_works_any_more() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    class Interrupting(Busy):
        def at(self, start: int) -> None:
            if start >= 4:
                os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    work = Interrupting()
    try:
        with pytest.raises(Interrupted):
            Crew(3).share(work, 600, 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert work.inside == 0
    assert work.items.total() < 600


def test_a_signal_while_the_end_is_awaited_does_not_cut_the_waiting_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted(Exception):
        pass

    raised: list[None] = []
    end = crew._Job.end

    def interrupted_end(job: crew._Job) -> None:
        if len(raised) < 2:
            raised.append(None)
            raise Interrupted
        end(job)

    monkeypatch.setattr(crew._Job, "end", interrupted_end)
    caller = threading.get_ident()

    class SlowHelpers(Busy):
        def at(self, start: int) -> None:
            if threading.get_ident() != caller:
                time.sleep(0.05)

    work = SlowHelpers()
    with pytest.raises(Interrupted):
        Crew(3).share(work, 3, 1)
    assert work.inside == 0


def test_without_threads_to_be_had_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    work = Busy()
    Crew(4).share(work, 5, 1)
    assert work.threads == {threading.get_ident()}
    assert work.items.total() == 5


def test_a_forked_child_shares_work_too() -> None:
    crew.share(Busy(), 8, 1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work = Busy()
            signal.alarm(20)
            crew.share(work, 8, 1)
            status = 0 if work.items == Counter(range(8)) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
