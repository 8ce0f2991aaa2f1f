"""Carries out what the planner wants, and lets long work take turns with short.

Each part of the store says which actions it handles. Handlers run on the loop and must
not block: what takes long, they give to a thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from kvstore.clock import Clock
from kvstore.core.planner import Planner
from kvstore.errors import TierFailed
from kvstore.types import Tier

log = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A")

SLOW_WORK_S = 0.1
"""How long chores wait for threads at most: one may wait for a drive that hangs."""


class StoreObserver(Protocol):
    """What the store tells those who count. Called on the loop; must not block."""

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None: ...
    def evicted(self, tier: str, reason: str, blocks: int) -> None: ...
    def io_error(self, op: str, errno_name: str) -> None: ...
    def corrupt(self, tier: str) -> None: ...
    def tier_off(self, tier: str) -> None: ...
    def coded(self, codec: str, src: str, dst: str) -> None: ...
    def straight_refused(self, gpu: str, reason: str) -> None: ...


class Loop:
    def __init__(
        self, planner: Planner, clock: Clock, executor: Executor, observer: StoreObserver
    ) -> None:
        """The executor is shut down with `close`."""
        self.planner = planner
        self.clock = clock
        self.observer = observer
        self.slow_work: set[asyncio.Task[None]] = set()
        """Threads' work that makes slow progress beside a busy loop: chores wait for it."""
        self.closed = False
        self.nvme_off_because = ""
        """For people."""
        self._executor = executor
        # Apart: the others may all be waiting for a drive that hangs.
        self._memory_executor = ThreadPoolExecutor(1, "kvstore-memory")
        self._handlers: dict[type, Callable[[Any], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_chores = False
        self._looks: asyncio.TimerHandle | None = None
        self._looks_ns = 0
        self._evictions = dict.fromkeys(Tier, 0)

    def handle(self, action: type[A], handler: Callable[[A], None]) -> None:
        """Have actions of a kind carried out by `handler`."""
        self._handlers[action] = handler

    def execute(self) -> None:
        """Carry out what the planner wants by now. To be called after every event."""
        handlers = self._handlers
        while actions := self.planner.take_actions(self.clock.now_ns()):
            for action in actions:
                handlers[type(action)](action)
        self._count_evictions()
        if self.planner.chores and not self._at_chores:
            self._at_chores = True
            self.spawn(self._do_chores())
        self._wake_in_time()

    def _wake_in_time(self) -> None:
        """Come back when the planner has to look how things get on. One timer; where it is
        too early, it is set anew then."""
        looks_ns = self.planner.looks_ns()
        if looks_ns is None or self.closed:
            return
        if self._looks is not None:
            if self._looks_ns <= looks_ns:
                return
            self._looks.cancel()
        in_s = max(0, looks_ns - self.clock.now_ns()) / 1e9
        self._looks = asyncio.get_running_loop().call_later(in_s, self._look)
        self._looks_ns = looks_ns

    def _look(self) -> None:
        self._looks = None
        self.execute()

    async def _do_chores(self) -> None:
        try:
            while self.planner.chores:
                # Such threads take turns with the loop: no more than one at a time.
                if self.slow_work:
                    await asyncio.wait(self.slow_work, timeout=SLOW_WORK_S)
                await asyncio.sleep(0)
                self.planner.chores.go_on()
                self.execute()
        finally:
            self._at_chores = False

    def _count_evictions(self) -> None:
        residency = self.planner.residency
        for pool in (residency.dram, residency.nvme):
            if pool is not None and pool.evictions != self._evictions[pool.tier]:
                dropped = pool.evictions - self._evictions[pool.tier]
                self._evictions[pool.tier] = pool.evictions
                self.observer.evicted(pool.tier.label, "space", dropped)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # A bug. Liveness fails by itself when it was the housekeeping that ended.
            self.observer.io_error("task", type(error).__name__)
            log.error("a background task ended with an error", exc_info=error)

    async def in_thread(self, work: Callable[[], T], tier: Tier = Tier.NVME) -> T:
        """Have a thread do what waits for `tier`."""
        executor = self._memory_executor if tier is Tier.DRAM else self._executor
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    def tier_failed(self, error: TierFailed, op: str) -> None:
        """The NVMe tier failed at `op`: it is used no more."""
        self.observer.io_error(op, errno.errorcode.get(error.errno, "OTHER"))
        if self.planner.residency.nvme_on:
            log.error("the NVMe tier failed and is switched off until a restart: %s", error)
            self.nvme_off_because = str(error)
            self.observer.tier_off(Tier.NVME.label)
            self.planner.tier_failed(self.clock.now_ns())
            self.execute()

    async def close(self) -> None:
        """End all tasks. Threads may be at something still, see `wait_for_threads`."""
        self.closed = True
        if self._looks is not None:
            self._looks.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wait_for_threads(self) -> None:
        """Blocks until they are done: for ever where a drive never answers."""
        self._memory_executor.shutdown(wait=True)
        self._executor.shutdown(wait=True)
