"""Flushes: writing what is in DRAM only to NVMe, for somebody who waits for it.

A flush looks through DRAM for what is dirty (a chore), writes it, a few at a time, and
then, if it was asked to, looks through DRAM again for what is clean, to drop it. It waits for a
drive that does not answer, for as long as its caller does. It ends where the drive's budget does
(`core.places.endurance`), and leaves out a model's output that nobody has asked for.
"""

from __future__ import annotations

from kvstore.core.actions import Answer
from kvstore.core.catalog import UNUSED_OUTPUT, Replica, is_ready
from kvstore.core.chores import CHANGED, SEEN, Chore, Chores
from kvstore.core.lifecycle import State
from kvstore.core.places.residency import Residency
from kvstore.core.tickets import FlushTicket
from kvstore.errors import NoLowerTier
from kvstore.types import Tier


class Flushes:
    def __init__(self, residency: Residency, chores: Chores, max_writing: int) -> None:
        self._residency = residency
        self._chores = chores
        self._max_writing = max_writing
        self._flushes: list[FlushTicket] = []

    def flush(self, tenant: str | None, *, drop: bool) -> FlushTicket:
        """Write what a tenant (None: everybody) has in DRAM only. Raises `NoLowerTier`."""
        if not self._residency.nvme_on:
            raise NoLowerTier("there is no tier behind DRAM, or it is switched off")
        ticket = FlushTicket(tenant, drop)
        ticket.writing.update(
            transfer.copy.target
            for transfer in self._residency.transfers
            if transfer.copy is not None
            and transfer.into is Tier.NVME
            and transfer.copy.target.state is State.FILLING
            and tenant in (None, transfer.tenant)
        )
        self._flushes.append(ticket)
        self._chores.add(self._search(ticket))
        return ticket

    def target_settled(self, target: Replica, *, written: bool) -> None:
        for flush in self._flushes:
            if target in flush.writing:
                flush.writing.remove(target)
                flush.written += written

    def give_up(self, ticket: FlushTicket) -> None:
        """The caller waits no longer; what is under way goes on."""
        if ticket in self._flushes:
            self._flushes.remove(ticket)
        ticket.answer = ticket.written

    def go_on(self) -> None:
        """Start what may start now, and answer who has got all there is."""
        for flush in list(self._flushes):
            self._take_back(flush)
            stuck = self._feed(flush)
            if flush.searched and not flush.writing and (stuck or not flush.queue):
                self._flushes.remove(flush)
                if flush.drop:
                    self._chores.add(self._drop_clean(flush))
                else:
                    self._answer(flush)

    def _search(self, flush: FlushTicket) -> Chore:
        """Find what is dirty. A replica stays in its slot, so going through the slots
        misses none that was there when this began; what was written meanwhile needs no
        flush. Older slots first, which mostly puts parents before their children."""
        for replica in self._residency.dram.space.residents(owner=flush.tenant):
            if flush.answer is not None:
                return
            saved = replica.block.nvme
            unsaved = saved is None or saved.state is State.FILLING
            if is_ready(replica) and unsaved and replica.block.uses != UNUSED_OUTPUT:
                flush.queue.append(replica)
            yield SEEN
        flush.searched = True

    def _take_back(self, flush: FlushTicket) -> None:
        """A copy that was called off before it started reports nothing; what it was of is to be
        written all the same."""
        for target in [target for target in flush.writing if target.state is State.GONE]:
            flush.writing.remove(target)
            source = target.block.dram
            if source is not None and is_ready(source) and target.block.nvme is None:
                flush.queue.append(source)

    def _feed(self, flush: FlushTicket) -> bool:
        """Whether the flush is stuck: its next block cannot be written, now or soon."""
        while flush.queue and len(flush.writing) < self._max_writing:
            replica = flush.queue[0]
            target = replica.block.nvme
            if target is None and is_ready(replica):
                write_back = self._residency.write_back
                target = write_back.save(replica.block)
                if target is None:
                    waits = self._residency.nvme_on and self._residency.stalled
                    may_be = waits or write_back.possible
                    return not (may_be and write_back.can_pay(replica.block))
            if target is not None and target.state is State.FILLING:
                flush.writing.add(target)
            flush.queue.popleft()
        return False

    def _drop_clean(self, flush: FlushTicket) -> Chore:
        for replica in self._residency.dram.space.residents(owner=flush.tenant):
            yield CHANGED if self._residency.drop_if_clean(replica) else SEEN
        self._answer(flush)

    def _answer(self, flush: FlushTicket) -> None:
        if flush.answer is None:
            flush.answer = flush.written
            self._residency.actions.append(Answer(flush))
