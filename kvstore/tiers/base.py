"""What the store asks of a tier.

DRAM is the middle: clients read and write it directly, and every other tier
moves whole blocks to and from it. So there are two contracts, one for the tier
that has addresses in memory and one for the tiers behind it.

*Where* a block goes is decided elsewhere (`core.space`): a tier is told the
address. An address is `extent * extent_bytes + offset`; extents are opened
before the first address in them is used and closed after the last. All slots of
one extent have the same size.

All methods may block (they are called from worker threads) unless they say
otherwise, and may be called from several threads at once for different slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvstore.device.vram import StraightFile

Fill = Callable[[StraightFile, int, int], int]
"""Read so many bytes at an offset of a file into a GPU's memory, as `device.vram.Straight.fill`."""


class BlockHeader(NamedTuple):
    """What a stored block says about itself, checked on every read.

    `stored_key`: 16 bytes, the tenant's keyed hash of layout and key.
    `parent`: the stored key of the block before it in the chain, b"" for the first.
    `length`: bytes of payload. `checksum`: XXH3-64 of the payload.
    """

    stored_key: bytes
    parent: bytes
    layout_id: bytes
    tenant: str
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class RecoveredBlocks:
    """Blocks found in a tier at start that are of one tenant, layout and length: columns,
    a row a block. There may be millions of blocks, so few things are made for each."""

    tenant: str
    layout_id: bytes
    length: int
    stored_keys: Sequence[bytes]
    parents: Sequence[bytes]
    checksums: Sequence[int]
    addresses: Sequence[int]

    def __len__(self) -> int:
        return len(self.stored_keys)

    def header(self, row: int) -> BlockHeader:
        return BlockHeader(
            self.stored_keys[row], self.parents[row], self.layout_id, self.tenant, self.length,
            self.checksums[row],
        )  # fmt: skip


class MemoryTier(Protocol):
    """DRAM: memory that local clients map."""

    extent_bytes: int

    @property
    def usable_bytes(self) -> int:
        """The most that open extents may add up to: whole extents. Does not block."""
        ...

    def open_extent(self, extent: int) -> None:
        """Make memory for an extent. Contents are undefined. Raises `TierFull`
        when the machine refuses the memory."""
        ...

    def close_extent(self, extent: int) -> None:
        """Give the memory back to the machine, even while clients still map it."""
        ...

    def view(self, address: int, nbytes: int) -> memoryview:
        """Writable view of a slot; valid until its extent is closed. Does not block."""
        ...

    def extent_fd(self, extent: int) -> int:
        """Descriptor to hand to a client, owned by the tier. Does not block."""
        ...

    def close(self) -> None: ...


class StorageTier(Protocol):
    """A tier behind DRAM, holding whole blocks across restarts."""

    extent_bytes: int

    @property
    def usable_bytes(self) -> int:
        """The most that open extents may add up to: whole extents, what the tier
        needs for itself taken off. Does not block."""
        ...

    def wear(self) -> Mapping[str, int]:
        """Bytes written since the start, by purpose, of which "store" is what was asked for;
        empty where nothing wears out. Does not block."""
        ...

    def overdue(self) -> bool:
        """Something that was asked of the drive has not come back for longer than anything
        takes. Does not block."""
        ...

    def ask_before_moving(self, not_worth_moving: Callable[[list[int]], Iterable[int]]) -> None:
        """Where blocks have to be written again to win room, ask first: of these addresses,
        which their owner has forgotten instead. It is asked by threads of the tier's
        callers, and may block for a while."""
        ...

    def slot_bytes(self, block_bytes: int) -> int:
        """Bytes a block occupies here, header and padding included. Does not block."""
        ...

    def open_extent(self, extent: int, slot_bytes: int) -> None:
        """Make room for an extent. Raises `TierFull`, `TierFailed`."""
        ...

    def close_extent(self, extent: int) -> None:
        """Give an extent's room back. No block in it is read again."""
        ...

    def write(self, address: int, header: BlockHeader, payload: memoryview) -> None:
        """Store a block: the first `header.length` bytes of `payload`, which starts
        at an aligned address. What follows them is not stored. When this returns,
        `read` finds the block; it is durable after the next `sync`. Raises
        `TierFull`, `TierFailed`."""
        ...

    def read(self, address: int, header: BlockHeader, into: memoryview) -> None:
        """Read the block stored with `header` into the first `header.length` bytes
        of `into`, which starts at an aligned address. What follows them is left
        alone. Raises `CorruptBlock` when what is there is not that very block,
        bytes included; `into` is undefined then. Raises `TierFailed`."""
        ...

    def read_straight(self, address: int, header: BlockHeader, fill: Fill) -> None:
        """Have `fill` read the payload of the block stored with `header`, and compare what it
        answers with the checksum. Raises as `read`; `DeviceError` where the block was not read
        straight, or not rightly: then it is there as before, for `read`. `fill` may be called
        more than once; only what it did last counts, and only when this returns."""
        ...

    def forget(self, address: int, header: BlockHeader) -> None:
        """The block is no longer wanted; its slot may be given to another once
        this returns. Never raises, for a block that is not there or otherwise."""
        ...

    def sync(self) -> None:
        """Make everything written and forgotten so far durable. Raises `TierFailed`."""
        ...

    def remember_layout(self, tenant: str, layout_id: bytes, spec: dict[str, object]) -> None:
        """Keep a layout for `recovered_layouts`. Durable after the next `sync`."""
        ...

    def recovered_layouts(self) -> Iterable[tuple[str, dict[str, object]]]:
        """(tenant, fields of the LayoutSpec) of each layout remembered."""
        ...

    def recovered_extents(self) -> Iterable[tuple[int, int]]:
        """(extent, slot_bytes) of each extent open at start."""
        ...

    def recovered_blocks(self) -> Iterable[RecoveredBlocks]:
        """Every block held at start, those written last first, as far as that is known.
        A crash may leave one at two addresses."""
        ...

    def close(self) -> None:
        """Sync and release everything. The tier is not used afterwards."""
        ...
