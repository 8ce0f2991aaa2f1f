"""Calls that wait for an answer of the planner's."""

from __future__ import annotations

import asyncio

from kvstore.core.actions import Answer
from kvstore.core.tickets import AcquireTicket, Ticket
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

    async def _answered_within(
        self, ticket: Ticket, answered: asyncio.Future[None], timeout_s: float | None
    ) -> None:
        """Until then, or time is up. Whenever the planner comes to doubt that what it
        predicted will be so, it decides again."""
        loop, clock = self._loop, self._loop.clock
        end_ns = None if timeout_s is None else clock.now_ns() + int(timeout_s * 1e9)
        while isinstance(ticket, AcquireTicket) and (doubt_ns := ticket.doubt_ns) is not None:
            if end_ns is not None and doubt_ns >= end_ns:
                break
            await asyncio.wait((answered,), timeout=max(1e-3, (doubt_ns - clock.now_ns()) / 1e9))
            if ticket.answer is not None:
                return
            if clock.now_ns() >= doubt_ns:
                loop.planner.doubt(ticket, clock.now_ns())
                loop.execute()
        left_s = None if end_ns is None else max(0, end_ns - clock.now_ns()) / 1e9
        await asyncio.wait((answered,), timeout=left_s)

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
            await self._answered_within(ticket, answered, timeout_s)
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
