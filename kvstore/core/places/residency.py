"""Which tier a block is in, and how it gets from one to the other.

Clients write into DRAM and read from DRAM; the NVMe tier behind it is inclusive (a
block that is brought up stays there). A block leaves the catalog with its last replica.

What one step of a replica touches is in `core.places.holdings`, who leaves for whom in
`core.places.dram_room` and `core.places.nvme_room`, what goes down ahead of need in
`core.places.write_back`. Here is what happens to a block from its first byte to its last.

Methods that need room return None or False where there is none now; room comes when
transfers end, so the planner asks again then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstore.core.actions import Copy
from kvstore.core.catalog import Block, Replica, is_ready
from kvstore.core.chores import CHANGED, SEEN, Chore
from kvstore.core.lifecycle import Event, State
from kvstore.core.links.breaker import BreakerState
from kvstore.core.links.learned import LinkCost, Speed
from kvstore.core.places.dram_room import DramRoom
from kvstore.core.places.endurance import Endurance
from kvstore.core.places.foreseen import Errand
from kvstore.core.places.holdings import Holdings
from kvstore.core.places.mirrors import Mirrors
from kvstore.core.places.nvme_room import NvmeRoom
from kvstore.core.places.shortlist import Verdict
from kvstore.core.places.write_back import WriteBack
from kvstore.core.transfers import Link, Transfer, TransferClass, Wish
from kvstore.core.uses import NOBODY
from kvstore.types import Refusal, Tier

NOMINAL = {Tier.DRAM: Speed(1e-4, 1.5e9), Tier.NVME: Speed(1e-4, 1.0e9)}
"""A common drive, read and written; what this one does is learned."""


class Residency:
    def __init__(
        self,
        holdings: Holdings,
        max_running: int,
        weight: Callable[[str], float],
        endurance: Endurance,
        foreseen_share: float,
    ) -> None:
        """`weight`: a tenant's share of the link to NVMe. `endurance`: of the drive.
        `foreseen_share`: the part of a tenant's DRAM that holds what was brought up for
        nobody yet, at most."""
        self.holdings = holdings
        self.catalog = holdings.catalog
        self.dram = holdings.dram
        self.nvme = holdings.nvme
        self.actions = holdings.actions
        costs = {tier: LinkCost(speed) for tier, speed in NOMINAL.items()}
        self.transfers = Link(max_running, costs, weight)
        self._nvme_room = None if self.nvme is None else NvmeRoom(holdings, self.nvme, endurance)
        self.endurance = endurance
        self.write_back = WriteBack(holdings, self._nvme_room, self.transfers, endurance)
        self._room = DramRoom(holdings, self.write_back)
        self._foreseen_share = foreseen_share

    @property
    def nvme_on(self) -> bool:
        return self.holdings.nvme_on

    @property
    def busy(self) -> bool:
        """Something is under way that may make room when it ends."""
        return len(self.transfers) > 0 or self.holdings.forgetting > 0

    @property
    def stalled(self) -> bool:
        """NVMe does not answer; nothing is asked of it until it does."""
        return self.transfers.breaker.state is BreakerState.OPEN

    # Coming in

    def place_for_write(self, block: Block) -> Replica | None:
        """A DRAM slot for a client to write into; None when there is no room now.

        The block is not in the catalog, and has no name, before it is published."""
        return self._room.place(block, State.WRITING)

    def publish(self, replica: Replica, stored_key: bytes, parent: bytes, checksum: int) -> None:
        """A client has written the slot: the block can be read from here on, under a
        name that the caller guarantees to be free."""
        replica.apply(Event.COMMIT)
        block = replica.block
        block.stored_key = stored_key
        block.parent = parent
        block.checksum = checksum
        self.catalog.enter(block)
        self.holdings.stored(replica)

    def release_writer(self, replica: Replica, event: Event) -> None:
        """The writer of a reserved slot gave up (ABORT), went (WRITER_GONE) or ran
        out of time (EXPIRE). The slot is free at once, unless it may still be written."""
        replica.apply(event)
        for mirrors in self.holdings.mirrors:
            mirrors.landings.not_written(replica, event)
        if replica.state is State.GONE:
            # Apart, so that they are freed at once and not by a garbage collection.
            replica.block.dram = None
            self.dram.vacate(replica)

    def bring_up(
        self, block: Block, wish: Wish, onto: Mirrors | None = None
    ) -> Replica | Refusal | None:
        """Start filling a replica from NVMe, where the block is READY, for somebody who waits
        for it: in the GPU's memory where he reads, `onto`, if there is room, and otherwise in
        DRAM. None when there is no room there either now."""
        target: Replica | Refusal | None = None
        if onto is not None:
            target = self._bring_up(block, wish, lambda: self._place_straight(block, wish, onto))
        if target is None:
            target = self._bring_up(block, wish, lambda: self._room.place(block, State.FILLING))
        return target

    def _place_straight(self, block: Block, wish: Wish, onto: Mirrors) -> Replica | None:
        assert block.nvme is not None
        return onto.straight.bring(block.nvme, wish.asked_ns)

    def _bring_up(
        self, block: Block, wish: Wish, place: Callable[[], Replica | None]
    ) -> Replica | Refusal | None:
        source = block.nvme
        assert source is not None and source.state is State.READY and block.dram is None
        refusal = self.transfers.refusal(wish.transfer_class)
        if refusal is not None:
            return refusal
        self.holdings.pin(source)
        target = place()
        if target is None:
            self.holdings.unpin(source)
            return None
        self.transfers.push(
            Transfer(
                target, block.layout.stored_bytes, Tier.DRAM, block.layout.tenant, wish,
                Copy(source, target),
            )
        )  # fmt: skip
        return target

    # Copies' ends

    def filled(self, copy: Copy, now_ns: int) -> TransferClass:
        """A copy has ended well; returns what it was for."""
        transfer_class = self._end_copy(copy, now_ns, well=True)
        copy.target.apply(Event.FILLED)
        if copy.target.state is State.READY:
            self.holdings.use(NOBODY)
            self.holdings.came(copy.target)
            if copy.target.tier is Tier.DRAM:
                unasked = transfer_class is TransferClass.PREFETCH
                self.holdings.foreseen.came(copy.target, unasked=unasked)
                if not unasked:
                    self.holdings.stays.came(copy.target)
        else:
            self.holdings.foreseen.called_off(copy.target)
            if not copy.target.pins:
                self.holdings.discard(copy.target)
        self.holdings.unpin(copy.source)
        return transfer_class

    def fill_failed(self, copy: Copy, now_ns: int, *, source_corrupt: bool) -> None:
        """A copy has ended badly. With `source_corrupt`, because its source is not
        what was once put there: then the block is not there any more."""
        target = copy.target
        self._end_copy(copy, now_ns, well=False)
        self.holdings.foreseen.called_off(target)
        abandoned = target.state is State.ABANDONED
        target.apply(Event.FILL_FAILED)
        self.holdings.home_of(target).vacate(target)
        if not abandoned:
            self._not_filled(target)
        if source_corrupt:
            self.holdings.damaged(copy.source)
        self.holdings.unpin(copy.source)

    def call_off(self, target: Replica) -> None:
        """Do not fill `target` after all, unless that has begun already."""
        if self._cancel(target):
            self._not_filled(target)

    def _end_copy(self, copy: Copy, now_ns: int, *, well: bool) -> TransferClass:
        self.write_back.ended(copy.target)
        return self.transfers.ended(copy.target, now_ns, well=well).transfer_class

    def _cancel(self, target: Replica) -> bool:
        """Take back a copy that has not started, and the slot it was to fill."""
        transfer = self.transfers.cancel(target)
        if transfer is None:
            return False
        self.holdings.foreseen.called_off(target)
        assert transfer.copy is not None
        target.apply(Event.FILL_FAILED)
        self.holdings.home_of(target).vacate(target)
        self.write_back.called_off(target)
        self.holdings.unpin(transfer.copy.source)
        return True

    def _not_filled(self, target: Replica) -> None:
        """A replica that its block counted on will not come."""
        block = target.block
        if target.tier is Tier.DRAM:
            block.dram = None
        elif target.tier is Tier.NVME:
            block.nvme = None
            self.holdings.note_dirty(block)
        self.holdings.left_a_tier(block)

    # What is brought up before anybody waits for it

    def foresee(self, block: Block, wish: Wish, errand: Errand) -> Replica | Refusal | None:
        """As `bring_up`, for nobody who waits for it: into what is free, or in place of what
        can be had again and was used longest ago. None where too much has been brought up
        already that nobody has used, or too much of that for this errand."""
        space, space_class = self.dram.space, block.layout.dram_class
        slots = self._foreseen_share * space.total_slots(space_class)
        room = slots * space_class.slot_bytes
        foreseen = self.holdings.foreseen
        if not foreseen.may_begin(block, errand, room):
            return None
        target = self._bring_up(block, wish, lambda: self._place_foreseen(block))
        if isinstance(target, Replica):
            foreseen.begins(target, errand, room)
        return target

    def let_go(self, errands: Iterable[Errand]) -> Chore:
        """Whoever they are for are not expected any more: what came for them leaves first,
        the deepest of a chain before the others."""
        for errand in errands:
            brought = errand.brought
            self.holdings.foreseen.let_go(errand)
            for replica in reversed(brought):
                if is_ready(replica):
                    self.holdings.let_go(replica)
                yield SEEN

    def _place_foreseen(self, block: Block) -> Replica | None:
        target = self._room.place(block, State.FILLING, evict=False)
        space_class = block.layout.dram_class
        if target is None and self.write_back.any_clean(space_class):
            victim = self.dram.coldest(space_class, self._may_make_way)
            self._room.write_next(space_class)
            if victim is not None and self.drop_if_clean(victim):
                self.dram.evictions += 1
                target = self._room.place(block, State.FILLING, evict=False)
        return target

    def _may_make_way(self, replica: Replica) -> Verdict:
        if self.holdings.foreseen.is_kept(replica) or not is_ready(replica.block.nvme):
            return Verdict.LATER
        return Verdict.IN_USE if replica.pins else Verdict.GO

    def call_off_prefetches(self, now_ns: int, ended: Iterable[Wish]) -> None:
        """Those that are too late now, and those for wishes that have ended, unless somebody
        else has come to wait for what they bring."""
        if not self.transfers.depth(TransferClass.PREFETCH):
            return
        unwanted = set(map(id, ended))
        self._call_off(
            transfer
            for transfer in self.transfers.queued(TransferClass.PREFETCH)
            if id(transfer.wish) in unwanted
            or (transfer.wish.deadline_ns is not None and transfer.wish.deadline_ns < now_ns)
        )

    # A device that does not answer

    def look_at_link(self, now_ns: int, *, stuck: bool) -> bool:
        """`stuck`: NVMe does not answer just now. True when that is new: then nothing is sent
        there any more until it does, and what has not begun is called off, but for demand,
        which who waits for it gives up."""
        if not self.transfers.breaker.look(now_ns, stuck=stuck):
            return False
        for transfer_class in (TransferClass.WRITE_BACK, TransferClass.PREFETCH):
            self._call_off(self.transfers.queued(transfer_class))
        return True

    def _call_off(self, transfers: Iterable[Transfer]) -> None:
        for transfer in transfers:
            assert transfer.copy is not None
            self.call_off(transfer.copy.target)

    # Going out

    def unpin_all(self, replicas: Iterable[Replica]) -> int:
        """Let go of replicas that are read. What nobody reads any more and was only kept, or
        was to be filled, for them is given up; returns how many those are."""
        ready, given_up = State.READY, 0
        for replica in replicas:
            replica.pins -= 1
            if replica.state is ready or replica.pins:
                continue
            if replica.state is State.DOOMED:
                self.holdings.discard(replica)
                given_up += 1
            elif replica.state is State.FILLING:
                self.call_off(replica)
                given_up += 1
        return given_up

    def drop_if_clean(self, replica: Replica) -> bool:
        """Drop a DRAM replica if it is also on NVMe and not in use."""
        if is_ready(replica) and not replica.pins and is_ready(replica.block.nvme):
            self.write_back.look_again()
            self.holdings.drop_from_dram(replica)
            return True
        return False

    def abandon(self, block: Block) -> None:
        """Forget a block in every tier. What is in use or on its way goes when that
        ends; nobody finds it meanwhile. Not for a block that is being written."""
        self.catalog.remove(block)
        for replica in (block.dram, block.nvme):
            if replica is None:
                continue
            if replica.state is State.READY:
                self.holdings.goes(replica)
                replica.apply(Event.DOOM)
                if not replica.pins:
                    self.holdings.discard(replica)
            elif replica.state is State.FILLING:
                self._stop_filling(replica)
        block.dram = block.nvme = None

    def _stop_filling(self, replica: Replica) -> None:
        """Nobody will find what is being filled. A copy that somebody waits for, or
        that has started, ends by itself."""
        if replica.pins or not self._cancel(replica):
            replica.apply(Event.ABANDON)

    def drop_unworthy(self, addresses: Iterable[int]) -> list[int]:
        """See `NvmeRoom`."""
        assert self._nvme_room is not None
        return self._nvme_room.drop_unworthy(addresses) if self.nvme_on else []

    def forgotten(self, replica: Replica) -> None:
        """The NVMe tier has struck a replica."""
        self.holdings.forgotten(replica)
        self.write_back.look_again()

    def switch_off_nvme(self) -> Chore:
        """The tier failed. Nothing goes there any more; what is only there goes from
        the catalog, and until then is not found by who tries to read it."""
        holdings = self.holdings
        if not holdings.nvme_on:
            return
        holdings.nvme_on = False
        holdings.nothing_is_dirty()
        assert self.nvme is not None
        for replica in self.nvme.space.residents():
            block = replica.block
            if replica.state is State.READY:
                holdings.goes(replica)
                replica.apply(Event.DAMAGE)
                block.nvme = None
                holdings.left_a_tier(block)
            elif replica.state is State.FILLING:
                block.nvme = None
                self._stop_filling(replica)
                # What it was to be filled from may be damaged, and gone.
                holdings.left_a_tier(block)
            yield CHANGED
