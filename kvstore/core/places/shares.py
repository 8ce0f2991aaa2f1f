"""What a GPU's memory is shared among: mirrors that are hot, that landed, that were read straight.

A share knows its mirrors that are READY, in the order in which they should go, and what becomes
of the others when the memory they are to lie in does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from kvstore.core.catalog import Block, Replica
from kvstore.core.lifecycle import State
from kvstore.core.policies.ring import Ring
from kvstore.core.space import SpaceClass
from kvstore.types import GPU_ONLY, Tier

if TYPE_CHECKING:
    from kvstore.core.places.mirrors import Mirrors

NO_PLACE = 0
LOOKED_AT = 256
"""Of the first that should go: they may all be in use."""


class Mirror(Replica):
    """A copy of `source`, in the memory of one GPU: of a replica in DRAM, or straight of one on
    NVMe. `landed_ns`: when whoever wrote the source has written it, or was granted the place.

    A pin keeps one that was read straight from making room for another, and from nothing else.
    """

    __slots__ = ("landed_ns", "on", "share", "source", "space_class")
    tier = Tier.VRAM

    def __init__(self, on: Mirrors, share: Share, source: Replica) -> None:
        super().__init__(source.block, NO_PLACE, State.FILLING)
        self.on = on
        self.share = share
        self.source = source
        self.space_class = class_of(source.block)
        self.landed_ns = 0

    @property
    def listed_as(self) -> int:
        """The address that leases name its block by, and readers look for."""
        if self.source.tier is Tier.DRAM:
            return self.source.address
        return GPU_ONLY | self.address


class Share:
    """Mirrors of one kind on one GPU. Of those that are READY, the least recently used is first
    to go."""

    def __init__(self, on: Mirrors) -> None:
        self.held_bytes = 0
        """Of all its places."""
        self._on = on
        self._ready: dict[SpaceClass, Ring] = {}

    def place(self, source: Replica) -> Mirror | None:
        """One that is to be filled, in what is free in the extents of its class."""
        mirror = Mirror(self._on, self, source)
        address = self._on.space.allocate(mirror.space_class, mirror)
        if address is None:
            return None
        mirror.address = address
        self.held_bytes += mirror.space_class.slot_bytes
        self._on.of[source] = mirror
        return mirror

    def append(self, mirror: Mirror) -> None:
        """It is READY."""
        self._ready.setdefault(mirror.space_class, Ring()).append(mirror)

    def discard(self, mirror: Mirror) -> None:
        """It is READY no more, or another share's."""
        self._ready[mirror.space_class].discard(mirror)

    def pass_on(self, mirror: Mirror, share: Share) -> None:
        """What is READY is another's from now on."""
        self.discard(mirror)
        self.held_bytes -= mirror.space_class.slot_bytes
        mirror.share = share
        share.held_bytes += mirror.space_class.slot_bytes
        share.append(mirror)

    def used(self, mirror: Mirror) -> None:
        """Somebody asks for a block that is READY here."""
        self._ready[mirror.space_class].renew(mirror)

    def first(self, space_class: SpaceClass) -> Mirror | None:
        """The one that is to make room for another, of a class."""
        return next(self.coldest(space_class), None)

    def coldest(self, space_class: SpaceClass, *, in_use: bool = False) -> Iterator[Mirror]:
        """Some of a class that are READY, first things first: those that are leased, or those
        that are not."""
        for mirror in list(islice(self._ready.get(space_class, ()), LOOKED_AT)):
            if bool(mirror.pins) is in_use:
                assert isinstance(mirror, Mirror)
                yield mirror

    def coming(self) -> Iterable[Mirror]:
        """Those that are not READY yet."""
        return ()

    def extent_goes(self, mirror: Mirror) -> None:
        """The memory that it has its place in goes."""
        self._on.drop(mirror)

    def ready(self) -> Iterator[Mirror]:
        """All that are READY."""
        for ring in self._ready.values():
            for mirror in ring:
                assert isinstance(mirror, Mirror)
                yield mirror


def class_of(block: Block) -> SpaceClass:
    """What it takes on a GPU is what it takes in DRAM."""
    return block.layout.dram_class
