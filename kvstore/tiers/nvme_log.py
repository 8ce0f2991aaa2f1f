"""Where each block lies: an append-only log of segments behind fixed addresses.

The store gives every block an address and keeps it; the log writes the block at the
head of a segment and remembers where. A block forgotten, or stored again, only
leaves a dead slot behind. When segments run out, the one with most dead slots is
emptied: its living blocks are appended once more, and it begins a new life. What is
worth keeping is decided by who gives the addresses: what is not is forgotten, at the
latest when it is asked whether a segment's blocks are worth another write.

*There is always room.* A segment has as many slots of a size as an extent, and
there are `spare_segments` more than extents may be open. So when no segment is
free, some size of slots has more segments than open extents, hence dead slots, and
emptying its segments wins a whole one. Bad places on the medium take from this; a
log that cannot win a segment says `TierFull`, and has lost nothing by trying.

*Nothing is lost on the way.* A segment that was emptied is used again only after
the next flush: then what was in it is durable elsewhere.

*The tables are small*: eight bytes a slot for who is in it, eight an address for
where it lies.
"""

from __future__ import annotations

import itertools
import logging
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import xxhash

from kvstore.errors import CorruptBlock, InternalError, TierFull
from kvstore.tiers import nvme_slot
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme_disk import FULL, Disk, read_all, write_all
from kvstore.tiers.nvme_index import Batch, encode_record
from kvstore.tiers.nvme_segment import Geometry, Segment, file_name
from kvstore.tiers.nvme_slot import HEADER_BYTES, Place, Stored
from kvstore.types import align_up

_log = logging.getLogger(__name__)

_SLOT_BITS = 20  # Of the largest extent, 2 GiB, in slots of 8 KiB there are 2^18.
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_RESERVE = 2
"""Free segments kept: one to empty others into, one that a crash in the middle of that
may cost."""


def spare_segments(segments: int) -> int:
    """How many of them are there for the log to work with: those in reserve, one of dead
    slots, one for blocks being written and for bad places. More would cost capacity, fewer
    would have blocks appended again more often."""
    return max(_RESERVE + 2, segments // 16)


class Flushed(NamedTuple):
    """What a flush has to make durable, in this order."""

    summaries: list[tuple[Segment, bytes, int]]
    """(segment, summary, its offset)"""
    segments: list[tuple[Segment, int, int]]
    """(segment, its life, slots below which all is written)"""
    names: bool
    later: list[tuple[Segment, bytes, int]]
    """Summaries that may only be written after all the above is durable: they give up
    what was moved."""
    batch: Batch
    emptied: list[Segment]


class Extent:
    """Addresses that the store has opened."""

    __slots__ = ("places", "slot_bytes")

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes = slot_bytes
        self.places = array("Q", bytes(8 * slots))
        """Where the block of each address lies, packed; 0 where there is none."""


def pack(segment: Segment, slot: int) -> int:
    """What `Extent.places` says of a block in this slot."""
    return (segment.number + 1) << _SLOT_BITS | slot


class Log:
    def __init__(
        self,
        disk: Disk,
        geometry: Geometry,
        *,
        most_segments: int,
        first_sequence: int,
        flush: Callable[[], None],
    ) -> None:
        """`flush`: takes `take_flushed` and makes it durable; may raise TierFailed."""
        self.extent_bytes = geometry.data_bytes
        self.geometry = geometry
        self.stored_bytes = 0
        """Written because the store asked for it, since the start."""
        self.moved_bytes = 0
        """Written to win segments."""
        self.segments: dict[int, Segment] = {}
        self.extents: dict[int, Extent] = {}
        self.not_worth_moving: Callable[[list[int]], Iterable[int]] = lambda addresses: ()
        """Which of these its owner has forgotten, sooner than have them appended again."""
        self._disk = disk
        self.most_extents = most_segments - spare_segments(most_segments)
        self.most_segments = most_segments
        self._sequence = itertools.count(first_sequence)
        self._flush = flush
        # Held while a head is replaced, through all the I/O that takes; the other
        # only guards the tables and is never held during I/O.
        self._advancing = threading.Lock()
        self._winning = False
        self.lock = threading.Lock()
        self._heads: dict[int, Segment] = {}
        self._free: deque[Segment] = deque()
        self._emptied: list[Segment] = []
        self._touched: dict[Segment, None] = {}  # In the order in which it was.
        self._new_names = False
        self._moved = False
        self._batch = Batch()

    @property
    def pending(self) -> int:
        """Changes that no flush has taken yet. Does not block."""
        return len(self._batch)

    @property
    def pending_blocks(self) -> int:
        return len(self._batch.blocks)

    # Addresses

    def open_extent(self, number: int, slot_bytes: int) -> None:
        """Raises `InternalError`, `TierFull`, OSError."""
        with self._advancing:
            if number in self.extents:
                raise InternalError(f"extent {number} is open already")
            open_then = len(self.extents) + 1
            if open_then > self.most_extents:
                raise TierFull("all the capacity is in open extents")
            self._make_segments(open_then)
            with self.lock:
                self.add_extent(number, slot_bytes)

    def add_extent(self, number: int, slot_bytes: int) -> Extent:
        extent = Extent(slot_bytes, self.extent_bytes // slot_bytes)
        self.extents[number] = extent
        return extent

    def close_extent(self, number: int) -> None:
        with self.lock:
            extent = self.extents.get(number)
            if extent is None:
                raise InternalError(f"extent {number} is not open")
            for index in range(len(extent.places)):
                self._forget(extent, index)
            del self.extents[number]

    def find(self, address: int) -> tuple[Extent, int]:
        """The extent of an address, and which of its slots that is. Raises
        `InternalError`."""
        number, offset = divmod(address, self.extent_bytes)
        extent = self.extents.get(number)
        if extent is None:
            raise InternalError(f"extent {number} is not open")
        index, rest = divmod(offset, extent.slot_bytes)
        if rest or index >= len(extent.places):
            raise InternalError("not the address of a slot")
        return extent, index

    def where(self, address: int) -> tuple[Segment, Place] | None:
        """Where the block of an address lies now; None where there is none."""
        with self.lock:
            extent, index = self.find(address)
            return self._where(extent.places[index])

    def _where(self, packed: int) -> tuple[Segment, Place] | None:
        if not packed:
            return None
        segment = self.segments[(packed >> _SLOT_BITS) - 1]
        return segment, segment.place(packed & _SLOT_MASK)

    def forget(self, address: int) -> None:
        with self.lock:
            extent = self.extents.get(address // self.extent_bytes)
            if extent is not None:
                self._forget(extent, address % self.extent_bytes // extent.slot_bytes)

    def lose(self, address: int, place: Place) -> None:
        """What lies at `place` is not what was written: it is not read again, and
        nothing is written there."""
        with self.lock:
            segment = self.segments[place.segment]
            if segment.life != place.life:
                return
            segment.spoil(place.slot)
            self._touched[segment] = None
            extent, index = self.find(address)
            if extent.places[index] == pack(segment, place.slot):
                self._forget(extent, index)

    def _forget(self, extent: Extent, index: int) -> None:
        packed = extent.places[index]
        if packed:
            extent.places[index] = 0
            self._strike(self.segments[(packed >> _SLOT_BITS) - 1], packed & _SLOT_MASK)

    def _strike(self, segment: Segment, slot: int) -> None:
        segment.strike(slot)
        self._touched[segment] = None
        self._batch.blocks[segment.number, slot] = None

    # Writing

    def write(
        self, address: int, header: BlockHeader, payload: memoryview, scratch: nvme_slot.Scratch
    ) -> None:
        """Append a block. Raises `TierFull`, `TierFailed`, OSError."""
        extent, index = self.find(address)
        if nvme_slot.slot_bytes(header.length) > extent.slot_bytes:
            raise InternalError("the block is larger than the extent's slots")
        sequence = next(self._sequence)
        scratch.fill_tail(payload, header.length)
        segment, slot = self._append(
            extent.slot_bytes, header, sequence, scratch, scratch.buffers(payload, header.length)
        )
        with self.lock:
            segment.unfinished.discard(slot)
            self.stored_bytes += nvme_slot.slot_bytes(header.length)
            if self.extents.get(address // self.extent_bytes) is not extent:
                self._strike(segment, slot)
                return
            self._forget(extent, index)
            self._enter(segment, slot, extent, index, address)
            self._batch.blocks[segment.number, slot] = encode_record(
                Stored(header, sequence, segment.place(slot))
            )

    def _enter(self, segment: Segment, slot: int, extent: Extent, index: int, owner: int) -> None:
        segment.enter(slot, owner)
        extent.places[index] = pack(segment, slot)
        self._touched[segment] = None

    def _append(
        self,
        slot_bytes: int,
        header: BlockHeader,
        sequence: int,
        scratch: nvme_slot.Scratch,
        buffers: list[memoryview],
        *,
        moving: bool = False,
    ) -> tuple[Segment, int]:
        """Write a slot, whose first buffer is `scratch.header`. It stays unfinished:
        the caller enters it."""
        segment, slot = self._take_slot(slot_bytes, moving=moving)
        try:
            nvme_slot.encode_header(scratch.header, Stored(header, sequence, segment.place(slot)))
            write_all(segment.file, buffers, segment.offset(slot))
        except BaseException:
            with self.lock:
                segment.unfinished.discard(slot)
                segment.strike(slot)
                self._touched[segment] = None
            raise
        return segment, slot

    def _take_slot(self, slot_bytes: int, *, moving: bool) -> tuple[Segment, int]:
        while True:
            # Others wait while a segment is emptied: the room in reserve is for that.
            if (moving or not self._winning) and (taken := self._take_from_head(slot_bytes)):
                return taken
            if moving:
                self._begin(slot_bytes)
                continue
            with self._advancing:
                if taken := self._take_from_head(slot_bytes):
                    return taken
                self._winning = True
                try:
                    if len(self._free) <= _RESERVE:
                        with suppress(OSError):  # There may be one to win all the same.
                            self._make_segments(len(self.extents))
                    while len(self._free) <= _RESERVE:
                        self._win_segment()
                finally:
                    self._winning = False
                if taken := self._take_from_head(slot_bytes):
                    return taken
                self._begin(slot_bytes)

    def _take_from_head(self, slot_bytes: int) -> tuple[Segment, int] | None:
        with self.lock:
            head = self._heads.get(slot_bytes)
            slot = None if head is None else head.take_slot()
            return None if head is None or slot is None else (head, slot)

    def _begin(self, slot_bytes: int) -> None:
        with self.lock:
            if not self._free:
                raise TierFull("no segment is free")
            segment = self._free.popleft()
            segment.begin(next(self._sequence), slot_bytes)
            self._heads[slot_bytes] = segment
            self._touched[segment] = None

    # Winning segments. All under `_advancing`.

    def _make_segments(self, extents: int) -> None:
        """Preallocate for so many extents; for fewer spares where the disk is full."""
        wanted = min(self.most_segments, extents + spare_segments(self.most_segments))
        numbers = itertools.count()
        while len(self.segments) < wanted:
            number = next(n for n in numbers if n not in self.segments)
            try:
                file = self._disk.create(file_name(number), self.geometry.file_bytes)
            except OSError as error:
                if error.errno in FULL and len(self.segments) > extents + _RESERVE:
                    return
                raise
            with self.lock:
                self._new_names = True
                segment = Segment(number, file, self.geometry)
                self.segments[number] = segment
                self._free.append(segment)

    def _win_segment(self) -> None:
        victim = self._victim()
        if victim is None:
            raise TierFull("no segment has room to win")
        if victim.living:
            self._drop_unworthy(victim)
            self._empty(victim)
        with self.lock:
            if victim.living:
                raise TierFull("a segment could not be emptied")
            self._emptied.append(victim)
        self._flush()

    def _victim(self) -> Segment | None:
        with self.lock:
            waiting = {*self._free, *self._emptied}
            found = [
                s
                for s in self.segments.values()
                if s not in waiting and s.waste and not s.unfinished and self._fits(s)
            ]
            victim = min(found, key=lambda s: s.living / s.slots, default=None)
            if victim is not None:
                victim.filling = False
                victim.next = victim.slots
                if self._heads.get(victim.slot_bytes) is victim:
                    del self._heads[victim.slot_bytes]
            return victim

    def _fits(self, victim: Segment) -> bool:
        """Whether its living blocks have room at the head and in one segment more."""
        head = self._heads.get(victim.slot_bytes)
        room = 0 if head is None or head is victim else head.room
        if self._free:
            room += self._free[0].room_for(victim.slot_bytes)
        return victim.living <= room

    def _drop_unworthy(self, victim: Segment) -> None:
        with self.lock:
            living = [owner - 1 for owner in victim.owners if owner]
        for address in self.not_worth_moving(living):
            self.forget(address)

    def _empty(self, victim: Segment) -> None:
        """Append its living blocks again."""
        scratch = nvme_slot.Scratch()
        payload = nvme_slot.aligned(victim.slot_bytes - HEADER_BYTES)
        for slot in range(victim.slots):
            owner = victim.owners[slot]
            if not owner:
                continue
            try:
                stored = read_slot(victim, slot, scratch.header, payload)
            except CorruptBlock as error:
                _log.warning("a block is damaged, found while its segment was emptied: %s", error)
                self.lose(owner - 1, victim.place(slot))
                continue
            padded = align_up(stored.header.length)
            segment, target = self._append(
                victim.slot_bytes, stored.header, stored.sequence, scratch,
                [scratch.header, payload[:padded]], moving=True,
            )  # fmt: skip
            with self.lock:
                segment.unfinished.discard(target)
                self.moved_bytes += HEADER_BYTES + padded
                extent = self.extents.get((owner - 1) // self.extent_bytes)
                if victim.owners[slot] != owner or extent is None:
                    self._strike(segment, target)  # Forgotten meanwhile.
                    continue
                index = (owner - 1) % self.extent_bytes // extent.slot_bytes
                self._moved = True
                self._strike(victim, slot)
                self._enter(segment, target, extent, index, owner - 1)
                self._batch.blocks[segment.number, target] = encode_record(
                    stored._replace(place=segment.place(target))
                )

    # Making it durable

    def drop(self, segment: Segment, slot: int) -> None:
        """Nobody wants what was found in a slot."""
        with self.lock:
            self._strike(segment, slot)

    def blank(self, segment: Segment, slots: Iterable[int]) -> None:
        """Nothing is in these slots."""
        with self.lock:
            for slot in slots:
                segment.strike(slot)
                self._touched[segment] = None

    def drop_record(self, segment: int, slot: int) -> None:
        """The index is wrong about a slot."""
        with self.lock:
            self._batch.blocks[segment, slot] = None

    def take_flushed(self) -> Flushed:
        """All that is not durable yet. Flushes do not overlap."""
        with self.lock:
            batch, self._batch = self._batch, Batch()
            touched, self._touched = self._touched, {}
            emptied, self._emptied = self._emptied, []
            names, self._new_names = self._new_names, False
            segments = [(s, s.life, s.finished) for s in touched]
            for segment, life, finished in segments:
                batch.segments[segment.number] = (life, finished)
            moved, self._moved = self._moved, False
            new = [s for s in touched if s.dirty and (not moved or s.life != s.durable_life)]
            summaries = [(s, *s.encode()) for s in new]
            later = [(s, *s.encode()) for s in touched if s.dirty]
            return Flushed(summaries, segments, names, later, batch, emptied)

    def flushed(self, done: Flushed) -> None:
        """It is durable."""
        with self.lock:
            for segment, life, finished in done.segments:
                if segment.life == life:
                    segment.settled = finished
                    segment.durable_life = life
            self._free += done.emptied

    def adopt(self, segment: Segment) -> None:
        """A segment found at the start has its blocks. Nothing is appended to it."""
        if not segment.living:
            self._free.append(segment)

    def close(self) -> None:
        for segment in self.segments.values():
            segment.file.close()
        self.segments.clear()

    def check_integrity(self) -> None:
        """Recount; raises `InternalError`."""
        with self.lock:
            for number, extent in self.extents.items():
                for index, packed in enumerate(extent.places):
                    address = number * self.extent_bytes + index * extent.slot_bytes
                    found = self._where(packed)
                    if found is not None and found[0].owners[found[1].slot] != address + 1:
                        raise InternalError("an address and its slot disagree")
            held = sum(1 for e in self.extents.values() for packed in e.places if packed)
            if held != sum(s.living for s in self.segments.values()):
                raise InternalError("a slot is held by an address that does not know it")
            for segment in self.segments.values():
                if segment.living != sum(map(bool, segment.owners)):
                    raise InternalError("a segment has lost count of its blocks")
            if len(self.segments) > self.most_segments:
                raise InternalError("there are more segments than the capacity allows")
            if any(s.living for s in (*self._free, *self._emptied)):
                raise InternalError("a segment in use is to be used again")


def read_slot(segment: Segment, slot: int, page: memoryview, payload: memoryview) -> Stored:
    """The block in a slot, its bytes in `payload` up to their length. `page` and
    `payload` are aligned and make a slot together. Raises `CorruptBlock`, OSError."""
    place = segment.place(slot)
    if not read_all(segment.file, [page, payload], segment.offset(slot)):
        raise CorruptBlock("the file ends before the block does")
    stored = nvme_slot.decode_header_at(page, place)
    check_payload(stored.header, payload)
    return stored


def check_payload(header: BlockHeader, payload: memoryview) -> None:
    """Raise `CorruptBlock` unless `payload` begins with the block's bytes."""
    if header.length > len(payload):
        raise CorruptBlock("the header tells of more bytes than a slot has")
    if xxhash.xxh3_64_intdigest(payload[: header.length]) != header.checksum:
        raise CorruptBlock("the payload fails its checksum")
