"""Calls that wait for an answer of the planner's."""

from __future__ import annotations

import asyncio

from kvstore.core.actions import Answer
from kvstore.core.tickets import Ticket
from kvstore.store.loop import Loop


class Waiting:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        loop.handle(Answer, self._answered)

    def _answered(self, action: Answer) -> None:
        waiter = self._waiters.get(action.ticket)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self, ticket: Ticket, timeout_s: float | None) -> None:
        """Until the ticket is answered; when time is up, it is answered as things are.
        Before that, what the planner wants is carried out."""
        loop = self._loop
        loop.execute()
        if ticket.answer is not None:
            return
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = answered
        try:
            await asyncio.wait((answered,), timeout=timeout_s)
            if ticket.answer is None:
                loop.planner.give_up(ticket, loop.clock.now_ns())
                loop.execute()
            if ticket.answer is None:
                await answered
        except asyncio.CancelledError:
            loop.planner.withdraw(ticket, loop.clock.now_ns())
            raise
        finally:
            del self._waiters[ticket]
            loop.execute()
