"""Twins of the real tiers in ordinary memory: for tests, and to show the contract.

`HeapMemory` is the `MemoryTier` that no client can map, `HeapStorage` the
`StorageTier` that does not survive the process. A storage twin handed to a
second store is its own restart: it recovers what it holds.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Mapping

import xxhash

from kvstore.errors import BadRequest, CorruptBlock, DeviceError, InternalError, TierFull
from kvstore.tiers.base import BlockHeader, Fill, RecoveredBlocks
from kvstore.types import align_up


class HeapMemory:
    """A `MemoryTier` of private mappings."""

    def __init__(self, extent_bytes: int, capacity_bytes: int) -> None:
        self.extent_bytes = extent_bytes
        self._max_extents = capacity_bytes // extent_bytes
        self._open: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    @property
    def usable_bytes(self) -> int:
        return self._max_extents * self.extent_bytes

    def open_extent(self, extent: int) -> None:
        with self._lock:
            if extent in self._open:
                raise InternalError(f"extent {extent} is open already")
            if len(self._open) >= self._max_extents:
                raise TierFull(f"all {self._max_extents} extents of memory are open")
            self._open[extent] = memoryview(mmap.mmap(-1, self.extent_bytes))

    def close_extent(self, extent: int) -> None:
        # The mapping goes with its last view.
        if self._open.pop(extent, None) is None:
            raise InternalError(f"extent {extent} is not open")

    def view(self, address: int, nbytes: int) -> memoryview:
        extent, offset = divmod(address, self.extent_bytes)
        if offset + nbytes > self.extent_bytes:
            raise InternalError("a slot does not cross extents")
        held = self._open.get(extent)
        if held is None:
            raise InternalError(f"extent {extent} is not open")
        return held[offset : offset + nbytes]

    def extent_fd(self, extent: int) -> int:
        raise BadRequest("this memory cannot be shared")

    def close(self) -> None:
        self._open.clear()


class HeapStorage:
    """A `StorageTier` of blocks in a dict, one entry an address."""

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        self.extent_bytes = extent_bytes
        self._max_extents = capacity_bytes // extent_bytes
        self._extents: dict[int, int] = {}
        self._blocks: dict[int, tuple[BlockHeader, bytearray]] = {}
        self._layouts: dict[tuple[str, bytes], dict[str, object]] = {}
        self._lock = threading.Lock()

    @property
    def usable_bytes(self) -> int:
        return self._max_extents * self.extent_bytes

    def wear(self) -> Mapping[str, int]:
        return {}

    def overdue(self) -> bool:
        return False

    def ask_before_moving(self, not_worth_moving: Callable[[list[int]], Iterable[int]]) -> None:
        return None

    def slot_bytes(self, block_bytes: int) -> int:
        return align_up(block_bytes)

    def open_extent(self, extent: int, slot_bytes: int) -> None:
        with self._lock:
            if extent in self._extents:
                raise InternalError(f"extent {extent} is open already")
            if len(self._extents) >= self._max_extents:
                raise TierFull(f"all {self._max_extents} extents are open")
            self._extents[extent] = slot_bytes

    def close_extent(self, extent: int) -> None:
        with self._lock:
            if self._extents.pop(extent, None) is None:
                raise InternalError(f"extent {extent} is not open")
            for address in [a for a in self._blocks if a // self.extent_bytes == extent]:
                del self._blocks[address]

    def write(self, address: int, header: BlockHeader, payload: memoryview) -> None:
        with self._lock:
            if address // self.extent_bytes not in self._extents:
                raise InternalError("the extent of this address is not open")
            self._blocks[address] = (header, bytearray(payload[: header.length]))

    def read(self, address: int, header: BlockHeader, into: memoryview) -> None:
        into[: header.length] = self._stored(address, header)

    def read_straight(self, address: int, header: BlockHeader, fill: Fill) -> None:
        if fill(_Stored(self._stored(address, header)), 0, header.length) != header.checksum:
            raise DeviceError("what was read straight is not what is stored")

    def _stored(self, address: int, header: BlockHeader) -> bytearray:
        with self._lock:
            stored = self._blocks.get(address)
        if stored is None or stored[0] != header:
            raise CorruptBlock("another block is stored there")
        if xxhash.xxh3_64_intdigest(stored[1]) != header.checksum:
            raise CorruptBlock("the payload is not what was written")
        return stored[1]

    def forget(self, address: int, header: BlockHeader) -> None:
        with self._lock:
            stored = self._blocks.get(address)
            if stored is not None and stored[0] == header:
                del self._blocks[address]

    def sync(self) -> None:
        return None

    def remember_layout(self, tenant: str, layout_id: bytes, spec: dict[str, object]) -> None:
        with self._lock:
            self._layouts[tenant, layout_id] = dict(spec)

    def recovered_layouts(self) -> Iterable[tuple[str, dict[str, object]]]:
        with self._lock:
            return [(tenant, dict(spec)) for (tenant, _), spec in self._layouts.items()]

    def recovered_extents(self) -> Iterable[tuple[int, int]]:
        with self._lock:
            return list(self._extents.items())

    def recovered_blocks(self) -> Iterable[RecoveredBlocks]:
        with self._lock:
            found = [(header, address) for address, (header, _) in self._blocks.items()]
        return [
            RecoveredBlocks(
                header.tenant, header.layout_id, header.length, [header.stored_key],
                [header.parent], [header.checksum], [address],
            )
            for header, address in reversed(found)
        ]  # fmt: skip

    def close(self) -> None:
        return None


class _Stored:
    """A `StraightFile` of one block, padded with zeros as on a drive. Only a stand-in for a GPU
    reads it."""

    descriptor = None

    def __init__(self, payload: bytearray) -> None:
        self._pages = bytes(payload).ljust(align_up(len(payload)), b"\0")

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        start = offset
        for buffer in buffers:
            part = self._pages[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            offset += len(part)
        return offset - start

    def before_close(self, call: Callable[[], None]) -> None:
        return None
