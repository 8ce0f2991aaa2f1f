"""A loop in virtual time whose threads take turns with it: the same seed runs the same way,
and an hour costs seconds.

Work handed to an executor is done in one piece, at the beginning or at the end of the
time it is said to take; both come from the seed. So may a drive that hangs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from kvstore.tiers.faulty import Crash
from tests.simulation.timeless import TimelessLoop

HANG_S = 20.0


class VirtualLoop(TimelessLoop):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.crashed = False
        self._over = False
        self._rng = rng

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        if self._over:
            return future
        takes = self._rng.expovariate(1 / 0.002)
        if self._rng.random() < 0.002:
            takes = HANG_S
        if self._rng.random() < 0.5:
            self._finish_later(future, takes, *self._outcome(func, args))
        else:
            self.call_later(takes, lambda: self._finish(future, *self._outcome(func, args)))
        return future

    def _outcome(self, func: Callable[..., Any], args: Any) -> tuple[Any, BaseException | None]:
        try:
            return func(*args), None
        except Crash:
            self.crashed = True
            self.stop()
            return None, None
        except Exception as error:  # noqa: BLE001 - As an executor, for whoever waits.
            return None, error

    def _finish_later(
        self, future: asyncio.Future[Any], takes: float, result: Any, error: BaseException | None
    ) -> None:
        self.call_later(takes, self._finish, future, result, error)

    def _finish(
        self, future: asyncio.Future[Any], result: Any, error: BaseException | None
    ) -> None:
        if future.done() or self.crashed:
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

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
        self._ready.clear()
        self._scheduled.clear()
        self.close()

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        # What is left of the tasks ends when it is collected, and asks for this.
        if self._over:
            return asyncio.Handle(callback, args, self, context)
        return super().call_soon(callback, *args, context=context)


class NoExecutor:
    """What the loop does not use, to be shut down."""

    def shutdown(self, wait: bool = True) -> None:
        return None
