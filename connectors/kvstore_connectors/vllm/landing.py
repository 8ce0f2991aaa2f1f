"""Blocks of prompts that are handed over, written into the memory of the GPU that will decode.

While a prompt's blocks are copied to the host, they are also copied, from GPU memory to GPU
memory, to where the store has granted a place for each: on every GPU where another process reads
such blocks, this one or one that it reaches (NVLink, or PCIe peer to peer). The commit that
publishes a block names the places that are written. Who decodes then finds the block there, as it
finds others (`nearby`).

It is never more than a short cut. What is not granted, not reached or not copied well is loaded
from host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vllm.logger import init_logger

from kvstore.device.flight import CHUNK_BYTES
from kvstore.errors import BadRequest, DeviceError, DeviceLost, DeviceStuck
from kvstore_connectors.vllm.shared import Shared

if TYPE_CHECKING:
    from kvstore.client.lease import Layout
    from kvstore.device.base import Blocks, Copies, Device, Stream
    from kvstore.types import Landing
    from kvstore_connectors.vllm.link import Attached

logger = init_logger("vllm.kvstore")


class Places(NamedTuple):
    """Places on one GPU: the store's `addresses` of them, the device's, and the block of the KV
    cache that is to be written into each."""

    gpu: str
    addresses: list[int]
    here: list[int]
    block_ids: list[int]


class LandingZone:
    """What one thread that stores knows of it."""

    def __init__(self, device: Device) -> None:
        self._vram = device.vram
        self._gpus: dict[str, Shared] = {}
        # GPUs that are not written any more, on this connection.
        self._not_on: set[str] = set()
        self._attached: Attached | None = None

    @property
    def possible(self) -> bool:
        """Whether there is a GPU to copy from."""
        return self._vram is not None

    @property
    def open(self) -> bool:
        """Whether `look` is wanted every `LOOK_S`."""
        return any(shared.open for shared in self._gpus.values())

    def look(self) -> None:
        """Let go of what the store has taken back. Cheap."""
        for shared in self._gpus.values():
            shared.look()

    def ask(
        self, attached: Attached, layout: Layout, slots: Sequence[int], block_ids: Sequence[int]
    ) -> list[Places]:
        """Where else than into these slots the blocks, which can be copied within the GPU, are to
        be written. Raises what calls of the client do."""
        if self._vram is None or not slots:
            return []
        if attached is not self._attached:
            self._attached = attached
            self._not_on.clear()
        try:
            landings = attached.client.land(layout, slots, not_on=sorted(self._not_on))
        except BadRequest as error:
            logger.debug("The KV store lets nothing land: %s", error)
            return []
        granted = [self._places(attached, each, block_ids) for each in landings]
        return [places for places in granted if places.addresses]

    def _places(self, attached: Attached, landing: Landing, block_ids: Sequence[int]) -> Places:
        """Those of a GPU that can be written from here."""
        assert self._vram is not None
        gpu, there = landing.gpu, Places(landing.gpu, [], [], [])
        shared = self._gpus.get(gpu)
        if shared is None:
            shared = self._gpus[gpu] = Shared(gpu, partial(self._vram.open_to_write, gpu=gpu))
        try:
            mirrors = shared.of(attached)
            granted = [at for at, address in enumerate(landing.addresses) if address]
            addresses = [landing.addresses[at] for at in granted]
            found = [] if mirrors is None else mirrors.places(addresses)
        except DeviceError as error:
            self._leave(gpu, f"{error}")
            return there
        if mirrors is None or mirrors.refused:
            self._leave(gpu, "it is not reached")
            return there
        for at, address, here in zip(granted, addresses, found, strict=True):
            if here is not None:
                there.addresses.append(address)
                there.here.append(here)
                there.block_ids.append(block_ids[at])
        return there

    @contextlib.contextmanager
    def writing(
        self, stream: Stream, blocks: Blocks, places: Sequence[Places]
    ) -> Iterator[dict[str, list[int]]]:
        """Copies the blocks while the `with` lasts, and is over with it; what is given holds
        after that the addresses that have been written, by GPU. Raises `DeviceStuck` where a copy
        may be under way still: the store is to be told nothing of these places then."""
        written: dict[str, list[int]] = {}
        under_way: list[tuple[Places, Copies]] = []
        failed: list[tuple[str, DeviceError]] = []
        for part in _parts(places, max(1, CHUNK_BYTES // blocks.block_bytes)):
            try:
                copies = stream.save_within(blocks, part.block_ids, part.here)
                under_way.append((part, copies))
            except DeviceError as error:
                failed.append((part.gpu, error))
        try:
            yield written
        finally:
            for part, copies in under_way:
                try:
                    copies.finish()
                    written.setdefault(part.gpu, []).extend(part.addresses)
                except DeviceError as error:
                    failed.append((part.gpu, error))
            self._failed(failed)

    def _failed(self, failed: Sequence[tuple[str, DeviceError]]) -> None:
        for _, error in failed:
            if isinstance(error, DeviceLost | DeviceStuck):
                # What is mapped stays so: somebody may be writing there.
                self._gpus.clear()
                raise DeviceStuck(str(error)) from error
        for gpu, error in failed:
            self._leave(gpu, f"{error}")

    def _leave(self, gpu: str, why: str) -> None:
        """Nothing more is written there, on this connection."""
        if gpu not in self._not_on:
            logger.warning("Prompts are handed over through host memory, not %s: %s", gpu, why)
            self._not_on.add(gpu)
        self._gpus[gpu].close()

    def close(self) -> None:
        """Idempotent."""
        for shared in self._gpus.values():
            shared.close()


def _parts(places: Sequence[Places], size: int) -> Iterator[Places]:
    """So many places at a time, for what a stream keeps of copies under way is bounded."""
    for each in places:
        for start in range(0, len(each.addresses), size):
            part = slice(start, start + size)
            yield Places(each.gpu, each.addresses[part], each.here[part], each.block_ids[part])
