"""A loop in virtual time whose threads take turns with it: the same seed runs the same way,
and an hour costs seconds.

Work handed to an executor is done in one piece, at the beginning or at the end of the
time it is said to take; both come from the seed. So may a drive that hangs. Work that is to be
cut into pieces is done by a thread of its own, which stands still while anybody else does
anything, and goes on some time after each `pause`.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

from kvstore.tiers.faulty import Crash
from tests.simulation.timeless import TimelessLoop

HANG_S = 20.0

Outcome = tuple[Any, BaseException | None]


class Ended(BaseException):
    """The machine is off: what a thread was at is never done."""


class VirtualLoop(TimelessLoop):
    def __init__(
        self,
        rng: random.Random,
        in_pieces: Callable[[object, Callable[..., Any]], bool] = lambda executor, work: False,
    ) -> None:
        """`in_pieces`: whether work for an executor may pause."""
        super().__init__()
        self.crashed = False
        self._over = False
        self._rng = rng
        self._in_pieces = in_pieces
        self._jobs: dict[_Job, None] = {}

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        if self._over:
            return future
        takes = self._rng.expovariate(1 / 0.002)
        if self._rng.random() < 0.002:
            takes = HANG_S
        at_once = self._rng.random() < 0.5
        job = _Job(future, lambda: func(*args), in_pieces=self._in_pieces(executor, func))
        self._jobs[job] = None
        job.takes_s = takes if at_once else 0.0
        self._go_on_later(job, 0.0 if at_once else takes)
        return future

    def _outcome(self, func: Callable[..., Any], args: Any) -> Outcome:
        try:
            return func(*args), None
        except Crash:
            self.crashed = True
            self.stop()
            return None, None
        except Exception as error:  # noqa: BLE001 - As an executor, for whoever waits.
            return None, error

    def _finish(
        self, future: asyncio.Future[Any], result: Any, error: BaseException | None
    ) -> None:
        if future.done() or self.crashed:
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    # Work in pieces

    def _go_on_later(self, job: _Job, in_s: float) -> None:
        job.goes_on_s = self._seconds + in_s
        job.timer = self.call_later(in_s, self._go_on, job)

    def _go_on(self, job: _Job) -> None:
        if self.crashed:
            return
        outcome = job.go_on()
        if outcome is None:
            self._go_on_later(job, job.pause_s)
            return
        del self._jobs[job]
        result, error = outcome
        if isinstance(error, Crash):
            self.crashed = True
            self.stop()
        elif error is not None and not isinstance(error, Exception):
            raise error
        else:
            self.call_later(job.takes_s, self._finish, job.future, result, error)

    def end_jobs(self) -> None:
        """All that threads are at, to its end. Nobody is told of it. Raises `Crash`."""
        while self._jobs:
            job = min(self._jobs, key=lambda job: job.goes_on_s)
            self._seconds = max(self._seconds, job.goes_on_s)
            if job.timer is not None:
                job.timer.cancel()
            outcome = job.go_on()
            if outcome is None:
                job.goes_on_s = self._seconds + job.pause_s
                continue
            del self._jobs[job]
            if isinstance(outcome[1], Crash):
                raise outcome[1]

    def run(self, main: Any) -> Any:
        """Run to the end, or to a crash: then None."""
        task = self.create_task(main)
        task.add_done_callback(lambda _: self.stop())
        self.run_forever()
        if self.crashed:
            return None
        return task.result()

    def abandon(self) -> None:
        """Nothing runs any more, and nobody hears of it."""
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._over = True
        for job in self._jobs:
            job.abandon()
        self._jobs.clear()
        self._ready.clear()
        self._scheduled.clear()
        self.close()

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        # What is left of the tasks ends when it is collected, and asks for this.
        if self._over:
            return asyncio.Handle(callback, args, self, context)
        return super().call_soon(callback, *args, context=context)


class _Job:
    """Work; where it is done in pieces, with the thread that is at it once it has begun."""

    def __init__(
        self, future: asyncio.Future[Any], work: Callable[[], Any], *, in_pieces: bool
    ) -> None:
        self.future = future
        self.takes_s = 0.0
        """From its end until that is told."""
        self.goes_on_s = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self._work = work
        self._in_pieces = in_pieces
        self._thread: _Thread | None = None

    @property
    def pause_s(self) -> float:
        assert self._thread is not None
        return self._thread.pause_s

    def go_on(self) -> Outcome | None:
        """To its end; None: to where it pauses."""
        if not self._in_pieces:
            return _outcome(self._work)
        if self._thread is None:
            self._thread = _idle.pop() if _idle else _Thread()
            self._thread.work = self._work
        outcome = self._thread.go_on()
        if outcome is not None:
            _idle.append(self._thread)
            self._thread = None
        return outcome

    def abandon(self) -> None:
        if self._thread is not None:
            self._thread.abandoned = True
            outcome = self.go_on()
            assert outcome is not None, "a thread goes on though the machine is off"


class _Thread(threading.Thread):
    """Runs only while somebody waits for that."""

    def __init__(self) -> None:
        super().__init__(name="turns", daemon=True)
        self.work: Callable[[], Any] | None = None
        self.pause_s = 0.0
        self.abandoned = False
        self._outcome: Outcome | None = None
        self._mine, self._theirs = threading.Lock(), threading.Lock()
        self._mine.acquire()
        self._theirs.acquire()
        self.start()

    def go_on(self) -> Outcome | None:
        """Wait until it pauses, or until its work is done, which ends how this says."""
        self._mine.release()
        self._theirs.acquire()
        outcome, self._outcome = self._outcome, None
        return outcome

    def pause(self, seconds: float) -> None:
        if self.abandoned:
            raise Ended
        self.pause_s = seconds
        self._theirs.release()
        self._mine.acquire()
        if self.abandoned:
            raise Ended

    def run(self) -> None:
        while True:
            self._mine.acquire()
            assert self.work is not None
            self._outcome = _outcome(self.work)
            self.work, self.abandoned = None, False
            self._theirs.release()


_idle: list[_Thread] = []


def _outcome(work: Callable[[], Any]) -> Outcome:
    try:
        return work(), None
    except BaseException as error:  # noqa: BLE001 - As an executor, for whoever waits.
        return None, error


def pause(seconds: float) -> bool:
    """Let others go on for so long. False where nobody could: this is no thread of a job's."""
    thread = threading.current_thread()
    if not isinstance(thread, _Thread):
        return False
    thread.pause(seconds)
    return True


class TurnCondition:
    """A `threading.Condition` for threads that take turns: whoever is at it is alone."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            if not pause(0.001):
                raise AssertionError("somebody waits for what cannot happen")

    def notify_all(self) -> None:
        return None


class NoExecutor:
    """What the loop does not use, to be shut down."""

    def __init__(self, loop: VirtualLoop | None = None) -> None:
        self._loop = loop

    def shutdown(self, wait: bool = True) -> None:
        if self._loop is not None:
            self._loop.end_jobs()
