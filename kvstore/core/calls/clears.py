"""Clears: forgetting all blocks of a tenant, for somebody who waits for it."""

from __future__ import annotations

from kvstore.core.actions import Answer
from kvstore.core.chores import CHANGED, SEEN, Chore, Chores
from kvstore.core.places.residency import Residency
from kvstore.core.tickets import ClearTicket


class Clears:
    def __init__(self, residency: Residency, chores: Chores) -> None:
        self._residency = residency
        self._chores = chores
        # Tenants of whom a clear is under way, and who has asked for another since.
        self._waiting: dict[str, list[ClearTicket]] = {}

    def clear(self, tenant: str) -> ClearTicket:
        """Once this is answered, nothing is found any more that was there when it was
        asked for. What comes meanwhile may stay or go."""
        ticket = ClearTicket(tenant)
        if not self._residency.catalog.tenant_blocks(tenant):
            ticket.answer = 0
        elif tenant in self._waiting:
            # What is under way has passed by some of what there is now. All who ask
            # meanwhile share the next one.
            self._waiting[tenant].append(ticket)
        else:
            self._begin([ticket])
        return ticket

    def _begin(self, tickets: list[ClearTicket]) -> None:
        self._waiting[tickets[0].tenant] = []
        self._chores.add(self._forget(tickets))

    def give_up(self, ticket: ClearTicket) -> None:
        """The caller waits no longer; a clear that is under way goes on."""
        waiting = self._waiting.get(ticket.tenant, [])
        if ticket in waiting:
            waiting.remove(ticket)
        ticket.answer = ticket.forgotten

    def _forget(self, tickets: list[ClearTicket]) -> Chore:
        """One clear for all of `tickets`, which are one tenant's."""
        catalog = self._residency.catalog
        ticket = tickets[0]
        for block in catalog:
            if block.layout.tenant == ticket.tenant and catalog.contains(block):
                self._residency.abandon(block)
                ticket.forgotten += 1
                yield CHANGED
            else:
                yield SEEN
        for each in tickets:
            if each.answer is None:
                each.answer = ticket.forgotten
                self._residency.actions.append(Answer(each))
        again = self._waiting.pop(ticket.tenant)
        if again:
            self._begin(again)
