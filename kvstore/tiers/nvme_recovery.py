"""What is found at a start: the segments, and what the index does not tell of them.

The index tells of every block below a mark in each segment, unless it is older than
the segment's life, lost or damaged. From the mark on, and in a segment of which it
does not know, headers are read one by one. So a start costs what was written since
the index was last told, and a rebuild is the same with every mark at zero.

A block that is not known to have been durable is read as a whole: half of it may be
there. Of two blocks of one name, which a crash may leave, the later is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from kvstore.errors import CorruptBlock
from kvstore.tiers import nvme_slot
from kvstore.tiers.base import RecoveredBlocks
from kvstore.tiers.nvme_disk import Disk, read_all
from kvstore.tiers.nvme_index import Batch, Index, encode_record
from kvstore.tiers.nvme_log import Log, check_payload, pack
from kvstore.tiers.nvme_segment import Geometry, Segment, file_name, numbers_of
from kvstore.tiers.nvme_slot import HEADER_BYTES, Stored

_log = logging.getLogger(__name__)

SCANNERS = 8
"""Threads that read summaries and headers: the disk's latency is what that waits for."""
_BATCH = 4096
_LIFE_BITS = 40

Slots = npt.NDArray[np.int64]
Marks = dict[int, tuple[int, int]]
"""Segment -> (its life, slots below which the index tells all)."""
Rows = npt.NDArray[np.void]

_NAME = np.dtype(
    [("name", "V16"), ("sequence", "<u8"), ("life", "<u8"), ("segment", "<u4"), ("slot", "<u4")]
)


def open_segments(disk: Disk, geometry: Geometry, most: int) -> list[Segment]:
    """Those there is capacity for; other segments are removed. Raises OSError."""
    numbers = numbers_of(disk)
    with ThreadPoolExecutor(SCANNERS) as pool:
        opened = pool.map(partial(_open_segment, disk, geometry), numbers)
        segments = [segment for segment in opened if segment is not None]
    if len(segments) < len(numbers):
        _log.warning(
            "%d segments were dropped: another extent size than before, or cut short",
            len(numbers) - len(segments),
        )
    segments.sort(key=lambda s: s.life, reverse=True)
    for segment in segments[most:]:
        segment.file.close()
        disk.remove(file_name(segment.number))
    if len(segments) > most:
        _log.warning("%d segments were dropped: less capacity than before", len(segments) - most)
    return segments[:most]


def _open_segment(disk: Disk, geometry: Geometry, number: int) -> Segment | None:
    file = disk.open(file_name(number))
    if file.nbytes != geometry.file_bytes:
        file.close()
        disk.remove(file_name(number))
        return None
    segment = Segment(number, file, geometry)
    try:
        load_summary(segment, geometry)
    except CorruptBlock as error:
        _log.error("segment %d is lost: %s", number, error)
    return segment


def load_summary(segment: Segment, geometry: Geometry) -> bool:
    """Whether each copy that was ever written is whole. Raises `CorruptBlock` when none is,
    and the segment holds nothing."""
    nbytes = geometry.summary_bytes
    both = nvme_slot.aligned(2 * nbytes)
    pages = [both[:nbytes], both[nbytes:]]
    try:
        there = [read_all(segment.file, pages, 0)] * 2
    except OSError:
        there = [_read_summary(segment, page, i * nbytes) for i, page in enumerate(pages)]
    copies = [bytes(page) for page, is_there in zip(pages, there, strict=True) if is_there]
    if not any(copy.strip(b"\0") for copy in copies):
        return True  # Preallocated, and never begun.
    return segment.load(copies) and len(copies) == len(pages)


def _read_summary(segment: Segment, page: memoryview, offset: int) -> bool:
    try:
        return read_all(segment.file, [page], offset)
    except OSError as error:
        _log.error("a summary of segment %d cannot be read: %s", segment.number, error)
        return False


def next_life(index: Index, segments: list[Segment]) -> int:
    """A number for this opening of the directory, larger than all before."""
    return 1 + max([index.life, *(segment.life >> _LIFE_BITS for segment in segments)])


def first_sequence(life: int) -> int:
    """Larger than all sequences of earlier lives."""
    return life << _LIFE_BITS


def tell_index(index: Index, segments: list[Segment], known: Marks, *, clean: bool) -> int:
    """Let it know of every block it does not; how many those are. `known`: its segments.
    With `clean` it knows all of those whose life it knows. Raises `TierError`, OSError."""
    for number in known.keys() - {segment.number for segment in segments}:
        index.drop_segment(number)
    scans: list[tuple[Segment, int]] = []
    sealed = Batch()
    for segment in segments:
        life, mark = known.get(segment.number, (0, 0))
        if life != segment.life:
            mark = 0
        if mark < segment.slots and not (clean and life == segment.life):
            scans.append((segment, mark))
        elif mark < segment.slots:
            sealed.segments[segment.number] = (life, segment.slots)
    found = 0
    with ThreadPoolExecutor(SCANNERS) as pool:
        for (segment, _), blocks in zip(scans, pool.map(_scanned, scans), strict=True):
            found += len(blocks)
            for start in range(0, len(blocks), _BATCH):
                part = blocks[start : start + _BATCH]
                index.apply(Batch({(segment.number, b.place.slot): encode_record(b) for b in part}))
            sealed.segments[segment.number] = (segment.life, segment.slots)
    index.apply(sealed)
    return found


def _scanned(work: tuple[Segment, int]) -> list[Stored]:
    return list(scan(*work))


def scan(segment: Segment, start: int = 0) -> Iterator[Stored]:
    """The blocks in a segment's slots from `start` on, by their headers."""
    page = nvme_slot.aligned(HEADER_BYTES)
    payload = nvme_slot.aligned(max(HEADER_BYTES, segment.slot_bytes - HEADER_BYTES))
    for slot in range(start, segment.slots):
        if segment.is_dead(slot):
            continue
        buffers = [page] if slot < segment.settled else [page, payload]
        try:
            if not read_all(segment.file, buffers, segment.offset(slot)):
                continue
            stored = nvme_slot.decode_header_at(page, segment.place(slot))
            if slot >= segment.settled:
                check_payload(stored.header, payload)
        except CorruptBlock:
            continue
        except OSError as error:
            _log.error("a slot of segment %d cannot be read: %s", segment.number, error.strerror)
            continue
        yield stored


def find_blocks(index: Index, log: Log, segments: list[Segment], vouched: Marks) -> None:
    """Give the log the segments, oldest first, with an address for every block.

    Of a segment that is vouched for, the index tells of just those blocks below its mark
    that are not forgotten, so it is not asked. Slots in which nothing was found are marked
    as if forgotten, which keeps that so."""
    found: list[tuple[Segment, Slots]] = []
    names: list[Rows] = []
    for segment in sorted(segments, key=lambda s: s.life):
        dead = np.unpackbits(np.frombuffer(segment.dead, np.uint8), bitorder="little")
        kept = dead[: segment.slots] == 0
        life, mark = vouched.get(segment.number, (0, 0))
        if life == segment.life:
            there = np.flatnonzero(kept[:mark])
        else:
            there = np.zeros(0, np.int64)
            for slots, table in index.entries(segment.number):
                right = (table["life"] == segment.life) & (slots < segment.slots)
                right[right] = kept[slots[right]]
                there = np.concatenate((there, slots[right]))
                names.append(_names(segment, slots[right], table[right]))
                for slot in slots[~right].tolist():
                    log.drop_record(segment.number, slot)
        kept[there] = False
        log.blank(segment, np.flatnonzero(kept).tolist())
        found.append((segment, there))
    by_number = {segment.number: segment for segment, _ in found}
    superseded = _superseded(names)
    for number, slot in superseded:
        log.drop(by_number[number], slot)
    if superseded:
        found = [
            (s, np.array([n for n in there.tolist() if (s.number, n) not in superseded], np.int64))
            for s, there in found
        ]
    log.segments.update(by_number)
    _give_addresses(log, found)
    if found and len(found) == log.most_segments and all(s.living for s, _ in found):
        # There is nothing to empty a segment into, so one has to go.
        emptiest = min((segment for segment, _ in found), key=lambda s: s.living)
        for owner in [owner for owner in emptiest.owners if owner]:
            log.forget(owner - 1)
    for segment, _ in found:
        log.adopt(segment)


def blocks_of(index: Index, segment: Segment) -> Iterator[RecoveredBlocks]:
    """The blocks of a segment that have an address, the last slot first. Not all of one
    tenant, layout and length need fit its slots."""
    owners = np.frombuffer(segment.owners, np.uint64)
    for slots, table in index.entries(segment.number):
        there = (table["life"] == segment.life) & (slots < segment.slots)
        there[there] = owners[slots[there]] != 0
        left, addresses = table[there], owners[slots[there]] - np.uint64(1)
        while len(left):
            kinds = left[["tenant", "layout_id", "length"]]
            alike = kinds == kinds[0]
            part = left[alike]
            parents = part["parent"].tolist()
            for row in np.flatnonzero(part["parent_bytes"] == 0).tolist():
                parents[row] = b""
            tenant, layout_id, length = kinds[0].tolist()
            yield RecoveredBlocks(
                tenant.decode(errors="replace"), layout_id, length, part["stored_key"].tolist(),
                parents, part["checksum"].tolist(), addresses[alike].tolist(),
            )  # fmt: skip
            left, addresses = left[~alike], addresses[~alike]


def _give_addresses(log: Log, found: list[tuple[Segment, Slots]]) -> None:
    """Each segment is an extent, its slots the extent's. The emptiest, of which there
    may be more than extents, are divided among the others."""
    used = [(segment, slots) for segment, slots in found if len(slots)]
    homes = _homes(used, log.most_extents)
    free: dict[int, list[int]] = {}
    number = 0
    for segment, slots in used:
        if segment.number not in homes:
            continue
        number += 1
        extent = log.add_extent(number, segment.slot_bytes)
        start = number * log.extent_bytes
        np.frombuffer(extent.places, np.uint64)[slots] = pack(segment, 0) + slots
        np.frombuffer(segment.owners, np.uint64)[slots] = start + 1 + slots * segment.slot_bytes
        segment.living = len(slots)
        empty = np.flatnonzero(np.frombuffer(extent.places, np.uint64) == 0)
        free.setdefault(segment.slot_bytes, []).extend(start + empty * segment.slot_bytes)
    for segment, slots in used:
        if segment.number in homes:
            continue
        addresses = free.get(segment.slot_bytes, [])
        for slot in slots.tolist():
            if addresses:
                address = int(addresses.pop())
                extent, index = log.find(address)
                extent.places[index] = pack(segment, slot)
                segment.enter(slot, address)
            else:
                log.drop(segment, slot)


def _homes(used: list[tuple[Segment, Slots]], most: int) -> set[int]:
    """The segments that become extents: of each size of slots the fullest, as many as
    its blocks need, then the fullest of all."""
    blocks: dict[int, int] = {}
    for segment, slots in used:
        blocks[segment.slot_bytes] = blocks.get(segment.slot_bytes, 0) + len(slots)
    homes: list[int] = []
    others: list[int] = []
    for segment, _ in sorted(used, key=lambda pair: len(pair[1]), reverse=True):
        if blocks[segment.slot_bytes] > 0:
            blocks[segment.slot_bytes] -= segment.slots
            homes.append(segment.number)
        else:
            others.append(segment.number)
    return set((homes + others)[:most])


def _names(segment: Segment, slots: Slots, table: Rows) -> Rows:
    """What tells two blocks of one name apart, and which was written later."""
    names = np.empty(len(slots), _NAME)
    names["name"] = table["stored_key"]
    names["sequence"] = table["sequence"]
    names["life"] = segment.life
    names["segment"] = segment.number
    names["slot"] = slots
    return names


def _superseded(names: list[Rows]) -> set[tuple[int, int]]:
    """(segment, slot) of blocks of which a later one has the same name."""
    if not names:
        return set()
    table = np.concatenate(names)
    halves = table["name"].copy().view("<u8").reshape(-1, 2)
    # Of two copies of one block the one in the younger segment: the other was being emptied.
    order = np.lexsort((table["life"], table["sequence"], halves[:, 1], halves[:, 0]))
    table, halves = table[order], halves[order]
    earlier = np.flatnonzero((halves[:-1] == halves[1:]).all(axis=1))
    return {(int(row["segment"]), int(row["slot"])) for row in table[earlier]}
