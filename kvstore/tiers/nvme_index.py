"""Which slot holds which block: an LMDB environment, needed only at start.

While the server runs, the catalog knows every address and each slot proves
itself when it is read; nothing is looked up here. So changes are collected in a
`Batch` and applied together, all or none, once the slots they name are on disk.

    meta      b"extent_bytes" -> u64, b"life" -> u64
    extents   extent (u64, big-endian) -> slot_bytes (u64)
    blocks    address (u64, big-endian) -> record
    layouts   layout_id + tenant -> JSON

Keyed by address, `blocks` cannot name a slot twice. Big-endian keys keep an
extent's blocks together, in order.

LMDB is pinned to its 0.9 format, which 1.0 cannot read. `metasync=False` may
lose the last commit when the machine crashes, but never damages the index.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import lmdb

from kvstore.errors import DataUnusable, DataVersion, TierFailed, TierFull
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme_slot import MIN_SLOT_BYTES, tenant_bytes

_log = logging.getLogger(__name__)

_LMDB_MAJOR = 0
_MIN_MAP_BYTES = 4 << 20
_SLACK_BYTES = 2 << 20
"""A commit writes new pages before it frees old ones, so some room stays out."""
_ENTRY_BYTES = 256
"""Room for a block: a record of 73 bytes and a tenant's name of at most 64, its key and
node header, in pages two thirds full. Measured: 170 to 256, by the length of the name."""

_ADDRESS = struct.Struct(">Q")
_U64 = struct.Struct("<Q")
_RECORD = struct.Struct("<B16s16s16sQQQ")
_CHUNK = 4096

_DAMAGED = (
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


def encode_record(header: BlockHeader, sequence: int) -> bytes:
    return (
        _RECORD.pack(
            len(header.parent), header.stored_key, header.parent, header.layout_id,
            header.length, header.checksum, sequence,
        )
        + tenant_bytes(header.tenant)
    )  # fmt: skip


@dataclass(slots=True)
class Batch:
    """Changes not yet in the index; the last word on each address and extent.

    Applied in this order: `closed` extents lose their blocks, `opened` ones
    appear, then `blocks` are set (or, where None, removed).
    """

    closed: set[int] = field(default_factory=set)
    opened: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, bytes | None] = field(default_factory=dict)
    layouts: dict[bytes, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.closed) + len(self.opened) + len(self.blocks) + len(self.layouts)

    def without_new_blocks(self) -> Batch:
        """The same, adding no block."""
        removed: dict[int, bytes | None] = dict.fromkeys(self.blocks)
        return Batch(self.closed, self.opened, removed, self.layouts)


class Index:
    """An open index. One thread at a time applies batches; reads are for start."""

    def __init__(self, env: lmdb.Environment, extent_bytes: int, map_bytes: int) -> None:
        self._env = env
        self._extent_bytes = extent_bytes
        self._meta = env.open_db(b"meta")
        self._extents = env.open_db(b"extents")
        self._blocks = env.open_db(b"blocks")
        self._layouts = env.open_db(b"layouts")
        slack = min(_SLACK_BYTES, map_bytes // 2)
        self._max_blocks = (map_bytes - slack) // _ENTRY_BYTES
        with env.begin() as txn:
            self.blocks = txn.stat(self._blocks)["entries"]
            found = txn.get(b"extent_bytes", db=self._meta)
            self.recorded_extent_bytes = _U64.unpack(found)[0] if found else extent_bytes
            found = txn.get(b"life", db=self._meta)
            self.life = (_U64.unpack(found)[0] if found else 0) + 1
        if self.recorded_extent_bytes != extent_bytes:
            return
        with env.begin(write=True) as txn:
            txn.put(b"extent_bytes", _U64.pack(extent_bytes), db=self._meta)
            txn.put(b"life", _U64.pack(self.life), db=self._meta)

    @classmethod
    def open(cls, path: Path, map_bytes: int, extent_bytes: int) -> Index:
        """The index in directory `path`, emptied where it cannot be used: a cache
        may lose what it holds, but must neither exceed its capacity nor refuse to
        start for it. Raises `DataVersion`, `DataUnusable`."""
        data = path / "data.mdb"
        if data.exists() and data.stat().st_size > map_bytes:
            _empty(path, "the index is larger than the capacity now allows")
        try:
            index = cls._open(path, map_bytes, extent_bytes)
            if index.recorded_extent_bytes == extent_bytes:
                return index
            index.close()
            _empty(path, "extents had another size")
        except _DAMAGED as error:
            _empty(path, f"the index is damaged ({error})")
        except lmdb.VersionMismatchError as error:
            raise DataVersion(f"{path} is of another version: {error}") from error
        except lmdb.Error as error:
            raise DataUnusable(f"{path} cannot be opened: {error}") from error
        try:
            return cls._open(path, map_bytes, extent_bytes)
        except lmdb.Error as error:
            raise DataUnusable(f"{path} cannot be opened: {error}") from error

    @classmethod
    def _open(cls, path: Path, map_bytes: int, extent_bytes: int) -> Index:
        env = lmdb.open(
            str(path), map_size=map_bytes, max_dbs=4, metasync=False, mode=0o600,
            lib_version=_LMDB_MAJOR,
        )  # fmt: skip
        try:
            env.reader_check()
            return cls(env, extent_bytes, map_bytes)
        except (lmdb.Error, struct.error):
            env.close()
            raise

    @property
    def room(self) -> int:
        """How many more blocks it can name. Does not block."""
        return max(0, self._max_blocks - self.blocks)

    def apply(self, batch: Batch) -> None:
        """Apply it, or raise `TierFull`, `TierFailed` and change nothing."""
        try:
            with self._env.begin(write=True) as txn:
                for extent in batch.closed:
                    self._drop_extent(txn, extent)
                for extent, slot_bytes in batch.opened.items():
                    txn.put(_ADDRESS.pack(extent), _U64.pack(slot_bytes), db=self._extents)
                for key, value in batch.layouts.items():
                    txn.put(key, value, db=self._layouts)
                for address, record in batch.blocks.items():
                    if record is None:
                        txn.delete(_ADDRESS.pack(address), db=self._blocks)
                    else:
                        txn.put(_ADDRESS.pack(address), record, db=self._blocks)
                blocks = txn.stat(self._blocks)["entries"]
        except lmdb.MapFullError as error:
            # The estimate of an entry's size was too small here: believe the fact.
            self._max_blocks = min(self._max_blocks, self.blocks)
            raise TierFull("the index is full") from error
        except lmdb.Error as error:
            if error.code in (errno.ENOSPC, errno.EDQUOT):
                raise TierFull("the disk has no room for the index") from error
            raise TierFailed(f"the index failed: {error}", error.code) from error
        self.blocks = blocks

    def sync(self) -> None:
        """Raises `TierFailed`."""
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise TierFailed(f"the index failed: {error}", error.code) from error

    def close(self) -> None:
        self._env.close()

    def extents(self) -> dict[int, int]:
        """extent -> slot_bytes"""
        with self._env.begin() as txn, txn.cursor(self._extents) as cursor:
            return {_ADDRESS.unpack(key)[0]: _U64.unpack(value)[0] for key, value in cursor}

    def layouts(self) -> list[bytes]:
        with self._env.begin() as txn, txn.cursor(self._layouts) as cursor:
            return [bytes(value) for _, value in cursor]

    def records(self) -> Iterator[tuple[int, BlockHeader]]:
        """(address, header) of every block, in chunks: a reader that takes its time
        must not keep old pages of the index from being used again.

        The highest address first: blocks are mostly written after their children, so
        this mostly tells of a parent first, which saves who reads it memory."""
        tenants: dict[bytes, str] = {}
        layouts: dict[bytes, bytes] = {}
        last: bytes | None = None
        while True:
            with self._env.begin() as txn, txn.cursor(self._blocks) as cursor:
                beyond = last is not None and cursor.set_range(last)
                found = cursor.prev() if beyond else cursor.last()
                chunk = list(islice(cursor.iterprev(), _CHUNK)) if found else []
            for key, value in chunk:
                parent_bytes, stored_key, parent, layout_id, length, checksum, _ = (
                    _RECORD.unpack_from(value)
                )
                tenant = tenants.get(name := value[_RECORD.size :])
                if tenant is None:
                    tenant = tenants[name] = name.decode()
                # One object for all: millions name the same few.
                layout_id = layouts.setdefault(layout_id, layout_id)
                yield (
                    _ADDRESS.unpack(key)[0],
                    BlockHeader(
                        stored_key, parent[:parent_bytes], layout_id, tenant, length, checksum
                    ),
                )
            if len(chunk) < _CHUNK:
                return
            last = chunk[-1][0]

    def _drop_extent(self, txn: lmdb.Transaction[bytes], extent: int) -> None:
        txn.delete(_ADDRESS.pack(extent), db=self._extents)
        end = _ADDRESS.pack((extent + 1) * self._extent_bytes)
        with txn.cursor(self._blocks) as cursor:
            found = cursor.set_range(_ADDRESS.pack(extent * self._extent_bytes))
            while found and cursor.key() < end:
                found = cursor.delete()


def _empty(directory: Path, why: str) -> None:
    _log.warning("%s: starting empty", why)
    shutil.rmtree(directory)
    directory.mkdir(mode=0o700)


def encode_layout(tenant: str, layout_id: bytes, spec: dict[str, object]) -> tuple[bytes, bytes]:
    """(key, value) of a layout's entry."""
    value = json.dumps({"tenant": tenant, "spec": spec}, separators=(",", ":")).encode()
    return layout_id + tenant_bytes(tenant), value


def decode_layout(value: bytes) -> tuple[str, dict[str, object]]:
    entry = json.loads(value)
    return str(entry["tenant"]), dict(entry["spec"])
