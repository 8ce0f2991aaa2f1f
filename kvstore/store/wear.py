"""What the NVMe tier writes beside what it is asked for, and what it need not write again.

The planner keeps the drive's budget (`core.places.endurance`), so it is told how much the tier has
written, and asked before blocks are written again to win room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import CancelledError

from kvstore.store.loop import Loop
from kvstore.tiers.base import StorageTier

PATIENCE_S = 1.0
"""How long a thread of the tier waits for an answer; then all is worth it."""


class Wear:
    def __init__(self, loop: Loop, nvme: StorageTier) -> None:
        self._loop = loop
        self._nvme = nvme
        self._told = self._written()

    def ask_before_moving(self) -> None:
        """From now on the planner says what is worth another write. To be called on the
        loop."""
        running = asyncio.get_running_loop()

        def not_worth_moving(addresses: list[int]) -> Iterable[int]:
            answer = asyncio.run_coroutine_threadsafe(self._weigh(addresses), running)
            try:
                return answer.result(PATIENCE_S)
            except (TimeoutError, CancelledError):
                # What is dropped all the same is forgotten in the usual way.
                answer.cancel()
                return ()

        self._nvme.ask_before_moving(not_worth_moving)

    def tell(self) -> None:
        written = self._written()
        self._loop.planner.worn(written - self._told)
        self._told = written

    def _written(self) -> int:
        """Beside what was asked for, of which the planner knows."""
        return sum(nbytes for what, nbytes in self._nvme.wear().items() if what != "store")

    async def _weigh(self, addresses: list[int]) -> list[int]:
        dropped = self._loop.planner.not_worth_moving(addresses)
        self._loop.execute()
        return dropped
