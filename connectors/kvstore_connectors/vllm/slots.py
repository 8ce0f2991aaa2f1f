"""Slots at hand: reserved before it is known what will be stored in them.

So a store begins to copy at once, and costs one call, the commit that publishes it
and reserves again what it used up. What lies here is memory that nobody else can
use: it is bounded, and given back when nothing is stored for a while.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import KVStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.client.lease import Layout
    from kvstore.types import SlotGrant
    from kvstore_connectors.vllm.link import Attached

RESERVE_WAIT_MS = 100
MARGIN_NS = 5_000_000_000
"""Slots that expire sooner are not written any more."""


class Slot(NamedTuple):
    id: int
    address: int
    expires_ns: int


class SlotsAhead:
    """Used by one thread. Slots belong to one session with the server and are forgotten
    with it, which gives them back. A client opens another session by itself, and counts;
    what slips through here is refused by `write_slots`."""

    def __init__(self, most: int, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """`most`: how many to have at hand, at most."""
        self._most = most
        self._wanted = 0
        self._now_ns = now_ns
        self._slots: list[Slot] = []
        self._attached: Attached | None = None
        self._session = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def to_reserve(self) -> int:
        """How many more to have at hand: as many as were last asked for."""
        return max(0, min(self._wanted, self._most) - len(self._slots))

    def take(self, attached: Attached, layout: Layout, count: int) -> list[Slot]:
        """Up to `count` slots: fewer where the server has no room for more. Asks the
        server only when there are too few at hand."""
        self._keep_usable(attached)
        self._wanted = count
        lacking = count - len(self._slots)
        if lacking > 0:
            grant = attached.client.reserve(layout, lacking, RESERVE_WAIT_MS)
            self._follow(attached)
            self.add(attached, grant)
        # Those that expire first, first.
        taken, self._slots = self._slots[:count], self._slots[count:]
        return taken[::-1]

    def _follow(self, attached: Attached) -> None:
        session = attached.client.counters.connects
        if self._attached is not attached or self._session != session:
            self._attached, self._session = attached, session
            self._slots = []

    def _keep_usable(self, attached: Attached) -> None:
        self._follow(attached)
        soon_ns = self._now_ns() + MARGIN_NS
        late = [slot for slot in self._slots if slot.expires_ns < soon_ns]
        if late:
            self._slots = [slot for slot in self._slots if slot.expires_ns >= soon_ns]
            attached.client.abort([slot.id for slot in late])

    def add(self, attached: Attached, grant: SlotGrant) -> None:
        """Slots that were reserved for the connection the others are of."""
        if self._attached is attached:
            first, expires_ns = grant.first_slot, grant.expires_ns
            self._slots += [Slot(first + i, a, expires_ns) for i, a in enumerate(grant.addresses)]

    def put_back(self, slots: Sequence[Slot]) -> None:
        """Slots that were taken and not committed; they may have been written into."""
        self._slots[:0] = slots

    def drop(self, attached: Attached, slots: Sequence[Slot]) -> None:
        """Slots of which it is not known whether they are open. Nobody writes into
        them any more. Never raises: at worst they go with the session."""
        if slots and not attached.dropped:
            try:
                attached.client.abort([slot.id for slot in slots])
            except KVStoreError:
                return

    def give_back(self, attached: Attached | None) -> None:
        """All of them, for nothing is stored now."""
        slots, self._slots = self._slots, []
        if attached is not None and attached is self._attached:
            self.drop(attached, slots)
