"""Clears: forgetting all blocks of a tenant, for somebody who waits for it."""

from __future__ import annotations

from kvstore.core.actions import Answer
from kvstore.core.chores import CHANGED, SEEN, Chore, Chores
from kvstore.core.residency import Residency
from kvstore.core.tickets import ClearTicket


class Clears:
    def __init__(self, residency: Residency, chores: Chores) -> None:
        self._residency = residency
        self._chores = chores

    def clear(self, tenant: str) -> ClearTicket:
        """Once this is answered, nothing is found any more that was there when it was
        asked for. What comes meanwhile may stay or go."""
        ticket = ClearTicket(tenant)
        self._chores.add(self._forget(ticket))
        return ticket

    def give_up(self, ticket: ClearTicket) -> None:
        """The caller waits no longer; the clear goes on."""
        ticket.answer = ticket.forgotten

    def _forget(self, ticket: ClearTicket) -> Chore:
        catalog = self._residency.catalog
        for block in catalog:
            if block.layout.tenant == ticket.tenant and catalog.contains(block):
                self._residency.abandon(block)
                ticket.forgotten += 1
                yield CHANGED
            else:
                yield SEEN
        if ticket.answer is None:
            ticket.answer = ticket.forgotten
            self._residency.actions.append(Answer(ticket))
