"""A start: what the NVMe tier holds is taken over, and what does not fit is dropped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from kvstore.errors import BadRequest, Draining
from kvstore.store.directory import Directory
from kvstore.store.loop import Loop
from kvstore.tiers.base import RecoveredBlocks, StorageTier
from kvstore.types import LayoutSpec

log = logging.getLogger(__name__)


async def recover(loop: Loop, nvme: StorageTier, directory: Directory) -> None:
    """To be run before anything else is asked of the planner. Raises `Draining` when the
    store is closed meanwhile."""
    layouts = []
    for tenant, fields in nvme.recovered_layouts():
        try:
            layouts.append((tenant, LayoutSpec(**fields)))  # type: ignore[arg-type]
        except (TypeError, BadRequest):
            log.warning("a layout found on NVMe is not one; its blocks are dropped")
    # In a thread: nobody else uses the planner yet, and probes want answers.
    await loop.in_thread(lambda: _take_over(loop, nvme, layouts))
    await directory.list_all(loop.planner.catalog)
    log.info("found %d blocks on NVMe", len(loop.planner.catalog))


def _take_over(loop: Loop, nvme: StorageTier, layouts: list[tuple[str, LayoutSpec]]) -> None:
    found = _until_closed(loop, nvme.recovered_blocks())
    extents, refused = loop.planner.restore(layouts, nvme.recovered_extents(), found)
    for part, row in refused:
        assert isinstance(part, RecoveredBlocks)
        nvme.forget(part.addresses[row], part.header(row))
    for extent in extents:
        nvme.close_extent(extent)
    if refused or extents:
        log.warning(
            "%d extents and %d other blocks found on NVMe are dropped: there is no room for "
            "them, or their layout is not known",
            len(extents), len(refused),
        )  # fmt: skip


def _until_closed(loop: Loop, found: Iterable[RecoveredBlocks]) -> Iterator[RecoveredBlocks]:
    """A start that is called off ends: nobody waits for millions of blocks."""
    for part in found:
        if loop.closed:
            raise Draining("the server was stopped while it started")
        yield part
