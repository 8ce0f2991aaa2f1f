"""What is found on NVMe at a start, taken over.

Nothing is told to anybody (`Holdings.changed`): it may be millions, and is everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvstore.core.catalog import Block, Layout, Replica
from kvstore.core.holdings import Holdings
from kvstore.core.lifecycle import Event, State
from kvstore.core.pool import Pool
from kvstore.core.space import SpaceClass
from kvstore.errors import UnknownLayout
from kvstore.types import LayoutSpec


class StoredBlock(Protocol):
    """What a storage tier tells of a block it holds (`tiers.base.BlockHeader`)."""

    @property
    def stored_key(self) -> bytes: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def layout_id(self) -> bytes: ...
    @property
    def tenant(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def checksum(self) -> int: ...


def restore(
    holdings: Holdings,
    layouts: Iterable[tuple[str, LayoutSpec]],
    extents: Iterable[tuple[int, int]],
    blocks: Iterable[tuple[StoredBlock, int]],
) -> tuple[list[int], list[tuple[StoredBlock, int]]]:
    """Take over what an NVMe tier holds: layouts as (tenant, spec), extents as
    (number, slot bytes), blocks with their addresses. To be called before anything
    else. Returns the extents that do not fit (the capacity is smaller now) and, in
    others, the blocks that do not (the layout is not known), for the tier to drop.
    O(blocks)."""
    nvme = holdings.nvme
    assert nvme is not None
    for tenant, spec in layouts:
        holdings.catalog.register_layout(tenant, spec)
    refused_extents: set[int] = set()
    for number, slot_bytes in extents:
        try:
            nvme.space.restore_extent(number, SpaceClass("", slot_bytes))
        except ValueError:
            refused_extents.add(number)
    refused_blocks = []
    for stored, address in blocks:
        try:
            layout = holdings.catalog.layout(stored.tenant, stored.layout_id)
            _take_over(holdings, nvme, layout, stored, address)
        except (UnknownLayout, ValueError):
            if nvme.space.extent_of(address) not in refused_extents:
                refused_blocks.append((stored, address))
    _put_in_order(holdings, nvme)
    return sorted(refused_extents), refused_blocks


def _take_over(
    holdings: Holdings, nvme: Pool, layout: Layout, stored: StoredBlock, address: int
) -> None:
    """Raises ValueError when a block cannot be there: a name or slot taken twice,
    another length than its layout's, a slot of another size."""
    catalog = holdings.catalog
    if catalog.get(stored.stored_key) is not None:
        raise ValueError("a block is stored twice")
    if stored.length != layout.block_bytes:
        raise ValueError("a block has not its layout's length")
    parent = catalog.get(stored.parent)
    # Its parent's own name where that is known: see `Catalog.adopt`. A copy that is
    # let go of later leaves a hole, which costs as much as the copy.
    named = stored.parent if parent is None else parent.stored_key
    block = Block(stored.stored_key, named, layout)
    block.checksum = stored.checksum
    block.nvme = nvme.restore(block, address, layout.nvme_class)
    catalog.file(block)


def _put_in_order(holdings: Holdings, nvme: Pool) -> None:
    """The order in which blocks should leave: children before parents, and otherwise
    by age as far as addresses tell it. From here on they are found."""
    nvme.space.finish_restore()
    parents_first: list[Replica] = []
    for replica in nvme.space.residents(backwards=True):
        path: list[Replica] = []
        # Ends at a block that has its place already, which also ends a ring.
        following: Replica | None = replica
        while following is not None and following.state is State.FILLING:
            following.apply(Event.FILLED)
            path.append(following)
            parent = holdings.catalog.adopt(following.block)
            following = None if parent is None else parent.nvme
        path.reverse()
        parents_first += path
    for replica in reversed(parents_first):
        nvme.insert(replica, holdings.class_of(replica))
