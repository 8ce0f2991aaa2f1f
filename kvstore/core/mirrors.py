"""Which blocks are in a GPU's memory too: copies of what is READY in DRAM and hot.

A *mirror* lies in DRAM as well, always: it comes after its replica there, and goes with it. So
it has no part in what is held, found, leased or saved; it only makes some loads shorter, and
everything about it may fail. No pin keeps it (`device.mirrors` says why none is needed).

    hot       asked for `HOT_USES` times or more, of a layout that some worker on the GPU reads
    room      what is free, then what the least recently used mirror has, where that is worth less
    pressure  when others leave less than `reserve_bytes` of the GPU's memory free, extents are
              given back until it is free again, the one with the coldest mirror first

The shell asks for `work`, does it, and says how it ended, a piece after the other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from kvstore.core.actions import Mirrored, Unmirrored
from kvstore.core.catalog import Block, Layout, Replica, is_ready
from kvstore.core.lifecycle import Event, State
from kvstore.core.policies.ring import Ring
from kvstore.core.space import Space, SpaceClass

if TYPE_CHECKING:
    from kvstore.core.holdings import Holdings

HOT_USES = 2
MOST_WANTED = 4096
"""Blocks that wait to be copied; of more, those that were asked for last."""
BATCH_BYTES = 32 << 20
LOOKED_AT = 256
"""Of the coldest mirrors' extents, to find one to give back."""
SETTLES_NS = 500_000_000
"""From giving memory back until others have it: readers look at their own time."""
CALM_NS = 5_000_000_000
"""After pressure, until more memory is taken."""


class Mirror(Replica):
    """A copy of `source`, a replica in DRAM."""

    __slots__ = ("source", "space_class")

    def __init__(self, source: Replica, address: int, space_class: SpaceClass) -> None:
        super().__init__(source.block, address, State.FILLING)
        self.source = source
        self.space_class = space_class


@dataclass(slots=True)
class MirrorWork:
    """To be done in this order. `closes`, `opens`: extents; of the latter one at most. `copies`:
    each source is pinned until its end is told."""

    closes: list[int] = field(default_factory=list)
    opens: list[int] = field(default_factory=list)
    copies: list[Mirror] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.closes or self.opens or self.copies)


class Mirrors:
    """Of one GPU."""

    def __init__(self, holdings: Holdings, space: Space, reserve_bytes: int) -> None:
        self.space = space
        self.evictions = 0
        self.given_back = 0
        """Extents, to pressure."""
        self.copied_bytes = 0
        self._holdings = holdings
        self._reserve_bytes = reserve_bytes
        self._mirrors: dict[Replica, Mirror] = {}
        # Least recently used first.
        self._order: dict[SpaceClass, Ring] = {}
        self._coming: set[Mirror] = set()
        self._wanted: OrderedDict[Replica, None] = OrderedDict()
        # By layout, how many workers read blocks of it here.
        self._readers: Counter[tuple[str, bytes]] = Counter()
        self._settles_ns = self._calm_ns = 0

    def __len__(self) -> int:
        return len(self._mirrors)

    # What others say

    def reads(self, layout: Layout) -> None:
        """A worker on the GPU reads blocks of this layout from now on."""
        self._readers[_name(layout)] += 1

    def reads_no_more(self, layout: Layout) -> None:
        self._readers[_name(layout)] -= 1
        if self._readers[_name(layout)] <= 0:
            del self._readers[_name(layout)]

    def asked_for(self, replicas: Iterable[Replica]) -> None:
        """Somebody reads replicas in DRAM."""
        if not self._readers:
            return
        mirrors, wanted, readers = self._mirrors, self._wanted, self._readers
        for replica in replicas:
            mirror = mirrors.get(replica)
            if mirror is not None:
                if mirror.state is State.READY:
                    self._order[mirror.space_class].renew(mirror)
            elif replica.block.uses >= HOT_USES and _name(replica.block.layout) in readers:
                wanted[replica] = None
                wanted.move_to_end(replica)
        while len(wanted) > MOST_WANTED:
            wanted.popitem(last=False)

    def goes(self, replica: Replica) -> None:
        """A replica in DRAM is about to stop being READY."""
        self._wanted.pop(replica, None)
        mirror = self._mirrors.get(replica)
        if mirror is not None:
            self._drop(mirror)

    # Work

    @property
    def idle(self) -> bool:
        """There is nothing to do, and nothing to be given back."""
        return not self._wanted and not self.space.used_bytes and not self.space.classes()

    def work(self, free_bytes: int, now_ns: int) -> MirrorWork:
        """What is to be done now, when so much of the GPU's memory is free."""
        work = MirrorWork(closes=self._give_back(free_bytes, now_ns))
        if work.closes:
            return work
        left = BATCH_BYTES
        while self._wanted and left > 0:
            # What was asked for last first: what waits for long may have cooled down.
            replica, _ = self._wanted.popitem()
            if not is_ready(replica) or _name(replica.block.layout) not in self._readers:
                continue
            mirror = self._place(replica)
            if mirror is None and self._may_grow(_class_of(replica.block), free_bytes, now_ns):
                if work.opens:
                    self._wanted[replica] = None
                    break
                self._grow(_class_of(replica.block), work)
                mirror = self._place(replica)
            if mirror is None:
                mirror = self._replace(replica)
            if mirror is not None:
                self._holdings.pin(replica)
                self._coming.add(mirror)
                work.copies.append(mirror)
                left -= replica.block.layout.block_bytes
        return work

    def ended(self, mirror: Mirror, *, well: bool) -> None:
        """A copy has ended. Where it was not well, what is there is anybody's guess."""
        self._coming.discard(mirror)
        here = self._mirrors.get(mirror.source) is mirror
        if here and well:
            mirror.apply(Event.FILLED)
            self._order.setdefault(mirror.space_class, Ring()).append(mirror)
            self._holdings.actions.append(Mirrored(self, mirror))
            self.copied_bytes += mirror.block.layout.block_bytes
        else:
            if here:
                del self._mirrors[mirror.source]
            mirror.apply(Event.FILL_FAILED)
            self.space.free(mirror.address)
        self._holdings.unpin(mirror.source)

    def not_opened(self, extent: int, now_ns: int) -> None:
        """There was no memory for an extent after all, and its copies have ended badly: no more
        is taken for a while."""
        self.space.close_extent(extent)
        self._calm_ns = now_ns + CALM_NS

    def lost(self) -> None:
        """The GPU is gone, and nothing is under way: there are no mirrors any more."""
        for mirror in list(self._mirrors.values()):
            self._drop(mirror)
        self._wanted.clear()
        self._readers.clear()

    # Room

    def _place(self, replica: Replica) -> Mirror | None:
        """In what is free."""
        space_class = _class_of(replica.block)
        mirror = Mirror(replica, 0, space_class)
        address = self.space.allocate(space_class, mirror)
        if address is None:
            return None
        mirror.address = address
        self._mirrors[replica] = mirror
        return mirror

    def _may_grow(self, space_class: SpaceClass, free_bytes: int, now_ns: int) -> bool:
        """There is an extent to be had for the class, and others have so much to spare that it
        need not go back soon."""
        enough = free_bytes >= self._reserve_bytes + 2 * self.space.extent_bytes
        has_none = not self.space.extents_of(space_class)
        there_is = self.space.spare_extents > 0 or has_none
        return there_is and enough and now_ns >= self._calm_ns

    def _grow(self, space_class: SpaceClass, work: MirrorWork) -> None:
        """One more extent for a class, if one is spare; its first, of the class that has most."""
        extent = self.space.open_extent(space_class)
        if extent is None and not self.space.extents_of(space_class):
            coldest = self._coldest_extent()
            if coldest is not None:
                self._close(coldest)
                work.closes.append(coldest)
                extent = self.space.open_extent(space_class)
        if extent is not None:
            work.opens.append(extent)

    def _replace(self, replica: Replica) -> Mirror | None:
        """In place of one of its class that is worth less."""
        order = self._order.get(_class_of(replica.block))
        coldest = None if order is None else next(iter(order), None)
        if not isinstance(coldest, Mirror) or self._worth(coldest.source) >= self._worth(replica):
            return None
        self.evictions += 1
        self._drop(coldest)
        return self._place(replica)

    def _worth(self, replica: Replica) -> tuple[float, int]:
        return self._holdings.worth(replica), replica.block.uses

    def _give_back(self, free_bytes: int, now_ns: int) -> list[int]:
        """Extents to close: as many as others lack, and all that nobody reads."""
        lacking = self._reserve_bytes - free_bytes
        if lacking > 0:
            self._calm_ns = now_ns + CALM_NS
        if not self._readers:
            lacking = self.space.capacity_bytes
        elif now_ns < self._settles_ns:
            return []
        closed: list[int] = []
        while len(closed) * self.space.extent_bytes < lacking:
            extent = self._coldest_extent()
            if extent is None:
                break
            self._close(extent)
            closed.append(extent)
        if closed:
            self.given_back += len(closed)
            self._settles_ns = now_ns + SETTLES_NS
        return closed

    def _close(self, extent: int) -> None:
        for resident in self.space.residents_of(extent):
            assert isinstance(resident, Mirror)
            self._drop(resident)
        self.space.close_extent(extent)

    def _coldest_extent(self) -> int | None:
        """Of the class that has most; none that is being written into."""
        for space_class in sorted(self.space.classes(), key=self.space.extents_of, reverse=True):
            for number in self._extents_of(space_class):
                if self._coming.isdisjoint(self.space.residents_of(number)):
                    return number
        return None

    def _extents_of(self, space_class: SpaceClass) -> Iterator[int]:
        """Some of a class's extents: those nobody is in, then by their coldest mirror."""
        yield from self.space.empty_extents(space_class)
        order = self._order.get(space_class)
        if order is not None:
            for mirror in list(islice(order, LOOKED_AT)):
                yield self.space.extent_of(mirror.address)

    def _drop(self, mirror: Mirror) -> None:
        """Whoever looks for it finds none from now on. What is being written goes when that has
        ended."""
        del self._mirrors[mirror.source]
        if mirror.state is State.READY:
            self._order[mirror.space_class].discard(mirror)
            self._holdings.actions.append(Unmirrored(self, mirror))
            mirror.apply(Event.DROP)
            self.space.free(mirror.address)

    # For integrity checks

    def pins(self) -> Iterator[Replica]:
        """Every replica in DRAM that is in use here, once a use."""
        for mirror in self._coming:
            yield mirror.source

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        self.space.check_integrity()
        ready = {mirror for mirror in self._mirrors.values() if mirror.state is State.READY}
        listed = {mirror for order in self._order.values() for mirror in order}
        if ready != listed:
            raise AssertionError("a mirror is wrongly listed")
        there = ready | self._coming
        if set(self.space.residents()) != there or not set(self._mirrors.values()) <= there:
            raise AssertionError("mirrors and the GPU's slots differ")
        for source, mirror in self._mirrors.items():
            if mirror.source is not source or not is_ready(source):
                raise AssertionError("a mirror of what is not in DRAM")


def _name(layout: Layout) -> tuple[str, bytes]:
    return layout.tenant, layout.layout_id


def _class_of(block: Block) -> SpaceClass:
    return block.layout.dram_class
