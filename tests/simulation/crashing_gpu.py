"""A GPU of a machine that crashes: its memory is gone then, others take it and leave it, and what
is read straight into it fails, or arrives damaged, now and then.

Its worker reads as every worker does: what the table names, and only if it still does afterwards.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Sequence
from pathlib import Path

from kvstore.device.mirrors import Mirrors
from kvstore.device.vram_stand_in import StandInVram
from kvstore.errors import DeviceError
from kvstore.store import Session, Store
from kvstore.types import LeaseGrant
from tests.unit.device.gpus import StandInGpu

READER = b"engine"


class CrashingGpu:
    """Of one run of the server."""

    def __init__(self, path: Path, rng: random.Random, nbytes: int) -> None:
        self._gpu = StandInGpu(path, nbytes)
        self._rng = rng
        self._nbytes = nbytes
        self._readers: dict[Session, Mirrors] = {}
        self.vram = StandInVram(self._gpu.name)

    def is_read_by(self, store: Store, session: Session, layout_ids: Sequence[bytes]) -> None:
        """The session's worker reads here, from now on."""
        gpu = self._gpu.name
        try:
            handout = store.open_vram(session, gpu, layout_ids, READER)
        except DeviceError:
            return

        def fetch(extent: int) -> tuple[int, int]:
            found = store.vram_extent(session, gpu, extent)
            return os.dup(found.descriptor), found.extent_bytes

        self._readers[session] = Mirrors(
            os.dup(handout.descriptor), handout.extent_bytes, fetch, StandInVram(gpu).open
        )

    def read(self, session: Session, grant: LeaseGrant, index: int, nbytes: int) -> bytes | None:
        """A block of a lease, or nothing where it is not here any more."""
        reader = self._readers.get(session)
        if reader is None:
            return None
        found = reader.find([grant.addresses[index]], [grant.checksums[index]])
        if found is None or not found.addresses:
            return None
        data = ctypes.string_at(found.addresses[0], nbytes)
        return data if reader.kept(found)[0] else None

    def whim(self) -> None:
        """What others do to it."""
        rng = self._rng
        self._gpu.say(
            taken=rng.choice([0, 0, 0, self._nbytes // 2, self._nbytes]),
            refuses=rng.choice([[], [], [], ["fill"], ["deliver"], ["make"]]),
            spoils=rng.choice([[], [], ["fill"]]),
            lost=rng.random() < 0.02,
        )

    def abandon(self, store: Store) -> None:
        """The machine is off."""
        for gpu in store._gpus._gpus:
            gpu._arena.close_extents()
            gpu._table.close()

    def leave(self) -> None:
        """The worker ends."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
