"""What only a tier on disk can get wrong: restarts, rot, room, other people's data."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import (
    CorruptBlock,
    DataInUse,
    DataUnusable,
    DataVersion,
    InternalError,
    TierFailed,
    TierFull,
)
from kvstore.tiers import nvme, nvme_home, nvme_index
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_slot import HEADER_BYTES
from tests.unit.tiers.blocks import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    aligned,
    get,
    header_of,
    payload_of,
    put,
)

CAPACITY_BYTES = 8 << 20
MAX_BLOCKS = 1 << 20


def open_tier(path: Path, capacity_bytes: int = CAPACITY_BYTES, **options: Any) -> NvmeTier:
    return NvmeTier.open(path, capacity_bytes, EXTENT_BYTES, MAX_BLOCKS, **options)


def fill(tier: NvmeTier, extents: int, nbytes: int = BLOCK_BYTES) -> dict[int, BlockHeader]:
    size = tier.slot_bytes(nbytes)
    headers: dict[int, BlockHeader] = {}
    for extent in range(extents):
        tier.open_extent(extent, size)
        for slot in range(EXTENT_BYTES // size):
            address = extent * EXTENT_BYTES + slot * size
            headers[address] = put(tier, address, address, nbytes)
    return headers


def recovered(tier: NvmeTier) -> dict[int, BlockHeader]:
    found = list(tier.recovered_blocks())
    assert len({block.address for block in found}) == len(found)
    return {block.address: block.header for block in found}


def bytes_on_disk(path: Path) -> int:
    return sum(entry.lstat().st_blocks * 512 for entry in [path, *path.rglob("*")])


def test_everything_survives_a_clean_restart(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 3)
    tier.remember_layout("alice", b"L" * 16, {"model": "m"})
    secret = tier.secret()
    tier.close()
    tier.close()

    again = open_tier(tmp_path)
    size = again.slot_bytes(BLOCK_BYTES)
    assert sorted(again.recovered_extents()) == [(0, size), (1, size), (2, size)]
    assert recovered(again) == headers
    assert list(again.recovered_layouts()) == [("alice", {"model": "m"})]
    for address, header in headers.items():
        assert get(again, address, header) == bytes(payload_of(address))
    assert again.secret() == secret
    again.check_integrity()
    again.close()


def test_the_secret_is_private_and_its_own_for_each_directory(tmp_path: Path) -> None:
    with_secret = open_tier(tmp_path / "a")
    other = open_tier(tmp_path / "b")
    assert len(with_secret.secret()) == 32
    assert with_secret.secret() != other.secret()
    assert (tmp_path / "a" / "secret").stat().st_mode & 0o777 == 0o600
    with_secret.close()
    other.close()


def test_only_the_owner_can_read_what_is_stored(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "data")
    fill(tier, 1)
    tier.secret()
    tier.close()
    for entry in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        assert entry.stat().st_mode & 0o077 == 0, entry


def test_any_bit_of_a_slot_flipped_is_a_corrupt_block(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, direct=False)
    header = fill(tier, 1)[0]
    positions = [
        *range(128),
        *range(128, HEADER_BYTES, 61),
        *range(HEADER_BYTES, HEADER_BYTES + BLOCK_BYTES, 337),
        HEADER_BYTES + BLOCK_BYTES - 1,
    ]
    fd = os.open(tmp_path / "extents" / "00000000.kv", os.O_RDWR)
    for position in positions:
        original = os.pread(fd, 1, position)
        os.pwrite(fd, bytes([original[0] ^ 1 << position % 8]), position)
        with pytest.raises(CorruptBlock):
            get(tier, 0, header)
        os.pwrite(fd, original, position)
    os.close(fd)
    assert get(tier, 0, header) == bytes(payload_of(0))
    tier.close()


def test_a_file_cut_short_is_a_miss_now_and_dropped_at_the_next_start(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, direct=False)
    headers = fill(tier, 2)
    os.truncate(tmp_path / "extents" / "00000000.kv", 8192)
    with pytest.raises(CorruptBlock):
        get(tier, 0, headers[0])
    tier.close()
    again = open_tier(tmp_path)
    assert [extent for extent, _ in again.recovered_extents()] == [1]
    assert all(address >= EXTENT_BYTES for address in recovered(again))
    again.check_integrity()
    again.close()


def test_files_nobody_knows_are_removed_at_start(tmp_path: Path) -> None:
    open_tier(tmp_path).close()
    (tmp_path / "extents" / "00000007.kv").write_bytes(b"x" * EXTENT_BYTES)
    tier = open_tier(tmp_path)
    assert list((tmp_path / "extents").iterdir()) == []
    tier.close()


def test_a_second_server_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    header = fill(tier, 1)[0]
    for _ in range(2):
        with pytest.raises(DataInUse, match=str(os.getpid())):
            open_tier(tmp_path)
    assert get(tier, 0, header) == bytes(payload_of(0))
    tier.close()
    open_tier(tmp_path).close()


@pytest.mark.parametrize("text", ["kvstore-data 1\n", "", "kvstore-data 10\n", "\xff\xfe"])
def test_data_of_another_version_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    tier = open_tier(tmp_path)
    fill(tier, 1)
    tier.close()
    written = (tmp_path / "VERSION").read_text()
    (tmp_path / "VERSION").write_text(text, encoding="latin-1")
    with pytest.raises(DataVersion):
        open_tier(tmp_path)
    assert (tmp_path / "extents" / "00000000.kv").exists()
    (tmp_path / "VERSION").write_text(written)
    again = open_tier(tmp_path)
    assert recovered(again)
    again.close()


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataUnusable, match="choose"):
            open_tier(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataUnusable, match=r"thesis\.tex"):
        open_tier(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / "VERSION").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(nvme_home, "_lock", refuse)
        with pytest.raises(DataUnusable, match="another directory"):
            open_tier(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(nvme, "direct_io_works", refuse)
        with pytest.raises(DataUnusable, match="another directory"):
            open_tier(tmp_path)
    open_tier(tmp_path).close()  # Nothing was left locked.


def test_a_capacity_too_small_for_one_extent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataUnusable, match="capacity"):
        open_tier(tmp_path / "data", EXTENT_BYTES)
    assert not (tmp_path / "data").exists()


def test_where_o_direct_is_refused_it_works_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nvme, "direct_io_works", lambda directory: False)
    tier = open_tier(tmp_path)
    assert not tier.direct
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    header = fill(tier, 1)[0]
    assert get(tier, 0, header) == bytes(payload_of(0))
    tier.close()


def test_a_damaged_index_costs_the_cache_not_the_start(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    fill(tier, 1)
    tier.close()
    (tmp_path / "index" / "data.mdb").write_bytes(b"\xab" * 65536)
    again = open_tier(tmp_path)
    assert recovered(again) == {}
    assert list((tmp_path / "extents").iterdir()) == []
    header = fill(again, 1)[0]
    assert get(again, 0, header) == bytes(payload_of(0))
    again.close()


def test_another_extent_size_starts_empty(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    fill(tier, 2)
    tier.close()
    for _ in range(2):
        other = NvmeTier.open(tmp_path, CAPACITY_BYTES, 2 * EXTENT_BYTES, MAX_BLOCKS)
        assert not list(other.recovered_extents())
        assert recovered(other) == {}
        other.check_integrity()
        other.close()


def test_less_capacity_than_before_drops_extents_at_start(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 16 << 20)
    fill(tier, tier.usable_bytes // EXTENT_BYTES)
    tier.close()
    assert bytes_on_disk(tmp_path) > 4 << 20
    smaller = open_tier(tmp_path, 4 << 20)
    assert bytes_on_disk(tmp_path) <= 4 << 20
    held = {extent for extent, _ in smaller.recovered_extents()}
    assert {address // EXTENT_BYTES for address in recovered(smaller)} == held
    smaller.check_integrity()
    smaller.close()


@pytest.mark.parametrize("nbytes", [1, BLOCK_BYTES])
def test_the_disk_never_holds_more_than_the_capacity(tmp_path: Path, nbytes: int) -> None:
    tier = open_tier(tmp_path)
    most = tier.usable_bytes // EXTENT_BYTES
    size = tier.slot_bytes(nbytes)
    for extent in range(3 * most):
        if extent >= most:
            with pytest.raises(TierFull):
                tier.open_extent(extent, size)
            tier.close_extent(extent - most)
        tier.open_extent(extent, size)
        for slot in range(EXTENT_BYTES // size):
            address = extent * EXTENT_BYTES + slot * size
            header = put(tier, address, address, nbytes)
            if slot % 2:
                tier.forget(address, header)
        assert bytes_on_disk(tmp_path) <= CAPACITY_BYTES
    tier.close()
    assert bytes_on_disk(tmp_path) <= CAPACITY_BYTES


def test_a_full_index_is_a_full_tier_until_something_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme_index, "_ENTRY_BYTES", 1 << 19)
    tier = open_tier(tmp_path)
    tier.open_extent(0, tier.slot_bytes(1))
    size = tier.slot_bytes(1)
    headers = [put(tier, slot * size, slot, 1) for slot in range(2)]
    with pytest.raises(TierFull):
        put(tier, 2 * size, 2, 1)
    tier.forget(0, headers[0])
    put(tier, 2 * size, 2, 1)
    tier.close()


def test_an_index_that_runs_out_of_pages_loses_entries_but_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme, "map_bytes_for", lambda capacity_bytes, max_blocks: 64 << 10)
    monkeypatch.setattr(nvme_index, "_ENTRY_BYTES", 1)
    tier = open_tier(tmp_path)
    headers: dict[int, BlockHeader] = {}
    size = tier.slot_bytes(1)
    full = False
    for extent in range(tier.usable_bytes // EXTENT_BYTES):
        tier.open_extent(extent, size)
        for slot in range(EXTENT_BYTES // size):
            address = extent * EXTENT_BYTES + slot * size
            try:
                headers[address] = put(tier, address, address, 1)
            except TierFull:
                full = True
    assert full
    assert tier.unindexed_blocks
    assert tier.healthy
    for address, header in headers.items():
        assert get(tier, address, header) == bytes(payload_of(address, 1))
    tier.close()
    again = open_tier(tmp_path)
    found = recovered(again)
    assert found.items() <= headers.items()
    again.close()


def test_data_is_synced_before_the_index_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path)
    done: list[str] = []
    apply = tier._index.apply

    def apply_noted(batch: nvme_index.Batch) -> None:
        done.append("index")
        apply(batch)

    monkeypatch.setattr(nvme, "fdatasync", lambda fd: done.append("data"))
    monkeypatch.setattr(tier._index, "apply", apply_noted)
    fill(tier, 2)
    tier.sync()
    assert done == ["data", "data", "index"]
    tier.sync()
    assert len(done) == 3
    tier.close()


def test_a_failed_sync_ends_the_tier_and_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path)
    header = fill(tier, 1)[0]
    tier.sync()
    new = put(tier, tier.slot_bytes(BLOCK_BYTES), 77)
    asked: list[int] = []

    def fail(fd: int) -> None:
        asked.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(nvme, "fdatasync", fail)
    for _ in range(2):
        with pytest.raises(TierFailed) as caught:
            tier.sync()
        assert caught.value.errno == errno.EIO
    assert not tier.healthy
    with pytest.raises(TierFailed):
        put(tier, 0, 1)
    with pytest.raises(TierFailed):
        get(tier, 0, header)
    tier.forget(0, header)
    tier.close()
    assert len(asked) == 1
    monkeypatch.undo()
    again = open_tier(tmp_path)
    assert new not in recovered(again).values()
    again.close()


@pytest.mark.parametrize(
    ("code", "error", "healthy"),
    [
        (errno.ENOSPC, TierFull, True),
        (errno.EDQUOT, TierFull, True),
        (errno.EIO, TierFailed, False),
        (errno.EINVAL, InternalError, True),
    ],
)
def test_an_error_of_the_disk_becomes_the_right_one_of_ours(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[Exception],
    healthy: bool,
) -> None:
    def fail(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    tier = open_tier(tmp_path)
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    with monkeypatch.context() as patched:
        patched.setattr(nvme, "write_all", fail)
        with pytest.raises(error):
            put(tier, 0, 1)
    assert tier.healthy is healthy
    tier.close()


def test_no_room_for_a_file_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tier = open_tier(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", fail)
        with pytest.raises(TierFull):
            tier.open_extent(0, 8192)
    tier.check_integrity()
    tier.open_extent(0, 8192)
    tier.close()


def test_transfers_that_the_kernel_cuts_short_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def first_bytes(buffers: Sequence[memoryview]) -> list[memoryview]:
        return [buffers[0][:1500]]

    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, first_bytes(into), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, out, at: pwritev(fd, first_bytes(out), at))
    tier = open_tier(tmp_path, direct=False)
    header = fill(tier, 1)[0]
    assert get(tier, 0, header) == bytes(payload_of(0))
    tier.close()


def test_unaligned_memory_is_a_bug_not_the_end_of_the_tier(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    if not tier.direct:
        pytest.skip("no O_DIRECT here")
    tier.open_extent(0, tier.slot_bytes(BLOCK_BYTES))
    payload = aligned(BLOCK_BYTES + 1)[1:]
    with pytest.raises(InternalError, match="aligned"):
        tier.write(0, header_of(1, payload), payload)
    assert tier.healthy
    tier.close()


def test_an_index_older_than_the_slots_only_misses(tmp_path: Path) -> None:
    """The machine died between a slot's second use and the index's hearing of it."""
    tier = open_tier(tmp_path / "data")
    old = fill(tier, 1)
    tier.close()
    shutil.copytree(tmp_path / "data" / "index", tmp_path / "index")

    tier = open_tier(tmp_path / "data")
    addresses = sorted(old)
    new = {}
    for address in addresses[:5]:
        tier.forget(address, old[address])
        new[address] = put(tier, address, 1000 + address)
    tier.close()
    shutil.rmtree(tmp_path / "data" / "index")
    shutil.copytree(tmp_path / "index", tmp_path / "data" / "index")

    again = open_tier(tmp_path / "data")
    assert recovered(again) == old
    for address in addresses:
        if address in new:
            with pytest.raises(CorruptBlock):
                get(again, address, old[address])
        else:
            assert get(again, address, old[address]) == bytes(payload_of(address))
    again.close()


def test_a_closed_extent_takes_its_own_blocks_out_of_the_index_and_no_others(
    tmp_path: Path,
) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 3)
    tier.sync()
    tier.close_extent(1)
    tier.sync()
    size = tier.slot_bytes(BLOCK_BYTES)
    assert sorted(tier._index.extents()) == [0, 2]
    kept = {a: h for a, h in headers.items() if a // EXTENT_BYTES != 1}
    assert dict(tier._index.records()) == kept

    # Opened again before the removal is on disk: only the new block is there.
    tier.close_extent(2)
    tier.open_extent(2, size)
    new = put(tier, 2 * EXTENT_BYTES, 1)
    tier.close()
    again = open_tier(tmp_path)
    assert recovered(again) == {
        **{a: h for a, h in kept.items() if a < EXTENT_BYTES},
        2 * EXTENT_BYTES: new,
    }
    again.close()
