"""Calls that are made while their caller goes on with something else.

In threads of our own and not by gRPC's futures: where no call is under way those
start a thread for one (0.24 ms, against 3 us here), and an interrupt that comes at
that moment leaves the channel without the thread that every later one waits for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from kvstore.errors import Unavailable

T = TypeVar("T")

MOST_THREADS = 16
"""Of one `Background`. Work beyond them waits its turn."""
IDLE_S = 10.0
"""A thread that had nothing to do for so long ends."""


class Outcome(Generic[T]):
    """What becomes of work that was started."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def wait(self, timeout_s: float) -> T:
        """What the work returned, or raises what it raised, and `Unavailable` when that
        takes too long. May be called again."""
        if not self._value and self._error is None:
            if not self._running.acquire(timeout=timeout_s):
                raise Unavailable("no answer in time")
            self._running.release()
        if self._error is not None:
            raise self._error
        return self._value[0]

    def run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised to whoever waits
            self._error = error
        self._running.release()


class Background:
    """Daemon threads that do what is started, begun in order. Safe to use from several
    threads; they end when there is nothing to do."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Outcome[Any]] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        # Threads that have nothing to do, less the jobs that wait for one.
        self._free = 0

    def start(self, work: Callable[[], T]) -> Outcome[T]:
        """Have `work` called. Raises `Unavailable` where there is no thread to do it."""
        with self._lock:
            if self._free < 1 and self._threads < MOST_THREADS:
                self._start_thread()
            self._free -= 1
        outcome = Outcome(work)
        self._jobs.put(outcome)
        return outcome

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="kvstore-call", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                raise Unavailable(f"the machine has no thread for a call: {error}") from error
            return
        self._threads += 1
        self._free += 1

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except Empty:
                with self._lock:
                    if self._free < 1:
                        # A job is on its way.
                        continue
                    self._free -= 1
                    self._threads -= 1
                    return
            job.run()
            # Holds what it was about until the next one comes.
            del job
            with self._lock:
                self._free += 1
