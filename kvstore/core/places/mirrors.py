"""Which blocks are in a GPU's memory too: copies, which come after what they are copies of and go
before it.

So mirrors have no part in what is held, found or saved; they only make some loads shorter, and
everything about them may fail. No pin keeps their memory (`device.mirrors` says why none is
needed).

    hot       asked for `HOT_USES` times or more, of a layout that some worker on the GPU reads:
              the store copies it there from DRAM
    landed    handed over to somebody who reads on the GPU (`core.places.landings`)
    straight  read from NVMe for somebody who reads on the GPU, and in DRAM not at all
              (`core.places.straight`)
    room      what is free, then what the least recently used mirror has, where that is worth less
              (`core.places.shares`)
    pressure  when others lack memory it is given back (`core.places.vram_room`)

The shell asks for `work`, does it, and says how it ended, a piece after the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kvstore.core.catalog import Layout, Replica, is_ready
from kvstore.core.lifecycle import Event, State
from kvstore.core.places.landings import HOT_USES, Landings
from kvstore.core.places.shares import Mirror, Share, class_of
from kvstore.core.places.straight import Slots, StraightReads
from kvstore.core.places.vram_room import VramRoom
from kvstore.core.space import Space
from kvstore.types import Tier

if TYPE_CHECKING:
    from kvstore.core.places.holdings import Holdings
    from kvstore.core.sessions import Session

MOST_WANTED = 4096
"""Blocks that wait to be copied; of more, those that were asked for last."""
BATCH_BYTES = 32 << 20


@dataclass(slots=True)
class MirrorWork:
    """To be done in this order. `closes`, `opens`: extents; of the latter one at most. `copies`:
    each source is pinned until its end is told."""

    closes: list[int] = field(default_factory=list)
    opens: list[int] = field(default_factory=list)
    copies: list[Mirror] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.closes or self.opens or self.copies)


class Hot(Share):
    """What is worth its place by itself."""

    def coming(self) -> Iterable[Mirror]:
        return self._on.written


class Reads(NamedTuple):
    """A session reads blocks of a layout: since when, and under which name, if under any.
    `straight`: they may be read straight for it."""

    since_ns: int
    reader: bytes
    straight: bool


class Mirrors(VramRoom):
    """Of one GPU."""

    def __init__(
        self, holdings: Holdings, space: Space, reserve_bytes: int, gpu: str = "gpu"
    ) -> None:
        super().__init__(holdings, space, reserve_bytes)
        self.gpu = gpu
        self.straight_bytes = 0
        """The shell's: blocks so large are read straight; 0: none."""
        self.hot = Hot(self)
        self.landings = Landings(self)
        self.straight = StraightReads(self)
        self.shares = (self.straight, self.landings, self.hot)
        self.hits = 0
        """Blocks that somebody, on this GPU or elsewhere, read while there was a mirror of them."""
        self.copied_bytes = 0
        self._wanted: OrderedDict[Replica, None] = OrderedDict()
        # By layout, who reads blocks of it here.
        self._readers: dict[tuple[str, bytes], dict[Session, Reads]] = {}

    def __len__(self) -> int:
        """Blocks there are, and those on their way here."""
        return len(self.of)

    @property
    def short(self) -> bool:
        """When last looked, others had left less than is reserved for them. Nobody looks where
        there is nothing to give back."""
        return self.lacking and not self.idle

    # What others say

    def reads(self, layout: Layout, session: Session, now_ns: int = 0, reader: bytes = b"") -> None:
        """Its process, on the GPU, reads blocks of this layout from now on, under that name; b"":
        under none."""
        readers = self._readers.setdefault(_name(layout), {})
        known = readers.get(session)
        since_ns = now_ns if known is None else known.since_ns
        straight = bool(reader) and self.reads_straight(layout)
        readers[session] = Reads(since_ns, reader, straight)

    def read_since(self, layout: Layout, writer: Session) -> int | None:
        """Since when somebody but their writer reads such blocks here; None: nobody does."""
        readers = self._readers.get(_name(layout), {})
        since = [reads.since_ns for reader, reads in readers.items() if reader is not writer]
        return min(since, default=None)

    def is_read_as(self, layout: Layout, reader: bytes) -> bool:
        """Somebody reads such blocks here under that name."""
        readers = self._readers.get(_name(layout), {})
        return any(reads.reader == reader for reads in readers.values())

    @property
    def is_read_straight(self) -> bool:
        """There is somebody for whom blocks may be read straight."""
        if not self.straight_bytes:
            return False
        return any(reads.straight for by in self._readers.values() for reads in by.values())

    def reads_straight(self, layout: Layout) -> bool:
        """Blocks of it come here from NVMe without a detour, where that is wanted. What is coded
        there has to be brought back before it can be read."""
        return not layout.spec.codec and layout.block_bytes <= self.straight_bytes

    def reads_no_more(self, layout: Layout, session: Session) -> None:
        readers = self._readers.get(_name(layout), {})
        readers.pop(session, None)
        if not readers:
            self._readers.pop(_name(layout), None)

    def asked_for(self, replicas: Iterable[Replica]) -> None:
        """Somebody reads replicas in DRAM."""
        if not self._readers:
            return
        mirrors, wanted, readers = self.of, self._wanted, self._readers
        for replica in replicas:
            mirror = mirrors.get(replica)
            if mirror is not None:
                self.use(mirror)
            elif replica.block.uses >= HOT_USES and _name(replica.block.layout) in readers:
                wanted[replica] = None
                wanted.move_to_end(replica)
        while len(wanted) > MOST_WANTED:
            wanted.popitem(last=False)

    def use(self, mirror: Mirror) -> None:
        """Somebody asks for a block that is here, or on its way."""
        if mirror.state is State.READY:
            self.hits += 1
            mirror.share.used(mirror)

    def goes(self, replica: Replica) -> None:
        """A replica in DRAM or on NVMe is about to stop being READY."""
        self._wanted.pop(replica, None)
        mirror = self.of.get(replica)
        if mirror is not None:
            self.drop(mirror)

    # Work

    @property
    def idle(self) -> bool:
        """There is nothing to do, and nothing to be given back."""
        waits = self._wanted or self.too_small or not self.straight.idle
        return not waits and not self.space.used_bytes and not self.space.classes()

    def work(self, free_bytes: int, now_ns: int) -> MirrorWork:
        """What is to be done now, when so much of the GPU's memory is free."""
        self.landings.forget_old(now_ns)
        work = MirrorWork(self.give_back(free_bytes, now_ns, nobody_reads=not self._readers))
        self.straight.look(now_ns)
        if work.closes:
            return work
        left = BATCH_BYTES
        while self._wanted and left > 0:
            # What was asked for last first: what waits for long may have cooled down.
            replica, _ = self._wanted.popitem()
            if not is_ready(replica) or _name(replica.block.layout) not in self._readers:
                continue
            mirror = self.hot.place(replica)
            if mirror is None and self.may_grow(class_of(replica.block), now_ns):
                if work.opens:
                    self._wanted[replica] = None
                    break
                self.grow(class_of(replica.block), work.opens, work.closes)
                mirror = self.hot.place(replica)
            if mirror is None:
                mirror = self._replace(replica)
            if mirror is not None:
                self._holdings.pin(replica)
                self.written.add(mirror)
                work.copies.append(mirror)
                left -= replica.block.layout.block_bytes
        while self.too_small and not work.opens:
            space_class = self.too_small.pop()
            wanted = self.landings.may_grow or self.straight.may_grow
            if wanted and self.may_grow(space_class, now_ns):
                self.grow(space_class, work.opens, work.closes)
        return work

    def _replace(self, replica: Replica) -> Mirror | None:
        """In place of one of its class that is worth less."""
        coldest = self.hot.first(class_of(replica.block))
        if coldest is None or self._worth(coldest.source) >= self._worth(replica):
            return None
        self.evict(coldest)
        return self.hot.place(replica)

    def _worth(self, replica: Replica) -> tuple[float, int]:
        return self._holdings.worth(replica), replica.block.uses

    def ended(self, mirror: Mirror, *, well: bool) -> None:
        """A copy has ended. Where it was not well, what is there is anybody's guess."""
        self.written.discard(mirror)
        # What did not have its checksum was not copied.
        mirror.source.confirmed |= well
        if well and mirror.state is State.FILLING:
            mirror.apply(Event.FILLED)
            self.found(mirror)
            self.copied_bytes += mirror.block.layout.block_bytes
        else:
            mirror.apply(Event.FILL_FAILED)
            self.never_came(mirror)
        self._holdings.unpin(mirror.source)

    def lost(self) -> None:
        """The GPU is used no more: there are no mirrors, and no extents."""
        self.straight_bytes = 0
        self.straight.slots = Slots.UNUSED
        for mirror in list(self.written):
            self.ended(mirror, well=False)
        self._wanted.clear()
        self._readers.clear()
        self.give_all_back()

    # For integrity checks

    def pins(self) -> Iterator[Replica]:
        """Every replica in DRAM that is in use here, once a use."""
        for mirror in self.written:
            yield mirror.source

    def replicas(self) -> set[Mirror]:
        """All that somebody may hold on to or wait for, with a place or without."""
        ready = {mirror for share in self.shares for mirror in share.ready()}
        return ready.union(self.straight.coming())

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        self.check_room()
        granted, lost = set(self.landings.coming()), set(self.landings.lost())
        there = self.replicas() | self.written | granted | lost
        if set(self.space.residents()) != {mirror for mirror in there if mirror.address}:
            raise AssertionError("mirrors and the GPU's slots differ")
        if {self.space.extent_of(each.address) for each in lost} - self.unsafe:
            raise AssertionError("memory that a lost writer may write into is kept")
        for source, mirror in self.of.items():
            if mirror.source is not source or mirror not in there:
                raise AssertionError("a mirror is listed as another's")
            if source.tier is Tier.NVME and source.block.nvme is not source:
                raise AssertionError("a mirror of what was on NVMe")
            written = source.state is State.WRITING
            if not (written if mirror in granted else is_ready(source)):
                raise AssertionError("a mirror of what is not there")


def _name(layout: Layout) -> tuple[str, bytes]:
    return layout.tenant, layout.layout_id
