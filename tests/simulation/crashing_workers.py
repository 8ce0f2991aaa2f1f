"""Engines' workers on a machine that crashes: each a session, and what it reads on a GPU.

They read as every worker does: what the table names, in pieces, and only if it still does
afterwards. They die at any moment; their copies may be under way for a while yet.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
from collections import Counter
from collections.abc import Sequence

from kvstore.device.mirrors import Mirrors
from kvstore.errors import BadRequest, DeviceError
from kvstore.store import Session, Store
from kvstore.types import Landing, LeaseGrant
from tests.simulation.crashing_gpu import CrashingGpu


class Worker:
    """`gpu`: on which it reads blocks of these layouts, as `reader`; None: on none."""

    def __init__(
        self,
        store: Store,
        session: Session,
        layout_ids: Sequence[bytes],
        gpu: CrashingGpu | None,
        reader: bytes,
        rng: random.Random,
    ) -> None:
        self.session = session
        self.layout_ids = layout_ids
        self.gpu = gpu
        self.reader = reader
        self._store = store
        self._rng = rng
        self._mirrors: Mirrors | None = None
        self._places: dict[str, Mirrors] = {}
        if gpu is not None:
            self._mirrors = self._table(gpu, layout_ids, reader)

    @property
    def lives(self) -> bool:
        return not self.session.closed

    def _table(
        self, gpu: CrashingGpu, layout_ids: Sequence[bytes], reader: bytes = b""
    ) -> Mirrors | None:
        store, session, name = self._store, self.session, gpu.name
        try:
            handout = store.open_vram(session, name, layout_ids, reader)
        except BadRequest:
            return None

        def fetch(extent: int) -> tuple[int, int]:
            if session.closed:
                raise BadRequest("the server knows no such session")
            found = store.vram_extent(session, name, extent)
            return os.dup(found.descriptor), found.extent_bytes

        def to_read(descriptor: int, nbytes: int) -> object:
            return gpu.open(descriptor, nbytes)

        def to_write(descriptor: int, nbytes: int) -> object:
            return gpu.open_to_write(descriptor, nbytes, name)

        open_memory = to_read if layout_ids else to_write
        return Mirrors(os.dup(handout.descriptor), handout.extent_bytes, fetch, open_memory)  # type: ignore[arg-type]

    # Reading

    def find(self, grant: LeaseGrant, index: int, nbytes: int) -> bytes | None:
        """A block of a lease, or nothing where the GPU has it not."""
        if self._mirrors is None:
            return None
        try:
            found = self._mirrors.find([grant.addresses[index]], [grant.checksums[index]])
        except DeviceError:
            return None
        if found is None:
            return None
        data = ctypes.string_at(found.addresses[0], nbytes)
        return data if self._mirrors.kept(found)[0] else None

    async def copy(
        self, grant: LeaseGrant, index: int, nbytes: int, seen: Counter[str]
    ) -> bytes | None:
        """`find`, as long as a copy takes."""
        if self._mirrors is None:
            return None
        try:
            found = self._mirrors.find([grant.addresses[index]], [grant.checksums[index]])
        except DeviceError:
            return None
        if found is None:
            return None
        half, first = nbytes // 2, found.addresses[0]
        data = ctypes.string_at(first, half)
        await asyncio.sleep(self._rng.expovariate(1 / 0.05))
        data += ctypes.string_at(first + half, nbytes - half)
        if self._mirrors.kept(found)[0]:
            return data
        seen["gone_while_read"] += 1
        return None

    # Writing what lands

    def places(self, gpu: CrashingGpu, landing: Landing) -> list[int | None]:
        """Where a writer writes each block; None: nowhere."""
        table = self._places.get(gpu.name)
        if table is None:
            table = self._table(gpu, ())
            if table is None:
                return [None] * len(landing.addresses)
            self._places[gpu.name] = table
        there = [address for address in landing.addresses if address]
        try:
            found = iter(table.places(there))
        except DeviceError:
            return [None] * len(landing.addresses)
        return [next(found) if address else None for address in landing.addresses]

    def die(self) -> None:
        """What it has mapped it may use for a while."""
        if self.lives:
            self._store.close_session(self.session)

    def leave(self) -> None:
        """Nothing of it is under way any more."""
        for each in (self._mirrors, *self._places.values()):
            if each is not None:
                each.close()
