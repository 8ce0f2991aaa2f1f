"""A segment: a file of slots that are written once, in order, in each of its lives.

    +0           summary, copy 0
    +summary     summary, copy 1
    +2*summary   slots of equal size, one after the other

A segment is given a slot size and a new *life* when it begins to be filled, and is
never written behind its head in that life. So a slot's header that names this life
and this slot is the one thing ever written there, whatever a crash did, and a
segment is emptied as a whole before it is used again.

The summary says which life it is, which of its blocks are forgotten, and which
parts of the file are bad. With it and the headers the segments are all the truth
there is: the index may be lost, stale or damaged. The copies are written in turn,
so that one of them is whole at any time.

    +0     8  magic
    +8     4  CRC-32C of the whole summary with these four bytes zero
    +12    4  version
    +16    4  number of the segment
    +20    4  size of its slots in units of 4096 bytes
    +24    8  life: 0 for none yet
    +32    8  generation: grows with each copy written
    +40    4  settled: slots below were durable before this copy was written
    +44    4  zero
    +48       a bit a slot: forgotten
              a bit a page of 4096 bytes: bad, for all lives to come
"""

from __future__ import annotations

import struct
from array import array

import google_crc32c

from kvstore.errors import CorruptBlock
from kvstore.tiers.nvme_disk import Disk, DiskFile
from kvstore.tiers.nvme_slot import MIN_SLOT_BYTES, Place
from kvstore.types import ALIGNMENT, align_up

FILE_SUFFIX = ".seg"
SUMMARY_VERSION = 1

_MAGIC = b"KVSTSEGM"
_FIELDS = struct.Struct("<8sIIIIQQII")
_CRC_OFFSET = 8
_NO_CRC = bytes(4)


def file_name(number: int) -> str:
    return f"{number:08d}{FILE_SUFFIX}"


def numbers_of(disk: Disk) -> list[int]:
    """The segments on a disk, in order. Files of other names are not the store's."""
    numbers = []
    for name in disk.names():
        stem = name.removesuffix(FILE_SUFFIX)
        if stem.isascii() and stem.isdigit() and name == file_name(int(stem)):
            numbers.append(int(stem))
    return sorted(numbers)


class Geometry:
    """Where what is in a segment whose slots take `data_bytes` together."""

    def __init__(self, data_bytes: int) -> None:
        self.data_bytes = data_bytes
        self.pages = data_bytes // ALIGNMENT
        self.dead_bytes = -(-(data_bytes // MIN_SLOT_BYTES) // 8)
        self.bad_bytes = -(-self.pages // 8)
        self.summary_bytes = align_up(_FIELDS.size + self.dead_bytes + self.bad_bytes)
        self.data_offset = 2 * self.summary_bytes
        self.file_bytes = self.data_offset + data_bytes


class Segment:
    """An open segment and who is in it. Its log guards it with a lock."""

    __slots__ = (
        "_geometry", "bad", "dead", "dirty", "durable_life", "file", "filling", "generation",
        "life", "living", "next", "number", "owners", "settled", "slot_bytes", "slots",
        "unfinished",
    )  # fmt: skip

    def __init__(self, number: int, file: DiskFile, geometry: Geometry) -> None:
        self.number = number
        self.file = file
        self._geometry = geometry
        self.life = 0
        self.durable_life = 0
        """That of the last summary that is durable."""
        self.generation = 0
        self.settled = 0
        self.bad: set[int] = set()
        """Pages that are not written again."""
        self._shape(0)

    def _shape(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots = self._geometry.data_bytes // slot_bytes if slot_bytes else 0
        self.owners = array("Q", bytes(8 * self.slots))
        """Address + 1 of the block in each slot; 0 where there is none to keep."""
        self.dead = bytearray(self._geometry.dead_bytes)
        self.next = self.slots
        self.living = 0
        self.unfinished: set[int] = set()
        """Slots that are being written."""
        self.filling = False
        self.dirty = False
        """The summary on disk is not what it should be."""

    def begin(self, life: int, slot_bytes: int) -> None:
        """Begin to fill it. What was in it is gone."""
        self._shape(slot_bytes)
        self.life = life
        self.settled = 0
        self.next = 0
        self.filling = True
        self.dirty = True

    def place(self, slot: int) -> Place:
        return Place(self.number, slot, self.life)

    def offset(self, slot: int) -> int:
        return self._geometry.data_offset + slot * self.slot_bytes

    def take_slot(self) -> int | None:
        """The next slot, to be written by the caller; None when there is no more."""
        while self.filling and self.next < self.slots:
            slot = self.next
            self.next += 1
            if self.bad and not self.bad.isdisjoint(self._pages(slot)):
                self.strike(slot)
                continue
            self.unfinished.add(slot)
            return slot
        self.filling = False
        return None

    def enter(self, slot: int, owner: int) -> None:
        self.owners[slot] = owner + 1
        self.living += 1

    def strike(self, slot: int) -> None:
        """What is in the slot is not wanted, now or after a crash."""
        if self.owners[slot]:
            self.owners[slot] = 0
            self.living -= 1
        self.dead[slot >> 3] |= 1 << (slot & 7)
        self.dirty = True

    def is_dead(self, slot: int) -> bool:
        return bool(self.dead[slot >> 3] >> (slot & 7) & 1)

    def spoil(self, slot: int) -> None:
        """Never write where this slot is again."""
        self.bad.update(self._pages(slot))
        self.dirty = True

    def _pages(self, slot: int) -> range:
        each = self.slot_bytes // ALIGNMENT
        return range(slot * each, (slot + 1) * each)

    @property
    def room(self) -> int:
        """Slots that can still be taken."""
        if not self.filling:
            return 0
        bad = sum(slot >= self.next for slot in self._bad_slots(self.slot_bytes))
        return self.slots - self.next - bad

    def room_for(self, slot_bytes: int) -> int:
        """Slots of this size it would have in a new life."""
        return self._geometry.data_bytes // slot_bytes - len(self._bad_slots(slot_bytes))

    def _bad_slots(self, slot_bytes: int) -> set[int]:
        slots = self._geometry.data_bytes // slot_bytes
        each = slot_bytes // ALIGNMENT
        return {slot for page in self.bad if (slot := page // each) < slots}

    @property
    def finished(self) -> int:
        """Slots below are written, or never will be."""
        return min(self.unfinished, default=self.next)

    @property
    def waste(self) -> int:
        """Slots that emptying it would win."""
        if not self.slots:
            return 0
        written = self.next if self.filling else self.slots
        bad = sum(slot < written for slot in self._bad_slots(self.slot_bytes))
        return max(0, written - self.living - bad)

    # The summary

    def encode(self) -> tuple[bytes, int]:
        """(summary, its offset) as things are now, to be written."""
        self.generation += 1
        self.dirty = False
        geometry = self._geometry
        bad = bytearray(geometry.bad_bytes)
        for number in self.bad:
            bad[number >> 3] |= 1 << (number & 7)
        page = bytearray(geometry.summary_bytes)
        _FIELDS.pack_into(
            page, 0, _MAGIC, 0, SUMMARY_VERSION, self.number, self.slot_bytes // ALIGNMENT,
            self.life, self.generation, self.settled, 0,
        )  # fmt: skip
        page[_FIELDS.size : _FIELDS.size + len(self.dead) + len(bad)] = self.dead + bad
        struct.pack_into("<I", page, _CRC_OFFSET, google_crc32c.value(bytes(page)))
        return bytes(page), self.generation % 2 * geometry.summary_bytes

    def load(self, copies: list[bytes]) -> bool:
        """Take over the newer of the summaries found. Whether each that was ever written
        is whole. Raises `CorruptBlock` when none is; the segment then holds nothing."""
        written = [page for page in copies if page.strip(b"\0")]
        found = [fields for page in written if (fields := self._decode(page))]
        if not found:
            raise CorruptBlock("neither copy of the summary is whole")
        self.generation, self.life, slot_bytes, self.settled, dead, bad = max(found)
        self.durable_life = self.life
        pages = range(self._geometry.pages) if bad.strip(b"\0") else ()
        self.bad = {number for number in pages if bad[number >> 3] >> (number & 7) & 1}
        self._shape(slot_bytes)
        self.dead[:] = dead
        return len(found) == len(written)

    def _decode(self, page: bytes) -> tuple[int, int, int, int, bytes, bytes] | None:
        if len(page) != self._geometry.summary_bytes:
            return None
        magic, crc, version, number, units, life, generation, settled, _ = _FIELDS.unpack_from(page)
        blank = page[:_CRC_OFFSET] + _NO_CRC + page[_CRC_OFFSET + 4 :]
        whole = (magic, version, number) == (_MAGIC, SUMMARY_VERSION, self.number)
        if not whole or google_crc32c.value(blank) != crc:
            return None
        middle = _FIELDS.size + self._geometry.dead_bytes
        dead = page[_FIELDS.size : middle]
        bad = page[middle : middle + self._geometry.bad_bytes]
        return generation, life, units * ALIGNMENT, settled, dead, bad
