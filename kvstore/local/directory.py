"""The directory: which blocks the store holds, readable without asking it.

The server writes a table into a sealed memfd; clients map it read-only (the seal
F_SEAL_FUTURE_WRITE makes the kernel refuse them anything else) and search it. What
they find is advice: a lookup costs no RPC, and an acquire confirms it.

The table. After a header page come entries of 32 bytes, a power of two of them and
one window more:

    stored key (16) | info (8, bit 0: in DRAM, bit 1: behind it) | check (8)

An entry lives somewhere in the window of 32 entries that begins where its stored
key points (which is the output of a keyed hash and needs no further hashing). A
search is one memmem over the window, so nothing marks where a removed entry was:
linear probing (Knuth, TAOCP vol. 3, 6.4) without its tombstones.

The memory model. There are no locks and no order is assumed between the writer's
stores and a reader's loads: a reader may see any mixture of old and new bytes of an
entry. `check` is XXH3-64 over key, info and the table's seed, so a mixture passes
for an entry with probability 2^-64 and otherwise counts as absent; an entry that
passes was written as it is, by this server, in this table. It may be out of date,
in both directions, which is what advice may be. Removal zeroes the entry. So a
reader that races the writer errs towards a miss or towards an acquire that is
answered with less; never towards other bytes, because addresses are not in the
table and come only from an acquire.

A table is replaced by a larger one when it fills up, and dies with its server. The
header says so: `state` is set to SUPERSEDED or CLOSED, and `beat` is the server's
last sign of life. A reader takes notice at its next search, and treats everything
as absent until it has mapped the successor.

Whose blocks. Stored keys are made with a tenant's secret. A client has its own
tenant's only, so of others' entries it learns nothing but how many there are.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from kvstore.naming import Namer
from kvstore.types import STORED_KEY_BYTES, ChainPresence

HEADER_BYTES = 4096
ENTRY_BYTES = 32
WINDOW_ENTRIES = 32
WINDOW_BYTES = WINDOW_ENTRIES * ENTRY_BYTES

MAGIC = b"kvdirec1"
LIVE, SUPERSEDED, CLOSED = 1, 2, 3

IN_DRAM = 1
BEHIND_DRAM = 2

STALE_AFTER_NS = 2_000_000_000
"""Without a beat for this long the server counts as gone."""

MAX_LOAD = 0.3
"""Share of slots in use beyond which a table should be replaced. Up to it, fewer than
one block in a million finds its window full."""

_HEADER = struct.Struct("<8sQQ8s")
_STATE = struct.Struct("<Q")
_BEAT = struct.Struct("<q")
_STATE_AT = 512
_BEAT_AT = 1024
_INFO = struct.Struct("<Q")
_TAIL = struct.Struct("<QQ").unpack_from
_CHECKSUM = xxhash.xxh3_64_intdigest
_INT = int.from_bytes
_CHECKED_BYTES = STORED_KEY_BYTES + 8
_EMPTY = bytes(ENTRY_BYTES)

F_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1; not among the constants of Python 3.11."""


class DirectoryHeader(NamedTuple):
    """`slots` is a power of two. `seed` differs from table to table."""

    slots: int
    seed: int
    epoch: bytes


def table_bytes(slots: int) -> int:
    """Size of a table's memfd."""
    return HEADER_BYTES + (slots + WINDOW_ENTRIES) * ENTRY_BYTES


class DirectoryWriter:
    """The server's side of one table. Not thread-safe.

    `slots` is a power of two; `epoch` is 8 bytes. The memfd is this object's until
    `close`; give clients duplicates of `fd` only.
    """

    def __init__(self, slots: int, epoch: bytes, seed: int, now_ns: int) -> None:
        if slots < 1 or slots & (slots - 1):
            raise ValueError("the number of slots is a power of two")
        self.slots = slots
        self.entries = 0
        self.unlisted = 0
        """Blocks that found their window full. They are not found by lookups."""
        self._seed = seed
        self._mask = slots - 1
        self.fd = os.memfd_create("kvstore-directory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, table_bytes(slots))
            self._map = mmap.mmap(self.fd, table_bytes(slots))
            # Our own mapping is writable and stays so; every later one is not.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise
        self._map[: _HEADER.size] = _HEADER.pack(MAGIC, slots, seed, epoch)
        self.beat(now_ns)
        self.set_state(LIVE)

    @property
    def load(self) -> float:
        """Share of the entries in use."""
        return self.entries / self.slots

    def beat(self, now_ns: int) -> None:
        """Show that the server lives."""
        self._map[_BEAT_AT : _BEAT_AT + 8] = _BEAT.pack(now_ns)

    def set_state(self, state: int) -> None:
        self._map[_STATE_AT : _STATE_AT + 8] = _STATE.pack(state)

    def put(self, stored_key: bytes, info: int) -> None:
        """List a block, or change what is said of it. `info` is not 0."""
        start = _home(stored_key, self._mask)
        at = _place(self._map, stored_key, start)
        if at < 0:
            at = self._free(start)
            if at < 0:
                self.unlisted += 1
                return
            self.entries += 1
        body = stored_key + _INFO.pack(info)
        check = xxhash.xxh3_64_intdigest(body, self._seed)
        self._map[at : at + ENTRY_BYTES] = body + _INFO.pack(check)

    def remove(self, stored_key: bytes) -> None:
        """A block that is not listed is ignored."""
        at = _place(self._map, stored_key, _home(stored_key, self._mask))
        if at >= 0:
            self._map[at : at + ENTRY_BYTES] = _EMPTY
            self.entries -= 1

    def _free(self, start: int) -> int:
        for at in range(start, start + WINDOW_BYTES, ENTRY_BYTES):
            if self._map[at : at + ENTRY_BYTES] == _EMPTY:
                return at
        return -1

    def close(self, state: int = CLOSED) -> None:
        """Tell readers, then let go. What they have mapped stays as it is."""
        self.set_state(state)
        self._map.close()
        os.close(self.fd)


class DirectoryReader:
    """A client's side of one table.

    Takes `fd` over. Searches may run in several threads at once. Raises ValueError
    when `fd` is not a table that this code can read.
    """

    def __init__(self, fd: int) -> None:
        try:
            size = os.fstat(fd).st_size
            if size < HEADER_BYTES:
                raise ValueError("too small for a directory")
            self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        magic, slots, seed, epoch = _HEADER.unpack(self._map[: _HEADER.size])
        if magic != MAGIC or slots & (slots - 1) or table_bytes(slots) != size:
            self._map.close()
            raise ValueError("not a directory of this version")
        self.header = DirectoryHeader(slots, seed, epoch)
        self._find = self._map.find
        self._seed = seed
        self._mask = slots - 1

    def alive(self, now_ns: int) -> bool:
        """Whether the table is current: neither replaced nor left by its server."""
        state: int = _STATE.unpack_from(self._map, _STATE_AT)[0]
        beat_ns: int = _BEAT.unpack_from(self._map, _BEAT_AT)[0]
        return state == LIVE and now_ns - beat_ns < STALE_AFTER_NS

    def superseded(self) -> bool:
        """Whether there is a successor to map."""
        return bool(_STATE.unpack_from(self._map, _STATE_AT)[0] == SUPERSEDED)

    def find(self, stored_key: bytes) -> int:
        """What is said of a block: IN_DRAM, BEHIND_DRAM, both, or 0 when absent."""
        # Written out, because this is what a lookup consists of.
        start = HEADER_BYTES + (_INT(stored_key, "little") & self._mask) * ENTRY_BYTES
        at = self._find(stored_key, start, start + WINDOW_BYTES)
        if at < 0:
            return 0
        # One copy, so that what is checked is what is used.
        entry = self._map[at : at + ENTRY_BYTES]
        info, check = _TAIL(entry, STORED_KEY_BYTES)
        if _CHECKSUM(entry[:_CHECKED_BYTES], self._seed) != check:
            # Torn, or found across the fields of entries, which is not impossible.
            return 0
        return info if entry.startswith(stored_key) else 0

    def prefix(self, namers: Sequence[Namer], keys: Sequence[bytes]) -> ChainPresence:
        """How much of a chain all layouts hold; `namers` has one for each.

        By binary search, which is exact where presence is a prefix (as the store
        keeps it); where a block was lost in the middle it may report more or less.
        `keys` are 32 bytes each.
        """
        held = in_dram = len(keys)
        if not held or not namers:
            return ChainPresence(0, 0)
        for namer in namers:
            held, in_dram = self._prefix(namer, keys, held, in_dram)
            if not held:
                break
        return ChainPresence(held, min(in_dram, held))

    def _prefix(
        self, namer: Namer, keys: Sequence[bytes], most: int, most_dram: int
    ) -> tuple[int, int]:
        # The two usual answers first: nothing, and everything.
        first = self.find(namer(keys[0]))
        if not first:
            return 0, 0
        last = self.find(namer(keys[most - 1])) if most > 1 else first
        held = most
        if not last:
            held, last = self._search(namer, keys, first, most - 1, IN_DRAM | BEHIND_DRAM)
        if last & IN_DRAM:
            return held, min(held, most_dram)
        if not first & IN_DRAM:
            return held, 0
        return held, self._search(namer, keys, first, min(held, most_dram), IN_DRAM)[0]

    def _search(
        self, namer: Namer, keys: Sequence[bytes], first: int, high: int, wanted: int
    ) -> tuple[int, int]:
        """How many of keys[:high] are found with one of the bits `wanted`, and what is
        said of the last of those. The first is known to be, with `first`."""
        low, last = 1, first
        find = self.find
        while low < high:
            middle = (low + high) // 2
            info = find(namer(keys[middle]))
            if info & wanted:
                low, last = middle + 1, info
            else:
                high = middle
        return low, last

    def close(self) -> None:
        self._map.close()


def _home(stored_key: bytes, mask: int) -> int:
    """Offset of the window of a key."""
    return HEADER_BYTES + (_INT(stored_key, "little") & mask) * ENTRY_BYTES


def _place(table: mmap.mmap, stored_key: bytes, start: int) -> int:
    """Offset of the key's entry in the window at `start`; -1 where there is none."""
    end = start + WINDOW_BYTES
    at = table.find(stored_key, start, end)
    while at >= 0 and (at - start) % ENTRY_BYTES:
        # Found across the fields of entries: not impossible, only absurd.
        at = table.find(stored_key, at + 1, end)
    return at
