"""A KV cache on a GPU: copies by its copy engines, beside the engine's computing.

`gpu_stream` has what a stream is here, `gpu_steps` the ways that copies take, `gpu_staging` the
memory they pass through. All of it is made of the calls of `gpu_driver`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.device.base import Blocks, Coding, Event, Memory, Piece, Stream
from kvstore.device.gpu_driver import Driver
from kvstore.device.gpu_steps import GpuBlocks
from kvstore.device.gpu_stream import GpuStream, Recorded
from kvstore.device.pins import Pins
from kvstore.device.vram import Vram
from kvstore.errors import DeviceError
from kvstore.local import copy

logger = logging.getLogger("kvstore.device")


@dataclass(frozen=True, slots=True)
class Tuning:
    """`kernel_below`: pieces smaller than this many bytes are gathered; batches of copies
    fall from 40-51 to 5-7 GB/s on an H100 below 28 KiB each. `step_bytes`: at least a
    block. `steps_ahead`: of a stream, in staging memory."""

    kernel_below: int = 64 << 10
    step_bytes: int = 16 << 20
    steps_ahead: int = 2


class GpuDevice:
    """One GPU, whose KV cache one engine owns. Takes the driver over."""

    def __init__(
        self,
        driver: Driver,
        tuning: Tuning | None = None,
        *,
        vram: Vram | None = None,
        pin_in_background: bool = True,
    ) -> None:
        self.driver = driver
        self.vram = vram
        self.tuning = tuning or Tuning()
        self.pins = Pins(driver, in_background=pin_in_background)
        self.checksums: Callable[[Sequence[memoryview]], list[int]] = copy.checksum_many
        """Of slots; by the processor, whatever the copies take."""
        self.open_streams: set[Stream] = set()
        self.stages = True
        """Until the GPU has no memory to spare for it."""

    def blocks(
        self,
        memory: Memory,
        pieces: Sequence[Piece],
        num_blocks: int,
        coding: Coding | None = None,
    ) -> Blocks:
        blocks = GpuBlocks(memory, pieces, coding)
        if coding is not None:
            blocks.by_kernel = blocks.in_whole_groups and self.driver.can_code()
            if not blocks.by_kernel:
                logger.warning("Blocks are coded by the processor, which takes much longer.")
        return blocks

    def stream(self) -> Stream:
        stream = GpuStream(self)
        self.open_streams.add(stream)
        return stream

    def computed(self) -> Event:
        try:
            return Recorded(self.driver.record_engine())
        except DeviceError as error:
            return Recorded(None, error)

    def close(self) -> None:
        # Copies of a stream that was not closed, or is stuck, may be under way: its memory stays
        # pinned.
        if not self.open_streams:
            self.pins.close()
