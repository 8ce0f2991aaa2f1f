"""Steps: what one stream copies at a time, from its start to its end.

Four ways lead between blocks and slots:

    pieces are large, slots are pinned    the link's copies take piece by piece
    pieces are small                      a kernel gathers them into (spreads them from)
                                          staging memory on the GPU; one copy a block
    blocks are coded                      as with small pieces, by a kernel that codes them
                                          (brings them back); where there is none, as below,
                                          and the processor does it
    slots are not pinned (yet)            the link's copies end (begin) in pinned staging
                                          memory; the processor copies from (to) the slots

and the last goes together with the others. Other memory of GPUs is copied from, or to,
without the host: large pieces by the copy engines, small ones and coded blocks by kernels.

Each hand-over has its event: from one of a stream's two to the other, and from the stream to
the processor, which alone says that staging memory, table, block or slot may be used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.device import codec
from kvstore.device.base import Coding, Memory, Piece
from kvstore.device.coding_kernels import DECODE_KERNEL, ENCODE_KERNEL, GROUPS_BYTES, kind_of
from kvstore.device.gpu_driver import Addresses
from kvstore.device.gpu_staging import Staging, address_of, memory_at
from kvstore.device.kernels import RUN_BYTES
from kvstore.errors import DeviceFull
from kvstore.local import copy
from kvstore.types import CODECS, GROUP, align_up, element_bytes

if TYPE_CHECKING:
    from kvstore.device.gpu_stream import GpuStream


STAGED_ALIGNMENT = 16
"""Of a block in the GPU's staging memory: kernels move as many bytes at a time."""


class GpuBlocks:
    def __init__(
        self, memory: Memory, pieces: Sequence[Piece], coding: Coding | None = None
    ) -> None:
        self._owner = memory.owner
        self._starts = np.array([memory.address + each.offset for each in pieces], np.uint64)
        self._strides = np.array([each.stride for each in pieces], np.uint64)
        self.sizes = np.array([each.nbytes for each in pieces], np.uint64)
        self.raw_bytes = int(self.sizes.sum())
        self.block_bytes = self.raw_bytes if coding is None else coding.nbytes(self.raw_bytes)
        self.offsets = (np.cumsum(self.sizes) - self.sizes).astype(np.uint64)
        """Of each piece in a block that is not coded."""
        self.coding = coding
        self.by_kernel = False
        """Whether the GPU codes them."""

    @property
    def within(self) -> bool:
        """The processor, which codes where no kernel does, does not reach the GPU's memory."""
        return self.coding is None or self.by_kernel

    def addresses(self, block_ids: Sequence[int]) -> Addresses:
        """[block, piece]"""
        ids = np.array(block_ids, np.uint64)
        return self._starts + ids[:, None] * self._strides

    @property
    def in_whole_groups(self) -> bool:
        """Whether each piece can be coded on its own."""
        assert self.coding is not None
        return not bool((self.sizes % np.uint64(GROUP * element_bytes(self.coding.dtype))).any())

    def coded_parts(self) -> tuple[Addresses, Addresses, Addresses]:
        """(offset of the scales, of the codes, number of groups) of each piece in a slot."""
        assert self.coding is not None
        name, dtype = self.coding
        unit = np.uint64(element_bytes(dtype) * GROUP)
        firsts, groups = self.offsets // unit, self.sizes // unit
        codes_bytes = GROUP * CODECS[name] // 8
        scales_bytes = self.block_bytes // int(groups.sum()) - codes_bytes
        first_code = np.uint64(int(groups.sum()) * scales_bytes)
        return (
            firsts * np.uint64(scales_bytes), first_code + firsts * np.uint64(codes_bytes), groups
        )  # fmt: skip


class Step:
    """Some blocks, be their copies started half or not at all. `finish` may be repeated."""

    slots: Sequence[memoryview] = ()
    """Those of which checksums are taken at the end."""

    def __init__(
        self, stream: GpuStream, blocks: GpuBlocks, block_ids: Sequence[int], *, save: bool
    ) -> None:
        self._stream = stream
        self._driver = stream.driver
        self._blocks = blocks
        self._block_ids = block_ids
        self._save = save
        small = int(blocks.sizes.min()) < stream.device.tuning.kernel_below
        gathers = stream.device.stages and stream.driver.has_kernel and small
        self._by_kernel = gathers if blocks.coding is None else blocks.by_kernel
        """Whether pieces go through a kernel."""
        self._staging: Staging | None = None
        self._done: Any = None

    @property
    def direct(self) -> bool:
        """Whether it needs no staging."""
        return not self._by_kernel

    def start(self) -> None:
        if not self.direct:
            self._staging = self._stream.take_staging(self)
        self._done = self._driver.record(self._launch())

    def finish(self) -> None:
        """Wait for it."""
        if self._done is not None:
            self._driver.synchronize(self._done)
            self._done = None
            self._arrived()
        self._give_staging_back()

    def forget(self) -> None:
        """Nothing of it is under way."""
        self._done = None
        self._give_staging_back()

    def _launch(self) -> Any:
        """Put all of it into the stream's two; the one in which it ends."""
        raise NotImplementedError

    def _arrived(self) -> None:
        """The GPU has done its part."""

    def _give_staging_back(self) -> None:
        staging, self._staging = self._staging, None
        if staging is not None:
            self._stream.give_back(self, staging)

    def _run_kernel(self, pieces: Addresses, blocks: Addresses) -> None:
        """Between pieces and memory of a GPU where blocks lie as in slots."""
        if self._blocks.coding is None:
            parts = blocks[:, None] + self._blocks.offsets
            to, from_ = (parts, pieces) if self._save else (pieces, parts)
            address = self._table(RUN_BYTES, to, from_, self._blocks.sizes)
            self._driver.run_kernel(address, pieces.size, self._stream.gathering)
            return
        scales, codes, groups = self._blocks.coded_parts()
        starts = blocks[:, None]
        address = self._table(GROUPS_BYTES, pieces, starts + scales, starts + codes, groups)
        kernel = ENCODE_KERNEL if self._save else DECODE_KERNEL
        kind, stream = kind_of(*self._blocks.coding), self._stream.gathering
        self._driver.run_coding(kernel, kind, address, pieces.size, stream)

    def _table(self, row_bytes: int, first: Addresses, *columns: Addresses) -> int:
        """Where the GPU reads these, a row for each piece of each block."""
        assert self._staging is not None
        address = self._staging.table(first.size * row_bytes)
        memory = memory_at(address, first.size * row_bytes)
        table = np.frombuffer(memory, np.uint64).reshape(first.size, -1)
        for number, column in enumerate((first, *columns)):
            table[:, number] = np.broadcast_to(column, first.shape).ravel()
        return address

    def _copy(self, on_gpu: Addresses, slots: Addresses, sizes: Addresses) -> None:
        """By the copy engines."""
        to, from_ = (slots, on_gpu) if self._save else (on_gpu, slots)
        self._driver.copy(_flat(to), _flat(from_), _flat(sizes), self._stream.link)


class StepWithin(Step):
    """Blocks from other memory of the GPU, or to it, or to another's: neither the link nor the
    host has a part in it."""

    def __init__(
        self,
        stream: GpuStream,
        blocks: GpuBlocks,
        block_ids: Sequence[int],
        addresses: Sequence[int],
        *,
        save: bool,
    ) -> None:
        super().__init__(stream, blocks, block_ids, save=save)
        self._addresses = addresses

    def _launch(self) -> Any:
        blocks = self._blocks
        pieces = blocks.addresses(self._block_ids)
        starts = np.array(self._addresses, np.uint64)
        if self._by_kernel:
            self._run_kernel(pieces, starts)
            return self._stream.gathering
        ends = starts[:, None] + blocks.offsets
        self._copy(pieces, ends, np.broadcast_to(blocks.sizes, pieces.shape))
        return self._stream.link


class StepOverLink(Step):
    """Blocks to or from slots of the host."""

    def __init__(
        self,
        stream: GpuStream,
        blocks: GpuBlocks,
        block_ids: Sequence[int],
        slots: Sequence[memoryview],
        *,
        save: bool,
    ) -> None:
        super().__init__(stream, blocks, block_ids, save=save)
        self.slots = slots
        whole = blocks.coding is None and len(blocks.sizes) == 1
        self._by_kernel &= stream.device.stages and not whole
        self._staged = [not stream.device.pins.covers(slot) for slot in slots]
        """Slots whose bytes go through staging memory of the host."""
        self._staged_bytes = blocks.block_bytes
        self._coding: Coding | None = None
        """What the processor has to do."""
        self._on_host = 0

    @property
    def direct(self) -> bool:
        coded = self._blocks.coding is not None
        return not self._by_kernel and not coded and not any(self._staged)

    def _launch(self) -> Any:
        blocks = self._blocks
        pieces = blocks.addresses(self._block_ids)
        on_gpu = self._memory_on_gpu()
        if on_gpu is None and blocks.coding is not None:
            self._coding = blocks.coding
            self._staged = [True] * len(self.slots)
            self._staged_bytes = blocks.raw_bytes
        host = self._host_addresses()
        if on_gpu is None:
            ends = host[:, None] + blocks.offsets
            self._copy(pieces, ends, np.broadcast_to(blocks.sizes, pieces.shape))
            return self._stream.link
        sizes = np.full(len(host), blocks.block_bytes, np.uint64)
        link, gathering = self._stream.link, self._stream.gathering
        if self._save:
            self._run_kernel(pieces, on_gpu)
            self._driver.wait(link, self._driver.record(gathering))
            self._copy(on_gpu, host, sizes)
            return link
        self._copy(on_gpu, host, sizes)
        self._driver.wait(gathering, self._driver.record(link))
        self._run_kernel(pieces, on_gpu)
        return gathering

    def _arrived(self) -> None:
        if self._save:
            self._through_staging()

    def _memory_on_gpu(self) -> Addresses | None:
        """Where a kernel brings each block, or finds it; None where there is no such memory."""
        if not self._by_kernel:
            return None
        assert self._staging is not None
        each = align_up(self._blocks.block_bytes, STAGED_ALIGNMENT)
        try:
            start = self._staging.on_gpu(len(self.slots) * each)
        except DeviceFull:
            # The engine's memory comes first. Copies take longer without.
            self._stream.device.stages = False
            return None
        return start + each * np.arange(len(self.slots), dtype=np.uint64)

    def _host_addresses(self) -> Addresses:
        """Where the link's copies end, or begin: slots, or staging memory."""
        addresses = np.array([address_of(slot) for slot in self.slots], np.uint64)
        if any(self._staged):
            assert self._staging is not None
            nbytes = self._staged_bytes
            self._on_host = self._staging.on_host(len(self.slots) * nbytes)
            staged = self._on_host + nbytes * np.arange(len(self.slots), dtype=np.uint64)
            addresses = np.where(self._staged, staged, addresses)
            if not self._save:
                self._through_staging()
        return addresses

    def _through_staging(self) -> None:
        """The processor's part: copies, or what no kernel does."""
        nbytes, coding = self._staged_bytes, self._coding
        indexes = [index for index, staged in enumerate(self._staged) if staged]

        def work(start: int, stop: int) -> None:
            for index in indexes[start:stop]:
                slot, staged = self.slots[index], memory_at(self._on_host + index * nbytes, nbytes)
                if coding is None:
                    copy.copy_bytes(*((slot, staged) if self._save else (staged, slot)))
                elif self._save:
                    codec.encode(*coding, staged, slot)
                else:
                    codec.decode(*coding, slot, staged)

        if indexes:
            copy.share(work, len(indexes), nbytes)


def _flat(addresses: Addresses) -> Addresses:
    return np.ascontiguousarray(addresses, np.uint64).ravel()
