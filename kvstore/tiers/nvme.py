"""NVMe: blocks in an append-only log of preallocated segments, over restarts.

*Capacity.* Segments, the index at its largest and some small files together never
exceed `capacity_bytes`; what is left for extents is `usable_bytes`. The log keeps a
sixteenth of the segments to work with (`nvme_log`).

*Truth is in the slot.* Each slot says which block it holds, where it is and in which
life of its segment it was written, under two checksums (`nvme_slot`). A read gets
exactly the block it asked for or `CorruptBlock`, whatever the index, the disk or a
crash did. What fails is not read or written again: its place is marked bad.

*Order of writes.* A slot is written at once. What shall be known of it after a
restart waits in a batch, and a flush makes that durable in this order: the slots and
the summaries of their segments, with fdatasync; then summaries that give up what was
appended again elsewhere; then the index, which so never points at data that did not
arrive; then segments that were emptied may be used again.

*After a crash* the index is behind at most. What it does not tell of is read from
the segments' headers (`nvme_recovery`); what was forgotten and synced is marked in
the summaries and stays forgotten, with a stale index or none.

*Failure.* No room is `TierFull`. Any other error of the disk is `TierFailed`, for
good: after a failed fdatasync nobody knows what is on disk, and asking again
would be answered with a success that means nothing.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import xxhash

from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import (
    BadSize,
    CorruptBlock,
    DataUnusable,
    DeviceError,
    InternalError,
    TierFailed,
    TierFull,
)
from kvstore.tiers import nvme_recovery, nvme_slot
from kvstore.tiers.base import BlockHeader, Fill, RecoveredBlocks
from kvstore.tiers.nvme_calls import DATA_NS, UPKEEP_NS, Calls, WatchedDisk
from kvstore.tiers.nvme_disk import FULL, Directory, Disk, direct_io_works, read_all, write_all
from kvstore.tiers.nvme_home import SMALL_FILES_BYTES, DataHome, unusable
from kvstore.tiers.nvme_index import DAMAGED, Batch, Index, map_bytes_for, start_over
from kvstore.tiers.nvme_log import Log, spare_segments
from kvstore.tiers.nvme_segment import Geometry, Segment, numbers_of
from kvstore.tiers.nvme_slot import Place
from kvstore.types import ALIGNMENT, align_up

_log = logging.getLogger(__name__)

BATCH_ENTRIES = 256
_BATCH_ENTRIES_MAX = 4 * BATCH_ENTRIES
"""From here on a writer waits for the batch before it instead of adding to this one."""

_MISUSE = frozenset((errno.EINVAL, errno.EBADF, errno.EFAULT))


def segments_of(capacity_bytes: int, extent_bytes: int, max_blocks: int) -> int:
    """How many segments a capacity has room for."""
    left = capacity_bytes - map_bytes_for(capacity_bytes, max_blocks) - SMALL_FILES_BYTES
    return max(0, left) // Geometry(extent_bytes).file_bytes


def usable_bytes_of(capacity_bytes: int, extent_bytes: int, max_blocks: int) -> int:
    """What is left for extents of a capacity, in whole extents."""
    segments = segments_of(capacity_bytes, extent_bytes, max_blocks)
    return max(0, segments - spare_segments(segments)) * extent_bytes


class NvmeTier:
    """A `StorageTier` in a directory. Made by `open`."""

    def __init__(
        self,
        home: DataHome,
        disk: Disk,
        open_index: Callable[[], Index],
        calls: Calls,
        *,
        extent_bytes: int,
        most_segments: int,
        direct: bool,
    ) -> None:
        """Recovers what is there. Raises `DataError`, `TierError`, OSError; then all
        but `home` is closed."""
        self.extent_bytes = extent_bytes
        self.usable_bytes = (most_segments - spare_segments(most_segments)) * extent_bytes
        self.direct = direct
        """False where the file system refuses O_DIRECT."""
        self._home = home
        self._disk = WatchedDisk(disk, calls)
        self._calls = calls
        self._geometry = Geometry(extent_bytes)
        self._most_segments = most_segments
        self._scratch = nvme_slot.ScratchPool()
        self._summary = nvme_slot.aligned(self._geometry.summary_bytes)
        self._noted_bytes = 0
        # Segment -> its life of which the index could not be told all.
        self._untold: dict[int, int] = {}
        self._remembering = threading.Lock()
        self._flushing = threading.Lock()
        self._failed: TierFailed | None = None
        self._closed = False
        self._layouts = home.read_layouts()
        try:
            self._index, self._log = self._take_over(open_index)
        except (*DAMAGED, TierFailed) as error:
            start_over(home.index, f"the index is damaged ({error})")
            self._index, self._log = self._take_over(open_index)

    @classmethod
    def open(
        cls,
        path: Path | str,
        capacity_bytes: int,
        extent_bytes: int,
        max_blocks: int,
        *,
        direct: bool = True,
        disk: Disk | None = None,
        behind: Callable[[Disk], Disk] | None = None,
        open_index: Callable[[Path, int], Index] = Index.open,
        clock: Clock | None = None,
    ) -> NvmeTier:
        """Open or make the tier in directory `path`.

        `max_blocks`: the most that the index must have room for. `direct=False` goes
        through the page cache even where O_DIRECT works. `disk` holds the segments
        instead of the directory; `behind` puts it behind another. `clock`: for `overdue`.
        Raises `DataInUse`, `DataVersion`, `DataUnusable`.
        """
        path = Path(path).absolute()
        if extent_bytes <= 0 or extent_bytes % ALIGNMENT:
            raise DataUnusable(f"an extent is a multiple of {ALIGNMENT} bytes, not {extent_bytes}")
        if not usable_bytes_of(capacity_bytes, extent_bytes, max_blocks):
            raise DataUnusable(
                f"a capacity of {capacity_bytes} bytes has no room for extents of "
                f"{extent_bytes}; give more capacity, or smaller extents"
            )
        with ExitStack() as undo:
            home = DataHome.open(path)
            undo.callback(home.close)
            try:
                if disk is None:
                    if direct and not direct_io_works(home.segments):
                        direct = False
                        _log.warning("no O_DIRECT in %s: reads and writes are cached", path)
                    disk = Directory(home.segments, direct=direct)
                if behind is not None:
                    disk = behind(disk)
                tier = cls(
                    home,
                    disk,
                    partial(open_index, home.index, map_bytes_for(capacity_bytes, max_blocks)),
                    Calls(clock or MonotonicClock()),
                    extent_bytes=extent_bytes,
                    most_segments=segments_of(capacity_bytes, extent_bytes, max_blocks),
                    direct=direct,
                )
            except OSError as error:
                raise unusable(path, error) from error
            except (TierFull, TierFailed) as error:
                raise DataUnusable(f"data directory {path}: {error}") from error
            undo.pop_all()
        return tier

    def _take_over(self, open_index: Callable[[], Index]) -> tuple[Index, Log]:
        with ExitStack() as undo:
            index = open_index()
            undo.callback(index.close)
            segments = nvme_recovery.open_segments(self._disk, self._geometry, self._most_segments)
            for segment in segments:
                undo.callback(segment.file.close)
            life = nvme_recovery.next_life(index, segments)
            log = Log(
                self._disk,
                self._geometry,
                most_segments=self._most_segments,
                first_sequence=nvme_recovery.first_sequence(life),
                flush=self._flush,
            )
            clean = index.clean and index.life == life - 1
            known = index.segments()
            try:
                found = nvme_recovery.tell_index(index, segments, known, clean=clean)
                if found:
                    _log.info("%d blocks were found that the index did not tell of", found)
            except TierFull as error:
                _log.warning("%s: some of what is stored is not found", error)
            nvme_recovery.find_blocks(index, log, segments, known if clean else {})
            with suppress(TierFull):
                index.begin_life(life)
            undo.pop_all()
        return index, log

    def secret(self) -> bytes:
        """32 bytes, made when the directory was first used. Raises `DataUnusable`."""
        return self._home.secret()

    @property
    def healthy(self) -> bool:
        return self._failed is None

    def wear(self) -> dict[str, int]:
        """Bytes written to the segments since the start: because the store asked for
        it, to win segments, and for summaries."""
        return {
            "store": self._log.stored_bytes,
            "move": self._log.moved_bytes,
            "note": self._noted_bytes,
        }

    def overdue(self) -> bool:
        return self._calls.overdue()

    def ask_before_moving(self, not_worth_moving: Callable[[list[int]], Iterable[int]]) -> None:
        self._log.not_worth_moving = not_worth_moving

    def slot_bytes(self, block_bytes: int) -> int:
        return nvme_slot.slot_bytes(block_bytes)

    def open_extent(self, extent: int, slot_bytes: int) -> None:
        self._check_usable()
        try:
            self._log.open_extent(extent, slot_bytes)
        except OSError as error:
            self._raise("making a segment", error)

    def close_extent(self, extent: int) -> None:
        self._log.close_extent(extent)

    def write(self, address: int, header: BlockHeader, payload: memoryview) -> None:
        self._check_usable()
        if len(payload) < header.length:
            raise BadSize(f"a payload of {len(payload)} bytes for a block of {header.length}")
        if self._index.room <= self._log.pending_blocks:
            self._flush()  # The batch may hold removals.
            if not self._index.room:
                raise TierFull("the index is full")
        with self._scratch.take() as scratch:
            try:
                self._log.write(address, header, payload, scratch)
            except OSError as error:
                self._raise("writing", error)
        self._flush_if_due()

    def read(self, address: int, header: BlockHeader, into: memoryview) -> None:
        self._check_usable()
        if len(into) < header.length:
            raise BadSize(f"room of {len(into)} bytes for a block of {header.length}")
        self._find(address, lambda segment, place: self._read(segment, place, header, into))

    def read_straight(self, address: int, header: BlockHeader, fill: Fill) -> None:
        self._check_usable()
        self._find(
            address, lambda segment, place: self._read_straight(segment, place, header, fill)
        )

    def _find(self, address: int, read: Callable[[Segment, Place], bool]) -> None:
        """`read` the block where it lies, and lies by then. It answers False where another is,
        and raises `CorruptBlock` where none is. Raises `CorruptBlock`, `TierFailed`."""
        where = self._log.where(address)
        while where is not None:
            damage: CorruptBlock | None = None
            try:
                if read(*where):
                    return
            except CorruptBlock as error:
                damage = error
            except OSError as error:
                self._raise("reading", error, full=False)
            # It may have been appended again meanwhile, and another be there now.
            before, where = where, self._log.where(address)
            if where == before:
                if damage is None:
                    raise CorruptBlock("another block is stored there")
                _, place = before
                _log.error(
                    "a block is damaged and dropped: %s (slot %d of segment %d)",
                    damage, place.slot, place.segment,
                )  # fmt: skip
                self._log.lose(address, place)
                raise damage
        raise CorruptBlock("no block was written there")

    def _read(self, segment: Segment, place: Place, header: BlockHeader, into: memoryview) -> bool:
        """False when another block is there. Raises `CorruptBlock` when none is."""
        length = header.length
        with self._scratch.take() as scratch:
            buffers = scratch.buffers(into, length)
            if not read_all(segment.file, buffers, segment.offset(place.slot)):
                raise CorruptBlock("the file ends before the block does")
            if nvme_slot.decode_header_at(scratch.header, place).header != header:
                return False
            scratch.take_tail(into, length)
        if xxhash.xxh3_64_intdigest(into[:length]) != header.checksum:
            raise CorruptBlock("the payload fails its checksum")
        return True

    def _read_straight(
        self, segment: Segment, place: Place, header: BlockHeader, fill: Fill
    ) -> bool:
        """As `_read`. A payload that is not right may be the fault of what filled: no block is
        given up before the processor has looked."""
        begin = segment.offset(place.slot)
        with self._scratch.take() as scratch:
            if not read_all(segment.file, [scratch.header], begin):
                raise CorruptBlock("the file ends before the block does")
            if nvme_slot.decode_header_at(scratch.header, place).header != header:
                return False
        with self._calls.under_way(DATA_NS):
            filled = fill(segment.file, begin + nvme_slot.HEADER_BYTES, header.length)
        if filled == header.checksum:
            return True
        if not self._read(segment, place, header, nvme_slot.aligned(align_up(header.length))):
            return False
        raise DeviceError("what was read straight is not what the drive holds")

    def forget(self, address: int, header: BlockHeader) -> None:
        self._log.forget(address)
        # A failure is raised by the next write or sync; here nothing is lost by it.
        with suppress(TierFailed):
            self._flush_if_due()

    def sync(self) -> None:
        self._check_usable()
        self._flush()
        try:
            with self._calls.under_way(UPKEEP_NS):
                self._index.sync()
        except TierFailed as error:
            self._failed = error
            raise

    def remember_layout(self, tenant: str, layout_id: bytes, spec: dict[str, object]) -> None:
        # Whoever waits for another's layout waits for the drive too.
        with self._calls.under_way(UPKEEP_NS), self._remembering:
            if self._layouts.get((tenant, layout_id)) == spec:
                return
            layouts = {**self._layouts, (tenant, layout_id): spec}
            try:
                self._home.write_layouts(layouts)
            except OSError as error:
                self._raise("keeping a layout", error)
            self._layouts = layouts

    def recovered_layouts(self) -> Iterable[tuple[str, dict[str, object]]]:
        return [(tenant, spec) for (tenant, _), spec in self._layouts.items()]

    def recovered_extents(self) -> Iterable[tuple[int, int]]:
        return [(number, extent.slot_bytes) for number, extent in self._log.extents.items()]

    def recovered_blocks(self) -> Iterable[RecoveredBlocks]:
        """As the contract says; entries that cannot be right are forgotten instead."""
        for segment in sorted(self._log.segments.values(), key=lambda s: s.life, reverse=True):
            if not segment.living:
                continue
            for blocks in nvme_recovery.blocks_of(self._index, segment):
                if nvme_slot.slot_bytes(blocks.length) <= segment.slot_bytes:
                    yield blocks
                    continue
                for address in blocks.addresses:
                    self._log.forget(address)

    def close(self) -> None:
        if self._closed:
            return
        try:
            if self._failed is None:
                self.sync()
                if not self._untold:
                    self._index.end_life()
                    self._index.sync()
                    self._index.vouch()
        except (OSError, TierFull, TierFailed) as error:
            _log.error("the index was not closed cleanly: %s", error)
        finally:
            self._closed = True
            self._log.close()
            self._index.close()
            self._home.close()

    def check_integrity(self) -> None:
        """Raise `InternalError` if tables or files differ, or exceed the capacity."""
        self._log.check_integrity()
        if set(numbers_of(self._disk)) != set(self._log.segments):
            raise InternalError("the files on disk are not the segments")

    # Flushing

    def _flush_if_due(self) -> None:
        pending = self._log.pending
        if pending >= BATCH_ENTRIES:
            self._flush(wait=pending >= _BATCH_ENTRIES_MAX)

    def _flush(self, *, wait: bool = True) -> None:
        """Make durable what was done so far. Raises `TierFailed`."""
        if not self._flushing.acquire(blocking=wait):
            return
        try:
            self._check_usable()
            todo = self._log.take_flushed()
            try:
                self._write_summaries(todo.summaries)
                for segment, _, _ in todo.segments:
                    segment.file.fdatasync()
                if todo.names:
                    self._disk.sync_names()
                self._write_summaries(todo.later)
                for segment, _, _ in todo.later:
                    segment.file.fdatasync()
            except OSError as error:
                # A full disk too: what is preallocated does not run out of room.
                raise TierFailed(f"syncing failed: {error.strerror}", error.errno or 0) from error
            with self._calls.under_way(UPKEEP_NS):
                self._tell_index(todo.batch)
            self._log.flushed(todo)
        except TierFailed as error:
            self._failed = error
            raise
        finally:
            self._flushing.release()

    def _write_summaries(self, summaries: list[tuple[Segment, bytes, int]]) -> None:
        for segment, summary, offset in summaries:
            self._summary[:] = summary
            write_all(segment.file, [self._summary], offset)
            self._noted_bytes += len(summary)

    def _tell_index(self, batch: Batch) -> None:
        """Put it into the index, or as much as goes in. Of which segments it then
        does not tell all, a start after this reads the headers."""
        for number, (life, _) in list(batch.segments.items()):
            if self._untold.get(number) == life:
                del batch.segments[number]
            else:
                self._untold.pop(number, None)  # It began anew.
        if not len(batch):
            return
        try:
            self._index.apply(batch)
            return
        except TierFull as error:
            _log.warning("%s: the next start will take longer", error)
            self._untold |= {number: life for number, (life, _) in batch.segments.items()}
        with suppress(TierFull):
            self._index.apply(batch.without_new_blocks())

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise TierFailed(str(self._failed), self._failed.errno)
        if self._closed:
            raise TierFailed("the tier is closed")

    def _raise(self, doing: str, error: OSError, *, full: bool = True) -> NoReturn:
        code = error.errno or 0
        what = f"{doing} failed: {error.strerror}"
        if full and code in FULL:
            raise TierFull(what) from error
        if code in _MISUSE:
            raise InternalError(f"{what}; is the memory aligned to {ALIGNMENT}?") from error
        self._failed = TierFailed(what, code)
        raise self._failed from error
