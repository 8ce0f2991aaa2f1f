"""Prefetches: chains that somebody will want soon are brought up, as far as there is room.

They take slots that are free and time that nobody else wants, and no more than a part of
DRAM for what has not been used yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TypeGuard

from kvstore.core.actions import Answer
from kvstore.core.catalog import Block, Layout
from kvstore.core.chores import CHANGED, NAMED, Chore, Chores
from kvstore.core.residency import Residency
from kvstore.core.tickets import PrefetchTicket
from kvstore.core.transfers import TransferClass, Wish
from kvstore.types import ChainQuery, Refusal


class Prefetches:
    def __init__(self, residency: Residency, chores: Chores) -> None:
        self._residency = residency
        self._chores = chores

    def prefetch(
        self, tenant: str, chains: Sequence[ChainQuery], *, within_ns: int, now_ns: int
    ) -> PrefetchTicket:
        """Answered with the number of blocks that are on their way because of it, once
        it has seen to all it can. What has not begun `within_ns` from now does not begin
        any more; 0: there is no such time. Raises `UnknownLayout`."""
        catalog = self._residency.catalog
        layouts = [[catalog.layout(tenant, i) for i in chain.layout_ids] for chain in chains]
        deadline_ns = now_ns + within_ns if within_ns else None
        wish = Wish(TransferClass.PREFETCH, now_ns, deadline_ns=deadline_ns)
        ticket = PrefetchTicket(wish, layouts, chains)
        self._chores.add(self._start(ticket))
        return ticket

    def give_up(self, ticket: PrefetchTicket) -> None:
        """The caller waits no longer: what has not begun does not begin."""
        ticket.answer = ticket.started

    def _start(self, ticket: PrefetchTicket) -> Chore:
        for layouts, chain in zip(ticket.layouts, ticket.chains, strict=True):
            for key in chain.keys:
                blocks = self._readable(layouts, key)
                lacking = [block for block in blocks if block.dram is None]
                for block in lacking:
                    if not self._residency.may_prefetch(block):
                        self._answer(ticket)
                        return
                    target = self._residency.bring_up(block, ticket.wish)
                    if target is None or isinstance(target, Refusal):
                        self._answer(ticket)
                        return
                    ticket.started += 1
                yield NAMED * len(layouts) + CHANGED * len(lacking)
                if ticket.answer is not None:
                    return
                if len(blocks) < len(layouts):
                    break
        self._answer(ticket)

    def _readable(self, layouts: list[Layout], key: bytes) -> list[Block]:
        """The blocks of a position, up to the first layout that has none."""
        found = (self._residency.catalog.find(layout, key) for layout in layouts)
        return list(takewhile(_is_readable, found))  # type: ignore[arg-type]

    def _answer(self, ticket: PrefetchTicket) -> None:
        if ticket.answer is None:
            ticket.answer = ticket.started
            self._residency.actions.append(Answer(ticket))


def _is_readable(block: Block | None) -> TypeGuard[Block]:
    return block is not None and block.readable
