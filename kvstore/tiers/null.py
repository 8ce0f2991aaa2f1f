"""A tier that is always full: what the store has when there is no tier below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from kvstore.errors import CorruptBlock, TierFull
from kvstore.tiers.base import BlockHeader, Fill, RecoveredBlocks
from kvstore.types import align_up


class NullStorage:
    """A `StorageTier` that takes nothing and holds nothing."""

    usable_bytes = 0

    def __init__(self, extent_bytes: int) -> None:
        self.extent_bytes = extent_bytes

    def wear(self) -> Mapping[str, int]:
        return {}

    def overdue(self) -> bool:
        return False

    def ask_before_moving(self, not_worth_moving: Callable[[list[int]], Iterable[int]]) -> None:
        return None

    def slot_bytes(self, block_bytes: int) -> int:
        return align_up(block_bytes)

    def open_extent(self, extent: int, slot_bytes: int) -> None:
        raise TierFull("there is no tier here")

    def close_extent(self, extent: int) -> None:
        return None

    def write(self, address: int, header: BlockHeader, payload: memoryview) -> None:
        raise TierFull("there is no tier here")

    def read(self, address: int, header: BlockHeader, into: memoryview) -> None:
        raise CorruptBlock("there is no tier here")

    def read_straight(self, address: int, header: BlockHeader, fill: Fill) -> None:
        raise CorruptBlock("there is no tier here")

    def forget(self, address: int, header: BlockHeader) -> None:
        return None

    def sync(self) -> None:
        return None

    def remember_layout(self, tenant: str, layout_id: bytes, spec: dict[str, object]) -> None:
        return None

    def recovered_layouts(self) -> Iterable[tuple[str, dict[str, object]]]:
        return ()

    def recovered_extents(self) -> Iterable[tuple[int, int]]:
        return ()

    def recovered_blocks(self) -> Iterable[RecoveredBlocks]:
        return ()

    def close(self) -> None:
        return None
