"""Blocks in memory that somebody says are damaged, until the server has seen for itself.

A suspect is pinned meanwhile, so that its slot keeps the bytes that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.core.catalog import Replica, is_ready
from kvstore.core.places.holdings import Holdings


class Suspects:
    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    def take(self, tenant: str, addresses: Iterable[int]) -> list[Replica]:
        """The blocks of a tenant that can be found at these addresses in memory, to be looked
        at and then settled. Where there is none, nobody is given anything wrong."""
        space = self._holdings.dram.space
        suspects = []
        for address in dict.fromkeys(addresses):
            if space.owner_of(space.extent_of(address)) != tenant:
                continue
            try:
                replica = space.at(address)
            except ValueError:
                continue
            if is_ready(replica):
                self._holdings.pin(replica)
                suspects.append(replica)
        return suspects

    def settle(self, replica: Replica, *, damaged: bool) -> None:
        """It was looked at. Whoever has a lease keeps it; nobody else finds it damaged."""
        if not damaged:
            replica.confirmed = True
        elif is_ready(replica):
            self._holdings.damaged(replica)
        self._holdings.unpin(replica)
