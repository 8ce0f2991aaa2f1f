"""Flushes: writing what is in DRAM only to NVMe, for somebody who waits for it."""

from __future__ import annotations

from kvstore.core.actions import Answer
from kvstore.core.catalog import Replica, is_ready
from kvstore.core.lifecycle import State
from kvstore.core.residency import Residency
from kvstore.core.tickets import FlushTicket
from kvstore.errors import NoLowerTier


class Flushes:
    def __init__(self, residency: Residency, max_writing: int) -> None:
        self._residency = residency
        self._max_writing = max_writing
        self._flushes: list[FlushTicket] = []

    def flush(self, tenant: str | None, *, drop: bool) -> FlushTicket:
        """Write what a tenant (None: everybody) has in DRAM only. Raises `NoLowerTier`."""
        if not self._residency.nvme_on:
            raise NoLowerTier("there is no tier behind DRAM, or it is switched off")
        ticket = FlushTicket(tenant, drop)
        ticket.queue.extend(self._residency.dirty_blocks(tenant))
        ticket.writing.update(
            block.nvme
            for block in self._residency.catalog
            if block.nvme is not None
            and block.nvme.state is State.FILLING
            and tenant in (None, block.layout.tenant)
        )
        self._flushes.append(ticket)
        return ticket

    def target_settled(self, target: Replica, *, written: bool) -> None:
        for flush in self._flushes:
            if target in flush.writing:
                flush.writing.remove(target)
                flush.written += written

    def give_up(self, ticket: FlushTicket) -> None:
        """The caller waits no longer; what is under way goes on."""
        self._flushes.remove(ticket)
        ticket.answer = ticket.written

    def go_on(self) -> None:
        """Start what may start now, and answer who has got all there is."""
        for flush in list(self._flushes):
            # A copy that was called off before it started reports nothing.
            flush.writing -= {r for r in flush.writing if r.state is State.GONE}
            stuck = self._feed(flush)
            if not flush.writing and (stuck or not flush.queue):
                self._flushes.remove(flush)
                if flush.drop:
                    self._residency.drop_clean(flush.tenant)
                flush.answer = flush.written
                self._residency.actions.append(Answer(flush))

    def _feed(self, flush: FlushTicket) -> bool:
        """Whether the flush is stuck: its next block cannot be written, now or soon."""
        while flush.queue and len(flush.writing) < self._max_writing:
            block = flush.queue[0]
            target = block.nvme
            if target is None and is_ready(block.dram):
                target = self._residency.save(block)
                if target is None:
                    return not self._residency.can_save
            if target is not None and target.state is State.FILLING:
                flush.writing.add(target)
            flush.queue.popleft()
        return False
