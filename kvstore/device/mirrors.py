"""Which blocks a GPU's memory has, and where: a table in shared memory.

The server writes the table into a sealed memfd; workers on that GPU map it read-only. A *mirror*
is a copy of what lies at an address of DRAM, or of what is in no memory but this GPU's
(`GPU_ONLY`). A row of the table names it:

    source        the address that a lease names: in DRAM, or `GPU_ONLY` and more;
                  0: a row of nothing
    address       where its copy lies, `extent * extent_bytes + offset` in the GPU's memory
    generation    another for every mirror there ever was
    checksum      which block it is: what a lease says too

Whoever was given a lease on `source` with that checksum may copy from `address` instead, and then
looks at the row again: as long as it is the same, what was copied was that block. For a row is
struck *before* its memory is used for anything else, or its block's slot in DRAM is. So the
server can take the GPU's memory back at any moment, and a reader that it takes it from copies
from DRAM after all, or has a miss where there is nothing to copy. That the lease still lasts is
no part of it: one that was cut short, with the session of whoever holds it, may name a slot that
is another block's by now, whose row has another checksum.

No order is assumed of a reader's loads: whatever mixture of old and new it sees of a row, it has
to see the very same after the copy.

Who is granted a place to write a block into (`Client.land`) finds it by the same extents
(`Mirrors.places`); there is a row of it once its commit says that it is written.

The memory itself comes an extent at a time (`device.vram`). An extent that the server has closed
is still there until every reader has closed it, so readers look often (`Mirrors.look`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.device.vram import Opened
from kvstore.errors import BadRequest, DeviceError, DeviceLost, InternalError, KVStoreError
from kvstore.local.directory import F_SEAL_FUTURE_WRITE

logger = logging.getLogger("kvstore.device")

HEADER_BYTES = 4096
MAGIC = b"kvmirro2"
_HEADER = struct.Struct("<8sQQ")
_VERSION_WORD = 8
"""In a cache line of its own: it changes all the time, the rest of the header never."""

SOURCE, ADDRESS, GENERATION, CHECKSUM = range(4)
ROW_WORDS = 4

Words = npt.NDArray[np.uint64]


class MirrorTable:
    """The server's side, for at most `rows` mirrors in at most `extents` extents at a time. Not
    thread-safe. The memfd is this object's; give others duplicates of `fd` only."""

    def __init__(self, rows: int, extents: int) -> None:
        nbytes = HEADER_BYTES + 8 * (extents + ROW_WORDS * rows)
        self.fd = os.memfd_create("kvstore-mirrors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            self._map = mmap.mmap(self.fd, nbytes)
            # Our own mapping is writable and stays so; every later one is not.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise
        self._map[: _HEADER.size] = _HEADER.pack(MAGIC, rows, extents)
        self._version, self._extents, self._rows = _words(self._map, rows, extents)
        self._free = list(range(rows - 1, -1, -1))
        self._row_of: dict[int, int] = {}
        self._place_of: dict[int, int] = {}
        self._generation = 0

    def put(self, source: int, address: int, checksum: int) -> None:
        """There is a mirror now, of the block of that checksum (XXH3-64 of its bytes). Its source
        has none yet, and a row is free."""
        number = self._row_of[source] = self._free.pop()
        self._generation += 1
        row = self._rows[number]
        row[ADDRESS], row[GENERATION], row[CHECKSUM] = address, self._generation, checksum
        row[SOURCE] = source
        self._version[0] += 1

    def strike(self, source: int) -> None:
        """There is none any more."""
        number = self._row_of.pop(source)
        self._rows[number, SOURCE] = 0
        self._free.append(number)
        self._version[0] += 1

    def open(self, extent: int) -> None:
        """Readers may open this extent."""
        place = self._place_of[extent] = int(np.flatnonzero(self._extents == 0)[0])
        self._extents[place] = extent
        self._version[0] += 1

    def close_extent(self, extent: int) -> None:
        """Readers are to close it: no mirror is there any more."""
        self._extents[self._place_of.pop(extent)] = 0
        self._version[0] += 1

    def close_extents(self) -> None:
        """Readers are to close all that are open: no mirror is there any more."""
        self._place_of.clear()
        self._extents[:] = 0
        self._version[0] += 1

    def close(self) -> None:
        """Nothing is there any more, for those who still map it."""
        self._rows[:, SOURCE] = 0
        self.close_extents()
        os.close(self.fd)


class Found(NamedTuple):
    """Mirrors of some of the blocks that were asked for: `indexes` of them, and the device's
    `addresses`. The rest is for `Mirrors.kept`."""

    indexes: list[int]
    addresses: list[int]
    numbers: Any
    rows: Any


class Mirrors:
    """A reader's side. For one thread at a time."""

    def __init__(
        self,
        descriptor: int,
        extent_bytes: int,
        fetch: Callable[[int], tuple[int, int]],
        open_memory: Callable[[int, int], Opened],
    ) -> None:
        """Takes the table's descriptor over. `fetch`: (descriptor, bytes) of an extent, of which
        the descriptor becomes this object's; may raise any `KVStoreError`. `open_memory`: see
        `Vram.open`. Raises `InternalError` where this is no such table."""
        try:
            nbytes = os.fstat(descriptor).st_size
            self._map = mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise InternalError(f"the table of mirrors cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
        magic, rows, extents = _HEADER.unpack_from(self._map)
        if magic != MAGIC or nbytes != HEADER_BYTES + 8 * (extents + ROW_WORDS * rows):
            raise InternalError("the server handed out a table of mirrors that is none")
        self._version, self._extents, self._rows = _words(self._map, rows, extents)
        self._extent_bytes = extent_bytes
        self._fetch = fetch
        self._open_memory = open_memory
        self._opened: dict[int, Opened | None] = {}
        self.refused = False
        """Memory that was handed out could not be opened."""
        self._seen = self._indexed = -1
        self._sources: Words = np.zeros(0, np.uint64)
        self._numbers: Any = np.zeros(0, np.intp)

    @property
    def opened_extents(self) -> int:
        return sum(each is not None for each in self._opened.values())

    def look(self) -> None:
        """Close what the server has closed. To be called often; costs little where nothing
        has changed."""
        version = int(self._version[0])
        if version == self._seen:
            return
        self._seen = version
        there = set(self._extents.tolist())
        for extent in [each for each in self._opened if each not in there]:
            self._close(extent)

    def find(self, sources: Sequence[int], checksums: Sequence[int]) -> Found | None:
        """The mirrors of blocks of which a lease says that they are at these addresses, with
        these checksums. Raises `DeviceLost`."""
        self.look()
        self._index()
        if not len(self._sources):
            return None
        asked = np.array(sources, np.uint64)
        at = np.minimum(np.searchsorted(self._sources, asked), len(self._sources) - 1)
        numbers = self._numbers[at]
        rows = self._rows[numbers]
        same = (rows[:, SOURCE] == asked) & (rows[:, CHECKSUM] == np.array(checksums, np.uint64))
        indexes = np.flatnonzero(same)
        extents, offsets = np.divmod(rows[indexes, ADDRESS], np.uint64(self._extent_bytes))
        bases = {extent: self._base(extent) for extent in np.unique(extents).tolist()}
        places = [bases[extent] for extent in extents.tolist()]
        held = [place is not None for place in places]
        indexes, offsets = indexes[held], offsets[held]
        if not len(indexes):
            return None
        starts = [place for place in places if place is not None]
        addresses = [start + offset for start, offset in zip(starts, offsets.tolist(), strict=True)]
        return Found(indexes.tolist(), addresses, numbers[indexes], rows[indexes])

    def kept(self, found: Found) -> list[bool]:
        """Of each that was found, whether it has been there all the time since."""
        same: list[bool] = (self._rows[found.numbers] == found.rows).all(axis=1).tolist()
        return same

    def places(self, addresses: Sequence[int]) -> list[int | None]:
        """Where addresses of the GPU's memory are here; None for what cannot be had. Raises
        `DeviceLost`."""
        self.look()
        places: list[int | None] = []
        for address in addresses:
            extent, offset = divmod(address, self._extent_bytes)
            base = self._base(extent)
            places.append(None if base is None else base + offset)
        return places

    def close(self) -> None:
        """Idempotent."""
        for extent in list(self._opened):
            self._close(extent)

    def _index(self) -> None:
        """Sort what is listed now, so that it can be searched."""
        version = int(self._version[0])
        if version == self._indexed:
            return
        self._indexed = version
        sources = self._rows[:, SOURCE].copy()
        numbers = np.flatnonzero(sources)
        order = np.argsort(sources[numbers])
        self._numbers = numbers[order]
        self._sources = sources[self._numbers]

    def _base(self, extent: int) -> int | None:
        """Where an extent begins here; None where it cannot be had, now or for as long as it
        lives."""
        if extent not in self._opened:
            try:
                descriptor, nbytes = self._fetch(extent)
            except BadRequest:
                # Closed a moment ago.
                self._opened[extent] = None
            except KVStoreError as error:
                logger.debug("An extent of the GPU's memory is not to be had now: %s", error)
                return None
            else:
                self._opened[extent] = self._open(descriptor, nbytes)
        opened = self._opened[extent]
        return None if opened is None else opened.address

    def _open(self, descriptor: int, nbytes: int) -> Opened | None:
        try:
            return self._open_memory(descriptor, nbytes)
        except DeviceLost:
            raise
        except DeviceError as error:
            logger.warning("The store's memory on the GPU cannot be opened: %s", error)
            self.refused = True
            return None
        finally:
            os.close(descriptor)

    def _close(self, extent: int) -> None:
        opened = self._opened.pop(extent)
        if opened is not None:
            with contextlib.suppress(DeviceError):
                opened.close()


def _words(table: mmap.mmap, rows: int, extents: int) -> tuple[Words, Words, Words]:
    """(version, open extents, rows)."""
    words: Words = np.frombuffer(table, np.uint64)
    first = HEADER_BYTES // 8
    version = words[_VERSION_WORD : _VERSION_WORD + 1]
    extents_end = first + extents
    return version, words[first:extents_end], words[extents_end:].reshape(rows, ROW_WORDS)
