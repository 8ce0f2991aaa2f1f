"""How much of what lies behind DRAM is brought up for who asks: what `core.calls.choice` says of
it, and what it is promised.

What is refused since loading is slow may be refused for ever, as nobody measures what nobody
does: so now and then a few batches of it are brought up that nobody waits for.
"""

from __future__ import annotations

from functools import partial
from itertools import islice

from kvstore.core.calls.choice import choose, is_settled
from kvstore.core.catalog import Layout, Replica, is_ready
from kvstore.core.chores import CHANGED, NAMED, Chore
from kvstore.core.lifecycle import State
from kvstore.core.limits import Counters
from kvstore.core.links.learned import Prediction, PrefillSpeeds
from kvstore.core.places.residency import Residency
from kvstore.core.tickets import AcquireTicket, ChainClaim
from kvstore.core.transfers import BATCH_BLOCKS, BATCH_BYTES, TransferClass, Wish
from kvstore.types import Refusal, Tier

LOOKED_AHEAD = 64
"""Positions counted before looking whether to go on."""
PROBED_BYTES = 4 * BATCH_BYTES
PROBED_BLOCKS = BATCH_BLOCKS
"""What tells how fast NVMe is, where nobody waits for it: as many batches as run at a time."""
GRACE_NS = 5_000_000
"""A prediction is not wrong for so little."""


class Offers:
    def __init__(self, residency: Residency, counters: Counters) -> None:
        self.prefill = PrefillSpeeds()
        self._residency = residency
        self._catalog = residency.catalog
        self._link = residency.transfers
        self._counters = counters

    def compute_ns(self, layouts: list[list[Layout]], tokens_per_s: float | None) -> float:
        """What a position costs who computes what it is not given; 0.0 where that is
        not known, and for who does not."""
        first = next((shards[0] for shards in layouts if shards), None)
        if tokens_per_s is None or first is None:
            return 0.0
        if tokens_per_s > 0:
            self.prefill.note(first.layout_id, tokens_per_s)
        speed = self.prefill.tokens_per_s(first.layout_id)
        return first.spec.block_tokens * 1e9 / speed if speed else 0.0

    def choose(self, ticket: AcquireTicket, claim: ChainClaim) -> Chore:
        """Decide how much of what lies behind DRAM to bring up."""
        wish, link = ticket.wish, self._link
        ready = partial(link.ready, Tier.DRAM, ticket.session.tenant, wish.priority, wish.asked_ns)
        left_ns = None if wish.deadline_ns is None else wish.deadline_ns - wish.asked_ns
        works_ns = [0]
        for key in islice(claim.keys, claim.claimed, None):
            work_ns = self._work_ns(ticket, claim.layouts, key)
            yield NAMED * len(claim.layouts)
            if work_ns is None:
                break
            works_ns.append(works_ns[-1] + work_ns)
            look = len(works_ns) % LOOKED_AHEAD == 2
            if look and is_settled(works_ns, ready, left_ns, ticket.compute_ns):
                break
        if not works_ns[-1]:
            return
        if self._residency.stalled:
            self.refuse(claim, claim.claimed, Refusal.STALLED)
            return
        choice = choose(works_ns, ready, left_ns, ticket.compute_ns)
        if choice.refusal is not None:
            if not choice.positions:
                yield from self._probe(claim, wish.asked_ns)
            self.refuse(claim, claim.claimed + choice.positions, choice.refusal)
        if choice.positions:
            self._promise(ticket, works_ns[choice.positions], choice.prediction)

    def refuse(self, claim: ChainClaim, most: int, why: Refusal) -> None:
        claim.most, claim.refusal = most, why
        self._counters.refused[why] += 1

    def _promise(self, ticket: AcquireTicket, work_ns: int, said: Prediction) -> None:
        wish, tenant = ticket.wish, ticket.session.tenant
        ahead_ns = int(self._link.queued_ahead(tenant, wish.priority, work_ns))
        ticket.through_ns = max(ticket.through_ns, self._link.done_ns + ahead_ns)
        ticket.before_ns = self._link.inflow.before(tenant, wish.priority)
        ticket.promised_ns = max(ticket.promised_ns, wish.asked_ns + doubtful_ns(said))

    def _probe(self, claim: ChainClaim, now_ns: int) -> Chore:
        """Nobody has measured for some time whether what is refused is as slow as it was:
        a few batches are brought up that nobody waits for."""
        link = self._link
        if link.depth(TransferClass.DEMAND) or not link.costs[Tier.DRAM].unseen(now_ns):
            return
        wish, left = Wish(TransferClass.DEMAND, now_ns, priority=0), PROBED_BYTES
        for key in islice(claim.keys, claim.claimed, claim.claimed + PROBED_BLOCKS):
            block = self._catalog.find(claim.layouts[0], key)
            if left <= 0 or block is None or block.dram is not None or not is_ready(block.nvme):
                return
            if not isinstance(self._residency.bring_up(block, wish), Replica):
                return
            left -= block.layout.stored_bytes
            yield NAMED + CHANGED

    def _work_ns(self, ticket: AcquireTicket, layouts: list[Layout], key: bytes) -> int | None:
        """The work of bringing up a position; None where it is not held."""
        work_ns = 0
        for layout in layouts:
            block = self._catalog.find(layout, key)
            if block is None or not (block.readable or block.dram is not None):
                return None
            replica = ticket.replica_of(block)
            if replica is None:
                nominal = self._link.costs[Tier.DRAM].nominal
                work_ns += nominal.work_ns(layout.stored_bytes)
            elif replica.state is State.FILLING:
                # What there is to do for it is queued already.
                work_ns += 1
        return work_ns


def doubtful_ns(said: Prediction) -> int:
    """How long after a prediction it is taken for wrong."""
    return int(said.ns + 3 * said.error_ns) + GRACE_NS
