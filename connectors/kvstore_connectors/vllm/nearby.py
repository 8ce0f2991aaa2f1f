"""Blocks that the store has in the memory of this rank's own GPU.

They are copied from there, which takes next to nothing and leaves the link to the host alone. It
is never more than a short cut: whatever goes wrong, and whatever the store takes back meanwhile,
is copied from host memory, which the same lease names (`kvstore.device.mirrors`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvstore.device.flight import CHUNK_BYTES, Flight
from kvstore.device.mirrors import Mirrors
from kvstore.errors import BadRequest, DeviceError, KVStoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.device.base import Blocks, Device, Stream
    from kvstore_connectors.vllm.link import Attached

logger = init_logger("vllm.kvstore")

LOOK_S = 0.1
"""How soon memory that the store gives back is let go of here."""


class Nearby:
    """Used by one thread."""

    def __init__(self, device: Device) -> None:
        self._vram = device.vram
        self._attached: Attached | None = None
        self._session = -1
        self._mirrors: Mirrors | None = None

    @property
    def open(self) -> bool:
        """Whether `look` is wanted every `LOOK_S`."""
        return self._mirrors is not None

    def look(self) -> None:
        """Let go of what the store has given back. Cheap."""
        if self._mirrors is not None:
            if self._attached is None or self._attached.dropped:
                self.close()
            else:
                self._mirrors.look()

    def fill(
        self,
        stream: Stream,
        attached: Attached,
        target: Blocks,
        block_ids: Sequence[int],
        addresses: Sequence[int],
    ) -> set[int]:
        """Load what is there of blocks that are leased at these addresses of host memory: the
        indexes of those whose bytes are right now. Others may have been written over."""
        if self._vram is None:
            return set()
        step = max(1, CHUNK_BYTES // target.block_bytes)
        try:
            mirrors = self._of(attached)
            found = None if mirrors is None else mirrors.find(addresses)
            if mirrors is None or found is None:
                return set()
            with Flight() as flight:
                for start in range(0, len(found.indexes), step):
                    part = slice(start, start + step)
                    ids = [block_ids[index] for index in found.indexes[part]]
                    copies = stream.load_within(target, ids, found.addresses[part])
                    flight.add(copies, lambda _: None)
            kept = mirrors.kept(found)
        except DeviceError as error:
            # Were the GPU lost for good, the copies from host memory would say so too.
            logger.warning("The store's memory on the GPU is left alone: %s", error)
            self.close()
            return set()
        return {index for index, same in zip(found.indexes, kept, strict=True) if same}

    def close(self) -> None:
        """Until there is another connection. Idempotent."""
        mirrors, self._mirrors = self._mirrors, None
        if mirrors is not None:
            mirrors.close()

    def _of(self, attached: Attached) -> Mirrors | None:
        """What the store has here, None if nothing."""
        session = attached.client.counters.connects
        if attached is self._attached and session == self._session:
            return self._mirrors
        self.close()
        self._attached, self._session = attached, session
        assert self._vram is not None
        layout_ids = [layout.id for layout in attached.layouts]
        try:
            grant = attached.client.vram(self._vram.name, layout_ids)
            self._mirrors = Mirrors(
                grant.descriptor, grant.extent_bytes, grant.fetch, self._vram.open
            )
        except BadRequest as error:
            logger.debug("The KV store has no memory on this GPU: %s", error)
        except KVStoreError as error:
            logger.warning("The KV store's memory on this GPU is not used: %s", error)
        return self._mirrors
