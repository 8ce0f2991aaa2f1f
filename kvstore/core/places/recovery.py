"""What is found on NVMe at a start, taken over.

Nothing is told to anybody (`Holdings.changed`): it may be millions, and is everything.
For the same reason blocks come in columns, and what is done for each of them is little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from kvstore.core.catalog import Block, Catalog
from kvstore.core.lifecycle import Event, State, next_state
from kvstore.core.places.holdings import Holdings
from kvstore.core.places.pool import Pool
from kvstore.core.space import SpaceClass
from kvstore.errors import UnknownLayout
from kvstore.types import LayoutSpec

_FOUND = next_state(State.FILLING, Event.FILLED)


class StoredBlocks(Protocol):
    """What a storage tier tells of blocks it holds (`tiers.base.RecoveredBlocks`)."""

    @property
    def tenant(self) -> str: ...
    @property
    def layout_id(self) -> bytes: ...
    @property
    def length(self) -> int: ...
    @property
    def stored_keys(self) -> Sequence[bytes]: ...
    @property
    def parents(self) -> Sequence[bytes]: ...
    @property
    def checksums(self) -> Sequence[int]: ...
    @property
    def addresses(self) -> Sequence[int]: ...


def restore(
    holdings: Holdings,
    layouts: Iterable[tuple[str, LayoutSpec]],
    extents: Iterable[tuple[int, int]],
    blocks: Iterable[StoredBlocks],
) -> tuple[list[int], list[tuple[StoredBlocks, int]]]:
    """Take over what an NVMe tier holds: layouts as (tenant, spec), extents as
    (number, slot bytes), blocks, those written last first. To be called before anything
    else. Returns the extents that do not fit (the capacity is smaller now) and, in
    others, the blocks that do not (the layout is not known), as rows of what was told,
    for the tier to drop. O(blocks)."""
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
    refused_blocks: list[tuple[StoredBlocks, int]] = []
    found: list[Block] = []
    early: list[Block] = []
    for part in blocks:
        for row in _take_over(holdings.catalog, nvme, part, found, early):
            if nvme.space.extent_of(part.addresses[row]) not in refused_extents:
                refused_blocks.append((part, row))
    nvme.space.finish_restore()
    _put_in_order(holdings.catalog, nvme, found, early)
    return sorted(refused_extents), refused_blocks


def _take_over(
    catalog: Catalog,
    nvme: Pool,
    part: StoredBlocks,
    found: list[Block],
    early: list[Block],
) -> Sequence[int]:
    """Append the blocks to `found`, and to `early` those whose parent was not there yet.
    The rows of those that cannot be there: their name or slot is taken twice,
    they have another length than is stored of their layout's, or their slot is of another size."""
    try:
        layout = catalog.layout(part.tenant, part.layout_id)
    except UnknownLayout:
        return range(len(part.stored_keys))
    if part.length != layout.stored_bytes or layout.nvme_class is None:
        return range(len(part.stored_keys))
    entered, too_early = catalog.enter_many(layout, part.stored_keys, part.parents, part.checksums)
    refused = nvme.restore(entered, part.addresses, layout.nvme_class)
    for row in refused:
        block = entered[row]
        if block is not None:
            catalog.remove(block)
            entered[row] = None
    found += filter(None, entered)
    early += too_early
    return refused


def _put_in_order(catalog: Catalog, nvme: Pool, found: list[Block], early: list[Block]) -> None:
    """The order in which blocks should leave: children before parents, and otherwise
    by age as far as it is known. From here on they are found."""
    if any(catalog.get(block.parent) is not None for block in early):
        found = _parents_first(catalog, found)
    for block in found:
        assert block.nvme is not None
        block.nvme.state = _FOUND
    for layout, blocks in groupby(reversed(found), attrgetter("layout")):
        nvme.insert_all(map(attrgetter("nvme"), blocks), layout.nvme_class)


def _parents_first(catalog: Catalog, found: list[Block]) -> list[Block]:
    """In the same order, but for parents that were found after a child: they come before
    the first of those."""
    ordered: list[Block] = []
    for block in found:
        path: list[Block] = []
        following: Block | None = block
        # Ends at a block that has its place already, which also ends a ring.
        while following is not None and following.nvme and following.nvme.state is not _FOUND:
            following.nvme.state = _FOUND
            path.append(following)
            following = catalog.get(following.parent)
        for each in reversed(path):
            if following is not None:
                each.hang_on(following)
            ordered.append(each)
            following = each
    return ordered
