"""Blocks that the store has in the memory of this rank's own GPU.

They are copied from there, which takes next to nothing and leaves the link to the host alone.
Mostly it is no more than a short cut: whatever goes wrong, and whatever the store takes back
meanwhile, is copied from host memory, which the same lease names (`kvstore.device.mirrors`).
Blocks that the store has read from a drive straight into that memory are there alone: of these
what is not had here is not had at all, and computed.

The store is told that this rank reads there, and for which engine, before it reads anything: what
another vLLM hands over is to land there (`landing`), and only what is read there may be there
alone. Where its memory cannot be opened or copied from, the store is told that too, so that it
brings blocks up into host memory again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvstore.device.flight import CHUNK_BYTES, Flight
from kvstore.errors import DeviceError, DeviceStuck
from kvstore_connectors.vllm.shared import Shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.client.lease import Layout
    from kvstore.device.base import Blocks, Stream
    from kvstore.device.vram import Vram
    from kvstore_connectors.vllm.link import Attached, StoreLink

logger = init_logger("vllm.kvstore")


class Nearby:
    """Used by one thread."""

    def __init__(self, vram: Vram | None, blocks: Sequence[Blocks], reader: bytes = b"") -> None:
        """`vram`: this rank's GPU's, None where nothing is to be read there. `blocks`: of each
        stored group. `reader`: see `reader_of`."""
        self._within = [each.within for each in blocks]
        self._shared: Shared | None = None
        if vram is not None and any(self._within):
            self._shared = Shared(vram.name, vram.open, reader)

    @property
    def possible(self) -> bool:
        """Whether `look` is wanted every `LOOK_S`."""
        return self._shared is not None

    def look(self, link: StoreLink) -> None:
        """Let go of what the store has given back, and have it know of this rank. Cheap."""
        if self._shared is None:
            return
        self._shared.look()
        current = link.current
        if current is not None and not self._shared.settled(current):
            with link.borrow() as attached:
                if attached is not None:
                    self._shared.settle(attached, self._read(attached))

    def fill(
        self,
        stream: Stream,
        attached: Attached,
        target: Blocks,
        block_ids: Sequence[int],
        addresses: Sequence[int],
        checksums: Sequence[int],
    ) -> set[int]:
        """Load what is there of blocks that are leased at these addresses, with these checksums:
        the indexes of those whose bytes are right now. Others may have been written over."""
        if self._shared is None or not target.within:
            return set()
        step = max(1, CHUNK_BYTES // target.block_bytes)
        try:
            mirrors = self._shared.of(attached, self._read(attached))
            if mirrors is None:
                return set()
            found = mirrors.find(addresses, checksums)
            if mirrors.refused:
                self._shared.disown()
            if found is None:
                return set()
            with Flight() as flight:
                for start in range(0, len(found.indexes), step):
                    part = slice(start, start + step)
                    ids = [block_ids[index] for index in found.indexes[part]]
                    copies = stream.load_within(target, ids, found.addresses[part])
                    flight.add(copies, lambda _: None)
            kept = mirrors.kept(found)
        except DeviceStuck:
            # What is mapped stays so, and nothing is loaded any more.
            raise
        except DeviceError as error:
            # Were the GPU lost for good, the copies from host memory would say so too.
            logger.warning("The store's memory on the GPU is left alone: %s", error)
            self.close()
            self._shared.disown()
            return set()
        return {index for index, same in zip(found.indexes, kept, strict=True) if same}

    def _read(self, attached: Attached) -> list[Layout]:
        """Whose blocks can be copied from there."""
        return [
            layout for layout, within in zip(attached.layouts, self._within, strict=True) if within
        ]

    def close(self) -> None:
        """Until there is another connection. Idempotent."""
        if self._shared is not None:
            self._shared.close()
