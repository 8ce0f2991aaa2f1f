"""NVMe: blocks in preallocated files, read and written with O_DIRECT, over restarts.

*Capacity.* Extent files, the index at its largest and some small files together
never exceed `capacity_bytes`; what is left for extents is `usable_bytes`.

*Truth is in the slot.* Each slot describes itself and carries two checksums
(`nvme_slot`). A read gets exactly the block it asked for or `CorruptBlock`,
whatever the index, the disk or a crash did. The index (`nvme_index`) only says
where to look after a restart.

*Order of writes.* Slots are written at once; what the index shall say about them
waits in a batch. A batch goes in only after fdatasync of every file it names, so
the index does not, after a crash, point at data that never arrived.

*A slot used again.* `forget` puts the removal into the batch and the slot may be
overwritten before the batch is on disk. If the server dies in between, the index
names block A at a slot that holds B, half of B, or still A. Reading A there
compares the slot's header and both checksums with A's: B or half of B is
`CorruptBlock`, a miss; A is A. The index is keyed by address, so A and B can
never both claim the slot. The same holds for an extent closed and opened again
before the batch is on disk: its file is new, and what is old is not found there.

*Failure.* No room is `TierFull`. Any other error of the disk is `TierFailed`, for
good: after a failed fdatasync nobody knows what is on disk, and asking again
would be answered with a success that means nothing.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from os import fdatasync
from pathlib import Path
from typing import NoReturn

import xxhash

from kvstore.errors import (
    BadSize,
    CorruptBlock,
    DataUnusable,
    InternalError,
    TierFailed,
    TierFull,
)
from kvstore.tiers import nvme_slot
from kvstore.tiers.base import BlockHeader, Recovered
from kvstore.tiers.nvme_file import (
    ExtentFile,
    direct_io_works,
    extent_of,
    file_name,
    read_all,
    write_all,
)
from kvstore.tiers.nvme_home import DataHome, sync_directory, unusable
from kvstore.tiers.nvme_index import (
    Batch,
    Index,
    decode_layout,
    encode_layout,
    encode_record,
    map_bytes_for,
)
from kvstore.types import ALIGNMENT

_log = logging.getLogger(__name__)

BATCH_ENTRIES = 256
_BATCH_ENTRIES_MAX = 4 * BATCH_ENTRIES
"""From here on a writer waits for the batch before it instead of adding to this one."""

_SMALL_FILES_BYTES = 512 << 10
"""Kept for LOCK, VERSION, secret, LMDB's lock file and the directories."""

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE))
_MISUSE = frozenset((errno.EINVAL, errno.EBADF, errno.EFAULT))


def usable_bytes_of(capacity_bytes: int, extent_bytes: int, max_blocks: int) -> int:
    """What is left for extents of a capacity, in whole extents."""
    left = capacity_bytes - map_bytes_for(capacity_bytes, max_blocks) - _SMALL_FILES_BYTES
    return max(0, left) // extent_bytes * extent_bytes


class NvmeTier:
    """A `StorageTier` in a directory. Made by `open`."""

    def __init__(
        self, home: DataHome, index: Index, *, extent_bytes: int, usable_bytes: int, direct: bool
    ) -> None:
        self.extent_bytes = extent_bytes
        self.usable_bytes = usable_bytes
        self.direct = direct
        """False where the file system refuses O_DIRECT."""
        self.unindexed_blocks = 0
        """Blocks that are readable now but, the index being full, not after a restart."""
        self._home = home
        self._index = index
        self._files: dict[int, ExtentFile] = {}
        self._scratch = nvme_slot.ScratchPool()
        # Sequences of a later life are larger than all of an earlier one.
        self._sequence = itertools.count(index.life << 40)
        # Held through the making and removing of files, so that both never count at
        # once; `_lock` only guards the tables and is never held during I/O.
        self._changing_extents = threading.Lock()
        self._lock = threading.Lock()
        self._batch = Batch()
        self._unsynced: set[ExtentFile] = set()
        self._flushing = threading.Lock()
        self._failed: TierFailed | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        path: Path | str,
        capacity_bytes: int,
        extent_bytes: int,
        max_blocks: int,
        *,
        direct: bool = True,
    ) -> NvmeTier:
        """Open or make the tier in directory `path`.

        `max_blocks`: the most that the index must have room for. `direct=False` goes
        through the page cache even where O_DIRECT works.
        Raises `DataInUse`, `DataVersion`, `DataUnusable`.
        """
        path = Path(path).absolute()
        usable_bytes = usable_bytes_of(capacity_bytes, extent_bytes, max_blocks)
        if extent_bytes <= 0 or extent_bytes % ALIGNMENT:
            raise DataUnusable(f"an extent is a multiple of {ALIGNMENT} bytes, not {extent_bytes}")
        if not usable_bytes:
            raise DataUnusable(
                f"a capacity of {capacity_bytes} bytes has no room for one extent of "
                f"{extent_bytes}; give more capacity, or smaller extents"
            )
        with ExitStack() as undo:
            home = DataHome.open(path)
            undo.callback(home.close)
            try:
                if direct and not direct_io_works(home.extents):
                    direct = False
                    _log.warning("no O_DIRECT in %s: reads and writes are cached", path)
                map_bytes = map_bytes_for(capacity_bytes, max_blocks)
                index = Index.open(home.index, map_bytes, extent_bytes)
                undo.callback(index.close)
                tier = cls(
                    home, index, extent_bytes=extent_bytes, usable_bytes=usable_bytes, direct=direct
                )
                undo.callback(tier._close_files)
                tier._reconcile()
            except OSError as error:
                raise unusable(path, error) from error
            except (TierFull, TierFailed) as error:
                raise DataUnusable(f"data directory {path}: {error}") from error
            undo.pop_all()
        return tier

    def secret(self) -> bytes:
        """32 bytes, made when the directory was first used. Raises `DataUnusable`."""
        return self._home.secret()

    @property
    def healthy(self) -> bool:
        return self._failed is None

    def slot_bytes(self, block_bytes: int) -> int:
        return nvme_slot.slot_bytes(block_bytes)

    def open_extent(self, extent: int, slot_bytes: int) -> None:
        self._check_usable()
        with self._changing_extents:
            if extent in self._files:
                raise InternalError(f"extent {extent} is open already")
            if (len(self._files) + 1) * self.extent_bytes > self.usable_bytes:
                raise TierFull("all the capacity is in open extents")
            try:
                file = ExtentFile.create(
                    self._file(extent), self.extent_bytes, slot_bytes, direct=self.direct
                )
            except OSError as error:
                self._raise("making an extent", error)
            with self._lock:
                self._files[extent] = file
                self._batch.opened[extent] = slot_bytes

    def close_extent(self, extent: int) -> None:
        with self._changing_extents:
            with self._lock:
                file = self._files.pop(extent, None)
                if file is None:
                    raise InternalError(f"extent {extent} is not open")
                batch = self._batch
                for address in [a for a in batch.blocks if a // self.extent_bytes == extent]:
                    del batch.blocks[address]
                batch.opened.pop(extent, None)
                batch.closed.add(extent)
                self._unsynced.discard(file)
            try:
                file.remove()
            except OSError as error:
                self._raise("removing an extent", error)

    def write(self, address: int, header: BlockHeader, payload: memoryview) -> None:
        self._check_usable()
        length = header.length
        if len(payload) < length:
            raise BadSize(f"a payload of {len(payload)} bytes for a block of {length}")
        file, offset = self._locate(address, length)
        if self._index.room <= len(self._batch.blocks):
            self._flush()  # The batch may hold removals.
            if not self._index.room:
                raise TierFull("the index is full")
        sequence = next(self._sequence)
        with self._scratch.take() as scratch:
            nvme_slot.encode_header(scratch.header, header, sequence)
            scratch.fill_tail(payload, length)
            try:
                with file.held() as fd:
                    write_all(fd, scratch.buffers(payload, length), offset)
            except OSError as error:
                self._raise("writing", error)
        with self._lock:
            self._batch.blocks[address] = encode_record(header, sequence)
            self._unsynced.add(file)
        self._flush_if_due()

    def read(self, address: int, header: BlockHeader, into: memoryview) -> None:
        self._check_usable()
        length = header.length
        if len(into) < length:
            raise BadSize(f"room of {len(into)} bytes for a block of {length}")
        file, offset = self._locate(address, length)
        with self._scratch.take() as scratch:
            try:
                with file.held() as fd:
                    whole = read_all(fd, scratch.buffers(into, length), offset)
            except OSError as error:
                self._raise("reading", error)
            if not whole:
                raise CorruptBlock("the file ends before the block does")
            nvme_slot.check_header(scratch.header, header)
            scratch.take_tail(into, length)
        if xxhash.xxh3_64_intdigest(into[:length]) != header.checksum:
            raise CorruptBlock("the payload fails its checksum")

    def forget(self, address: int, header: BlockHeader) -> None:
        with self._lock:
            self._batch.blocks[address] = None
        # A failure is raised by the next write or sync; here nothing is lost by it.
        with suppress(TierFailed):
            self._flush_if_due()

    def sync(self) -> None:
        self._check_usable()
        self._flush()
        try:
            self._index.sync()
        except TierFailed as error:
            self._failed = error
            raise

    def remember_layout(self, tenant: str, layout_id: bytes, spec: dict[str, object]) -> None:
        key, value = encode_layout(tenant, layout_id, spec)
        with self._lock:
            self._batch.layouts[key] = value

    def recovered_layouts(self) -> Iterable[tuple[str, dict[str, object]]]:
        return [decode_layout(value) for value in self._index.layouts()]

    def recovered_extents(self) -> Iterable[tuple[int, int]]:
        return list(self._index.extents().items())

    def recovered_blocks(self) -> Iterable[Recovered]:
        """As the contract says; entries that cannot be right are forgotten instead."""
        for address, header in self._index.records():
            file = self._files.get(address // self.extent_bytes)
            offset = address % self.extent_bytes
            if (
                file is not None
                and offset % ALIGNMENT == 0
                and nvme_slot.slot_bytes(header.length) <= file.slot_bytes
                and offset + file.slot_bytes <= self.extent_bytes
            ):
                yield Recovered(header, address)
            else:
                self.forget(address, header)

    def close(self) -> None:
        if self._closed:
            return
        try:
            if self._failed is None:
                self.sync()
        except TierFailed as error:
            _log.error("the last blocks were not made durable: %s", error)
        finally:
            self._closed = True
            self._close_files()
            self._index.close()
            self._home.close()

    def check_integrity(self) -> None:
        """Raise `InternalError` if files and table differ, or exceed the capacity."""
        with self._lock:
            on_disk = {extent_of(file.name) for file in self._home.extents.iterdir()}
            if on_disk != set(self._files):
                raise InternalError("the files on disk are not the open extents")
            if len(self._files) * self.extent_bytes > self.usable_bytes:
                raise InternalError("more extents are open than the capacity allows")
            if any(a // self.extent_bytes not in self._files for a in self._batch.blocks):
                raise InternalError("a pending entry names an extent that is not open")

    def _locate(self, address: int, length: int) -> tuple[ExtentFile, int]:
        extent, offset = divmod(address, self.extent_bytes)
        file = self._files.get(extent)
        if file is None:
            raise InternalError(f"extent {extent} is not open")
        if offset % ALIGNMENT or offset + file.slot_bytes > self.extent_bytes:
            raise InternalError("not the address of a slot")
        if nvme_slot.slot_bytes(length) > file.slot_bytes:
            raise InternalError("the block is larger than the extent's slots")
        return file, offset

    def _flush_if_due(self) -> None:
        pending = len(self._batch)
        if pending >= BATCH_ENTRIES:
            self._flush(wait=pending >= _BATCH_ENTRIES_MAX)

    def _flush(self, *, wait: bool = True) -> None:
        """Put the batch into the index, its data first. Raises `TierFailed`."""
        if not self._flushing.acquire(blocking=wait):
            return
        try:
            with self._lock:
                batch, self._batch = self._batch, Batch()
                files, self._unsynced = self._unsynced, set()
            if not len(batch):
                return
            self._check_usable()
            self._sync_data(files, names=bool(batch.opened or batch.closed))
            self._apply(batch)
        except TierFailed as error:
            self._failed = error
            raise
        finally:
            self._flushing.release()

    def _sync_data(self, files: Iterable[ExtentFile], *, names: bool) -> None:
        try:
            for file in files:
                try:
                    with file.held() as fd:
                        fdatasync(fd)
                except OSError as error:
                    if error.errno != errno.EBADF:  # Closed meanwhile, its blocks with it.
                        raise
            if names:
                sync_directory(self._home.extents)
        except OSError as error:
            raise TierFailed(f"syncing failed: {error.strerror}", error.errno or 0) from error

    def _apply(self, batch: Batch) -> None:
        """Put it into the index, or as much as goes in: what the index then says
        wrongly costs misses after a restart, and nothing else."""
        try:
            self._index.apply(batch)
            return
        except TierFull as error:
            lost = sum(record is not None for record in batch.blocks.values())
            self.unindexed_blocks += lost
            _log.warning("%s: %d blocks will not survive a restart", error, lost)
        try:
            self._index.apply(batch.without_new_blocks())
        except TierFull as error:
            _log.warning("%s: removals will be found out as misses after a restart", error)

    def _reconcile(self) -> None:
        """Make files and index agree, and both fit the capacity."""
        known = self._index.extents()
        most = self.usable_bytes // self.extent_bytes
        batch = Batch()
        for extent, slot_bytes in known.items():
            file = self._file(extent)
            whole = file.is_file() and file.stat().st_size == self.extent_bytes
            if whole and len(self._files) < most:
                self._files[extent] = ExtentFile.reopen(file, slot_bytes, direct=self.direct)
            else:
                batch.closed.add(extent)
        for file in self._home.extents.iterdir():
            if extent_of(file.name) not in self._files:
                file.unlink()
        if batch.closed:
            _log.warning("%d extents were dropped at start", len(batch.closed))
            self._index.apply(batch)

    def _file(self, extent: int) -> Path:
        return self._home.extents / file_name(extent)

    def _close_files(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise TierFailed(str(self._failed), self._failed.errno)
        if self._closed:
            raise TierFailed("the tier is closed")

    def _raise(self, doing: str, error: OSError) -> NoReturn:
        code = error.errno or 0
        what = f"{doing} failed: {error.strerror}"
        if code in _FULL:
            raise TierFull(what) from error
        if code in _MISUSE:
            raise InternalError(f"{what}; is the memory aligned to {ALIGNMENT}?") from error
        self._failed = TierFailed(what, code)
        raise self._failed from error
