"""Copies under way: a few at a time, all finished in the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType

from kvstore.device.base import Copies
from kvstore.errors import DeviceError, DeviceStuck

MOST_UNDER_WAY = 2
"""So that the device copies while checksums are taken of what it copied before."""

CHUNK_BYTES = 16 << 20
"""To be started at a time: a cancelled job copies no more than what is under way."""

Arrived = Callable[[list[int]], None]
"""Is told the checksums of the slots."""


class Flight:
    """Used in a `with`: leaving it finishes what was started, also after an error, so that
    blocks and slots can be handed on, unless it raises `DeviceStuck`."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Copies, Arrived]] = deque()

    def __enter__(self) -> Flight:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.land()
        finally:
            self._wait_out()

    def _wait_out(self) -> None:
        stuck: DeviceStuck | None = None
        while self._under_way:
            copies, _ = self._under_way.popleft()
            try:
                copies.finish()
            except DeviceStuck as error:
                stuck = error
            except DeviceError:
                # What was wrong first is being raised.
                continue
        if stuck is not None:
            # Nothing can be handed on, which matters more.
            raise stuck

    def add(self, copies: Copies, arrived: Arrived) -> None:
        """`arrived` is called when they are finished, in the order in which they came."""
        self._under_way.append((copies, arrived))
        if len(self._under_way) > MOST_UNDER_WAY:
            self._land_first()

    def land(self) -> None:
        while self._under_way:
            self._land_first()

    def _land_first(self) -> None:
        copies, arrived = self._under_way.popleft()
        arrived(copies.finish())
