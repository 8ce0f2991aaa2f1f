"""What is asked of the device that an engine's KV cache lies on.

A KV cache is one allocation, cut into blocks of a few *pieces* each. Copies move whole
blocks between it and *slots*: host memory in which the pieces of a block lie one after the
other, or, coded, what became of them. They are started on *streams* and run behind the
caller's back.

Order. A copy begins after the events that its stream was told to wait for before the copy
was started. Nothing else orders anything: neither two streams, nor two copies of one
stream, nor a copy and the engine's computing.

Ownership. From the start of a copy until `Copies.finish` has returned or raised, its blocks
and slots are the device's: nobody writes what it reads, nor reads what it writes, nor hands
it to somebody else. So whoever starts copies finishes them, whatever else happens; `flight`
does it.

Errors. Streams and their copies may raise `DeviceError`, and so may `Device.blocks`. After
`DeviceLost` or `DeviceStuck` every copy of the stream does. What a failed copy had to write is
undefined.

Threads. A stream, with its copies, is used by one thread at a time; devices by any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvstore.device.vram import Vram
from kvstore.types import coded_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Block b's bytes are `nbytes` at `offset + b * stride` of the KV allocation."""

    offset: int
    stride: int
    nbytes: int


class Memory(NamedTuple):
    """A KV cache's allocation. `address` is what the device's own pointers are; `owner`
    keeps the memory alive as long as it is held."""

    address: int
    nbytes: int
    owner: object


class Coding(NamedTuple):
    """What blocks are in slots (`codec`): coded elements of `dtype`."""

    codec: str
    dtype: str

    def nbytes(self, raw_bytes: int) -> int:
        """Of a block in a slot."""
        return coded_bytes(self.codec, self.dtype, raw_bytes)


class Blocks(Protocol):
    """A KV cache as blocks. Keeps the memory alive. Belongs to the device that made it."""

    @property
    def block_bytes(self) -> int:
        """Of a block in a slot."""
        ...

    @property
    def within(self) -> bool:
        """Whether `Stream.load_within` and `save_within` can copy them."""
        ...


class Event(Protocol):
    """A point in what an engine has launched."""


class Copies(Protocol):
    """Copies that were started together."""

    def finish(self) -> list[int]:
        """Wait for all of them; the XXH3-64 of each slot, taken after its copy (of what
        `Stream.load_within` and `save_within` copied, nothing).

        Once this has returned or raised, none of them is under way nor ever will be, unless it
        raised `DeviceStuck`; the same is true of what starts them. To be called once.
        """
        ...


class Stream(Protocol):
    def wait_event(self, event: Event) -> None:
        """Have what is started from now on begin after `event`. Does not block."""
        ...

    def load(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        """Start copying each slot into the block of its index, overwriting it."""
        ...

    def save(self, blocks: Blocks, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Copies:
        """Start copying each block out into the slot of its index."""
        ...

    def load_within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> Copies:
        """As `load`, from memory of the device's own (`Vram.open`), where the pieces of a
        block lie as in a slot. Somebody else may write what it reads. Only of blocks that can be
        copied so (`Blocks.within`)."""
        ...

    def save_within(
        self, blocks: Blocks, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> Copies:
        """As `save`, into memory of the device's own or of another that it reaches
        (`Vram.open_to_write`), where the pieces of a block come to lie as in a slot."""
        ...

    def close(self) -> None:
        """Give back what the stream holds. Its copies have been finished. Idempotent."""
        ...


class Device(Protocol):
    @property
    def vram(self) -> Vram | None:
        """Its memory that is shared among processes; None where it shares none."""
        ...

    def blocks(
        self,
        memory: Memory,
        pieces: Sequence[Piece],
        num_blocks: int,
        coding: Coding | None = None,
    ) -> Blocks:
        """All pieces of all blocks must lie within `memory`. With `coding`, of which a block's
        bytes must be whole groups, blocks are coded on their way to slots, and brought back on
        their way from them: wherever it is done, to the very same bytes."""
        ...

    def stream(self) -> Stream: ...

    def computed(self) -> Event:
        """The end of what the engine has launched so far. To be called on the engine's
        thread; neither blocks nor raises: `Stream.wait_event` raises what went wrong."""
        ...

    def close(self) -> None:
        """After its streams: while one is open it changes nothing. Idempotent."""
        ...
