"""Which slot holds which block: an LMDB environment, needed only at start.

While the server runs, the log knows every place and each slot proves itself when it
is read; nothing is looked up here. So changes are collected in a `Batch` and applied
together, all or none, once the slots they name are on disk.

    meta      b"life" -> u64, b"clean" -> b"" while nobody has it open
    segments  segment (u32, big-endian) -> its life (u64), slots told of (u32)
    blocks    segment, slot (u32, big-endian) -> record

Keyed by place, `blocks` cannot name a slot twice. Big-endian keys keep a segment's
blocks together, in order.

It only saves reading every slot's header at the start. What it does not tell of is
found in the segments, and what it tells wrongly does not get past the slots'
headers. So where it is lost, damaged or from an older time, nothing else is.

LMDB is pinned to its 0.9 format, which 1.0 cannot read. `metasync=False` may
lose the last commit when the machine crashes, but never damages the index.
"""

from __future__ import annotations

import errno
import logging
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.errors import DataUnusable, DataVersion, TierFailed, TierFull
from kvstore.tiers import nvme_probe
from kvstore.tiers.nvme_slot import MIN_SLOT_BYTES, Stored, tenant_bytes

_log = logging.getLogger(__name__)

_LMDB_MAJOR = 0
_MIN_MAP_BYTES = 4 << 20
_SLACK_BYTES = 2 << 20
"""A commit writes new pages before it frees old ones, so some room stays out."""
_ENTRY_BYTES = 256
"""Room for a block: a record of 81 bytes and a tenant's name of at most 64, its key and
node header, in pages two thirds full. Measured: 170 to 256, by the length of the name."""

_PLACE = struct.Struct(">II")
_NUMBER = struct.Struct(">I")
_U64 = struct.Struct("<Q")
_SEGMENT = struct.Struct("<QI")
_RECORD = struct.Struct("<QQB16s16s16sQQ")
"""Life of the segment, sequence, bytes of the parent, stored key, parent, layout id, length,
checksum; then the tenant's name."""
_CHUNK = 64

_DATA = "data.mdb"
_SUM = "data.sum"
_FILES = (_DATA, "lock.mdb", _SUM)
_SUM_PART_BYTES = 4 << 20
_PROBE_S = 120.0

DAMAGED = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    struct.error,
)


def map_bytes_for(capacity_bytes: int, max_blocks: int) -> int:
    """What the index may take of a tier's capacity: enough to name a block in every
    slot there can be."""
    slots = min(max_blocks, capacity_bytes // MIN_SLOT_BYTES)
    wanted = max(_MIN_MAP_BYTES, _SLACK_BYTES + slots * _ENTRY_BYTES)
    return min(wanted, capacity_bytes // 4) // 4096 * 4096


def encode_record(stored: Stored) -> bytes:
    header = stored.header
    return (
        _RECORD.pack(
            stored.place.life, stored.sequence, len(header.parent), header.stored_key,
            header.parent, header.layout_id, header.length, header.checksum,
        )
        + tenant_bytes(header.tenant)
    )  # fmt: skip


class Entries(NamedTuple):
    """What the index tells of blocks of a segment: columns, a row a block. `table` has
    life, sequence, parent_bytes, stored_key, parent, layout_id, length, checksum, tenant."""

    slots: npt.NDArray[np.int64]
    table: npt.NDArray[np.void]


def _table(records: Sequence[bytes], size: int) -> npt.NDArray[np.void]:
    """Records that are all of this size, without a copy of each."""
    columns = [
        ("life", "<u8"), ("sequence", "<u8"), ("parent_bytes", "u1"), ("stored_key", "V16"),
        ("parent", "V16"), ("layout_id", "V16"), ("length", "<u8"), ("checksum", "<u8"),
        ("tenant", f"V{size - _RECORD.size}"),
    ]  # fmt: skip
    return np.frombuffer(b"".join(records), np.dtype(columns))


@dataclass(slots=True)
class Batch:
    """Changes not yet in the index; the last word on each slot and segment.

    `blocks`: (segment, slot) -> record, or None to remove it. `segments`: number ->
    (life, slots below which the index then tells all).
    """

    blocks: dict[tuple[int, int], bytes | None] = field(default_factory=dict)
    segments: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.blocks) + len(self.segments)

    def without_new_blocks(self) -> Batch:
        """The same, adding no block: a start finds those in their segments."""
        return Batch(blocks=dict.fromkeys(self.blocks))


class Index:
    """An open index. One thread at a time applies batches; reads are for start."""

    def __init__(self, env: lmdb.Environment, map_bytes: int) -> None:
        self._env = env
        self._meta = env.open_db(b"meta")
        self._segments = env.open_db(b"segments")
        self._blocks = env.open_db(b"blocks")
        slack = min(_SLACK_BYTES, map_bytes // 2)
        self._max_blocks = (map_bytes - slack) // _ENTRY_BYTES
        with env.begin() as txn:
            self.blocks = txn.stat(self._blocks)["entries"]
            found = txn.get(b"life", db=self._meta)
            self.life = _U64.unpack(found)[0] if found else 0
            """How often the directory was opened before, as far as it is known here."""
            self.clean = txn.get(b"clean", db=self._meta) is not None
            """Nothing happened since it was last told all."""

    @classmethod
    def open(cls, path: Path, map_bytes: int) -> Index:
        """The index in directory `path`, emptied where it cannot be used: it can be
        made again, but must neither exceed its capacity nor keep a server from
        starting. Raises `DataVersion`, `DataUnusable`."""
        if not sound(path) and is_there(path):
            start_over(path, "the index is damaged")
        return cls.open_trusted(path, map_bytes)

    @classmethod
    def open_trusted(cls, path: Path, map_bytes: int) -> Index:
        """The same, of an index that does not harm who reads it."""
        (path / _SUM).unlink(missing_ok=True)
        data = path / _DATA
        if data.exists() and data.stat().st_size > map_bytes:
            start_over(path, "the index is larger than the capacity now allows")
        try:
            return cls._open(path, map_bytes)
        except DAMAGED as error:
            start_over(path, f"the index is damaged ({error})")
        except lmdb.VersionMismatchError as error:
            raise DataVersion(f"{path} is of another version: {error}") from error
        except lmdb.Error as error:
            raise DataUnusable(f"{path} cannot be opened: {error}") from error
        try:
            return cls._open(path, map_bytes)
        except lmdb.Error as error:
            raise DataUnusable(f"{path} cannot be opened: {error}") from error

    @classmethod
    def _open(cls, path: Path, map_bytes: int) -> Index:
        env = lmdb.open(
            str(path), map_size=map_bytes, max_dbs=3, metasync=False, mode=0o600,
            lib_version=_LMDB_MAJOR,
        )  # fmt: skip
        try:
            env.reader_check()
            return cls(env, map_bytes)
        except (lmdb.Error, struct.error):
            env.close()
            raise

    def begin_life(self, life: int) -> None:
        """Note that it is not clean any more, before anything changes. Raises
        `TierFull`, `TierFailed`."""
        self.life = life
        with self._writing() as txn:
            txn.put(b"life", _U64.pack(life), db=self._meta)
            txn.delete(b"clean", db=self._meta)
        self.clean = False
        self.sync()

    def end_life(self) -> None:
        """All that is in the segments is told. Raises `TierFull`, `TierFailed`."""
        with self._writing() as txn:
            txn.put(b"clean", b"", db=self._meta)

    @property
    def room(self) -> int:
        """How many more blocks it can name. Does not block."""
        return max(0, self._max_blocks - self.blocks)

    def apply(self, batch: Batch) -> None:
        """Apply it, or raise `TierFull`, `TierFailed` and change nothing."""
        with self._writing() as txn:
            for number, told in batch.segments.items():
                txn.put(_NUMBER.pack(number), _SEGMENT.pack(*told), db=self._segments)
            for place, record in batch.blocks.items():
                if record is None:
                    txn.delete(_PLACE.pack(*place), db=self._blocks)
                else:
                    txn.put(_PLACE.pack(*place), record, db=self._blocks)
            blocks = txn.stat(self._blocks)["entries"]
        self.blocks = blocks

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction[bytes]]:
        try:
            with self._env.begin(write=True) as txn:
                yield txn
        except lmdb.MapFullError as error:
            # The estimate of an entry's size was too small here: believe the fact.
            self._max_blocks = min(self._max_blocks, self.blocks)
            raise TierFull("the index is full") from error
        except lmdb.Error as error:
            if error.code in (errno.ENOSPC, errno.EDQUOT):
                raise TierFull("the disk has no room for the index") from error
            raise TierFailed(f"the index failed: {error}", error.code) from error

    def sync(self) -> None:
        """Raises `TierFailed`."""
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise TierFailed(f"the index failed: {error}", error.code) from error

    def vouch(self) -> None:
        """Note what its file is, to know at the next start that it still is. Nothing
        is applied afterwards. Raises OSError."""
        path = Path(self._env.path())
        (path / _SUM).touch(mode=0o600)
        (path / _SUM).write_bytes(_sum_of(path / _DATA))

    def close(self) -> None:
        self._env.close()

    def segments(self) -> dict[int, tuple[int, int]]:
        """number -> (life, slots below which all is told)"""
        with self._env.begin() as txn, txn.cursor(self._segments) as cursor:
            return {_NUMBER.unpack(key)[0]: _SEGMENT.unpack(value) for key, value in cursor}

    def drop_segment(self, number: int) -> None:
        """Forget a segment and all in it. Raises `TierFull`, `TierFailed`."""
        with self._writing() as txn:
            txn.delete(_NUMBER.pack(number), db=self._segments)
            end = _PLACE.pack(number + 1, 0)
            with txn.cursor(self._blocks) as cursor:
                found = cursor.set_range(_PLACE.pack(number, 0))
                while found and cursor.key() < end:
                    found = cursor.delete()

    def entries(self, segment: int) -> list[Entries]:
        """All it tells of a segment, the last slot first: blocks are mostly written after
        their children, so this mostly tells of a parent first."""
        first, end = _PLACE.pack(segment, 0), _PLACE.pack(segment + 1, 0)
        rows: list[tuple[bytes, bytes]] = []
        with self._env.begin() as txn, txn.cursor(self._blocks) as cursor:
            found = cursor.prev() if cursor.set_range(end) else cursor.last()
            backwards = cursor.iterprev() if found else iter(())
            # Parts as large as all before them: little of another segment is read.
            while chunk := list(islice(backwards, max(_CHUNK, len(rows)))):
                rows += chunk
                if chunk[-1][0] < first:
                    break
        while rows and rows[-1][0] < first:
            rows.pop()
        if not rows:
            return []
        keys, records = zip(*rows, strict=True)
        slots = np.frombuffer(b"".join(keys), ">u4")[1::2].astype(np.int64)
        parts = {size: np.ones(len(records), bool) for size in set(map(len, records))}
        if len(parts) > 1:
            lengths = np.fromiter(map(len, records), np.int64, len(records))
            parts = {size: lengths == size for size in sorted(parts)}
        return [
            Entries(slots[rows], _table(list(compress(records, rows.tolist())), size))
            for size, rows in parts.items()
            if size >= _RECORD.size
        ]


def is_there(path: Path) -> bool:
    """Whether there is an index in the directory, or what is left of one."""
    return any((path / name).exists() for name in _FILES)


def sound(path: Path) -> bool:
    """Whether there is an index in the directory that can be read."""
    return _vouched_for(path) or ((path / _DATA).exists() and _readable(path))


def _vouched_for(path: Path) -> bool:
    noted, data = path / _SUM, path / _DATA
    try:
        return noted.exists() and data.exists() and noted.read_bytes() == _sum_of(data)
    except OSError as error:
        _log.warning("the index cannot be read: %s", error)
        return False


def _sum_of(data: Path) -> bytes:
    with data.open("rb") as stream:
        digest = xxhash.xxh3_128()
        while part := stream.read(_SUM_PART_BYTES):
            digest.update(part)
    return digest.hexdigest().encode()


def _readable(path: Path) -> bool:
    """Whether a process that reads it survives."""
    command = [sys.executable, "-I", nvme_probe.__file__, str(path)]
    try:
        probe = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if probe.returncode:
        _log.warning("the index cannot be read: %s", probe.stderr.decode(errors="replace").strip())
    return probe.returncode == 0


def start_over(directory: Path, why: str) -> None:
    """Remove an index. The directory stays: it may be a disk of its own."""
    _log.warning("%s: it is made again from the segments", why)
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)
