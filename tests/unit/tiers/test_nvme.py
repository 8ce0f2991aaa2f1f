"""What only a tier on disk can get wrong: restarts, rot, room, other people's data."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
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
from kvstore.tiers import nvme, nvme_disk, nvme_home, nvme_index, nvme_log
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_segment import Geometry, file_name
from kvstore.tiers.nvme_slot import HEADER_BYTES
from tests.unit.tiers.blocks import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    aligned,
    get,
    header_of,
    payload_of,
    put,
    recovered,
)

CAPACITY_BYTES = 10 << 20
DATA_OFFSET = Geometry(EXTENT_BYTES).data_offset
MAX_BLOCKS = 1 << 20


def open_tier(path: Path, capacity_bytes: int = CAPACITY_BYTES, **options: Any) -> NvmeTier:
    return NvmeTier.open(path, capacity_bytes, EXTENT_BYTES, MAX_BLOCKS, **options)


def slot_file(tier: NvmeTier, path: Path, address: int) -> tuple[Path, int]:
    """The file a block lies in, and its offset there."""
    where = tier._log.where(address)
    assert where is not None
    segment, place = where
    return path / "segments" / file_name(segment.number), segment.offset(place.slot)


def fill(tier: NvmeTier, extents: int, nbytes: int = BLOCK_BYTES) -> dict[int, BlockHeader]:
    size = tier.slot_bytes(nbytes)
    headers: dict[int, BlockHeader] = {}
    for extent in range(1, extents + 1):
        tier.open_extent(extent, size)
        for slot in range(EXTENT_BYTES // size):
            address = extent * EXTENT_BYTES + slot * size
            headers[address] = put(tier, address, address, nbytes)
    return headers


def fill_more(tier: NvmeTier, extent: int, slots: int = 4) -> dict[int, BlockHeader]:
    size = tier.slot_bytes(BLOCK_BYTES)
    tier.open_extent(extent, size)
    first = extent * EXTENT_BYTES
    return {a: put(tier, a, a) for a in range(first, first + slots * size, size)}


def abandon(tier: NvmeTier) -> None:
    """What a crash of the process leaves: everything written, nothing said."""
    tier._log.close()
    tier._index.close()
    tier._home.close()


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
    assert sorted(again.recovered_extents()) == [(1, size), (2, size), (3, size)]
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


def test_a_secret_that_is_gone_is_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(tmp_path)
    tier.secret()
    fill(tier, 1)
    tier.close()
    assert not caplog.records
    (tmp_path / "secret").unlink()
    tier = open_tier(tmp_path)
    tier.secret()
    tier.close()
    assert "what is stored is not found again" in caplog.text


def test_only_the_owner_can_read_what_is_stored(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "data")
    fill(tier, 1)
    tier.secret()
    tier.close()
    for entry in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        assert entry.stat().st_mode & 0o077 == 0, entry


def flip(tmp_path: Path, bits: Iterable[int]) -> int:
    """Flip each bit of a slot alone; how many there were. Each must be noticed."""
    tier = open_tier(tmp_path, direct=False)
    address, header = next(iter(fill(tier, 1).items()))
    file, offset = slot_file(tier, tmp_path, address)
    found = tier._log.where(address)
    assert found is not None
    segment, place = found
    into = aligned(BLOCK_BYTES)
    fd = os.open(file, os.O_RDWR)
    count = 0
    for bit in bits:
        position = offset + bit // 8
        original = os.pread(fd, 1, position)
        os.pwrite(fd, bytes([original[0] ^ 1 << bit % 8]), position)
        with pytest.raises(CorruptBlock):
            tier._read(segment, place, header, into)
        os.pwrite(fd, original, position)
        count += 1
    os.close(fd)
    assert get(tier, address, header) == bytes(payload_of(address))
    tier.close()
    return count


PAYLOAD_BITS = range(8 * HEADER_BYTES, 8 * (HEADER_BYTES + BLOCK_BYTES))


def test_any_bit_of_a_header_flipped_is_a_corrupt_block(tmp_path: Path) -> None:
    assert flip(tmp_path, range(8 * HEADER_BYTES)) == 32_768


def test_any_of_a_thousand_bits_of_a_payload_flipped_is_a_corrupt_block(tmp_path: Path) -> None:
    assert flip(tmp_path, random.Random(1).sample(PAYLOAD_BITS, 1000)) == 1000


@pytest.mark.soak
def test_any_of_a_hundred_thousand_bits_flipped_is_a_corrupt_block(tmp_path: Path) -> None:
    assert flip(tmp_path, random.Random(2).sample(PAYLOAD_BITS, 100_000)) == 100_000


def test_a_damaged_slot_is_never_used_again(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, direct=False)
    headers = fill(tier, 1)
    address, header = list(headers.items())[3]
    file, offset = slot_file(tier, tmp_path, address)
    with file.open("r+b") as stream:
        stream.seek(offset + HEADER_BYTES)
        stream.write(b"damage")
    for _ in range(2):
        with pytest.raises(CorruptBlock):
            get(tier, address, header)
    tier.close()

    again = open_tier(tmp_path, direct=False)
    assert header not in recovered(again).values()
    size = again.slot_bytes(BLOCK_BYTES)
    again.close_extent(1)
    extents = range(10, 10 + again.usable_bytes // EXTENT_BYTES)
    for extent in extents:
        again.open_extent(extent, size)
    written = set()
    for turn, extent in itertools.product(range(3), extents):
        for start in range(0, EXTENT_BYTES - size + 1, size):
            address = extent * EXTENT_BYTES + start
            put(again, address, turn)
            written.add(slot_file(again, tmp_path, address))
    assert len(written) > len(extents) * (EXTENT_BYTES // size)
    assert (file, offset) not in written
    again.close()


def test_a_file_cut_short_is_a_miss_now_and_dropped_at_the_next_start(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, direct=False)
    headers = fill(tier, 2)
    address, header = next(iter(headers.items()))
    file, _ = slot_file(tier, tmp_path, address)
    os.truncate(file, 8192)
    with pytest.raises(CorruptBlock):
        get(tier, address, header)
    tier.close()
    again = open_tier(tmp_path)
    assert len(list(again.recovered_extents())) == 1
    kept = [h for a, h in headers.items() if a // EXTENT_BYTES == 2]
    assert sorted(recovered(again).values()) == sorted(kept)
    again.check_integrity()
    again.close()


def test_segments_of_no_use_are_removed_at_start_and_other_files_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_tier(tmp_path).close()
    segments = tmp_path / "segments"
    (segments / "00000007.seg").write_bytes(b"x" * EXTENT_BYTES)
    (segments / "7.seg").write_bytes(b"mine")
    (segments / "lost+found").mkdir()  # A disk that is mounted there has one.
    tier = open_tier(tmp_path)
    assert sorted(path.name for path in segments.iterdir()) == ["7.seg", "lost+found"]
    assert "1 segments were dropped" in caplog.text
    fill(tier, 1)
    tier.check_integrity()
    tier.close()


def test_a_second_server_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    address, header = next(iter(fill(tier, 1).items()))
    for _ in range(2):
        with pytest.raises(DataInUse, match=str(os.getpid())):
            open_tier(tmp_path)
    assert get(tier, address, header) == bytes(payload_of(address))
    tier.close()
    open_tier(tmp_path).close()


@pytest.mark.parametrize("text", ["kvstore-data 2\n", "", "kvstore-data 10\n", "\xff\xfe"])
def test_data_of_another_version_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    tier = open_tier(tmp_path)
    fill(tier, 1)
    tier.close()
    written = (tmp_path / "VERSION").read_text()
    (tmp_path / "VERSION").write_text(text, encoding="latin-1")
    with pytest.raises(DataVersion, match=f"rm -r {tmp_path}"):
        open_tier(tmp_path)
    assert (tmp_path / "segments" / "00000000.seg").exists()
    (tmp_path / "VERSION").write_text(written)
    again = open_tier(tmp_path)
    assert recovered(again)
    again.close()


def test_a_small_file_is_whole_though_the_disk_takes_it_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, parts = os.write, 0

    def some(fd: int, data: bytes) -> int:
        nonlocal parts
        parts += 1
        return write(fd, memoryview(data)[:100])

    tier = open_tier(tmp_path)
    monkeypatch.setattr(nvme_home.os, "write", some)
    spec = {"model": "m" * 500}
    tier.remember_layout("t", b"l" * 16, spec)
    tier.close()
    monkeypatch.undo()
    assert parts > 5
    again = open_tier(tmp_path)
    assert list(again.recovered_layouts()) == [("t", spec)]
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
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_without_its_version_is_not_taken_for_other_files(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    tier.secret()
    tier.close()
    (tmp_path / "VERSION").unlink()
    with pytest.raises(DataUnusable, match=f"lost its VERSION file.* rm -r {tmp_path}"):
        open_tier(tmp_path)


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    fill(tier, 1)
    tier.close()
    segment = tmp_path / "segments" / file_name(0)
    segment.unlink()
    segment.mkdir()
    with pytest.raises(DataUnusable, match=f"{segment}.*remove the directory"):
        open_tier(tmp_path)


def test_a_full_disk_is_no_obstacle_to_a_store_that_has_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 1)
    tier.close()

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    again = open_tier(tmp_path)
    assert sorted(recovered(again).values()) == sorted(headers.values())
    again.close()


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
    address, header = next(iter(fill(tier, 1).items()))
    assert get(tier, address, header) == bytes(payload_of(address))
    tier.close()


@pytest.mark.parametrize("lost", ["damaged", "cut", "gone", "file gone"])
@pytest.mark.parametrize("clean", [True, False])
def test_without_its_index_it_is_rebuilt_from_the_segments(
    tmp_path: Path, lost: str, clean: bool
) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 3)
    gone = list(headers)[::3]
    for address in gone:
        tier.forget(address, headers.pop(address))
    if clean:
        tier.close()
    else:
        tier.sync()
        abandon(tier)
    data = tmp_path / "index" / "data.mdb"
    if lost == "damaged":
        data.write_bytes(b"\xab" * 65536)
    elif lost == "cut":
        os.truncate(data, 5000)
    elif lost == "gone":
        shutil.rmtree(tmp_path / "index")
    else:
        data.unlink()
    again = open_tier(tmp_path)
    found = recovered(again)
    assert sorted(found.values()) == sorted(headers.values())
    for address, header in found.items():
        number = int.from_bytes(header.stored_key, "big")
        assert get(again, address, header) == bytes(payload_of(number))
    again.check_integrity()
    again.close()


def no_text(path: Path) -> None:
    (path / "index" / "data.sum").write_bytes(b"\xff" * 32)


def elsewhere(path: Path) -> None:
    """On another disk, and damaged."""
    (path / "index").rename(path / "other")
    (path / "index").symlink_to(path / "other")
    (path / "other" / "data.mdb").write_bytes(b"\xab" * 65536)


@pytest.mark.parametrize("damage", [no_text, elsewhere])
def test_it_starts_whatever_became_of_its_index(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 2)
    tier.close()
    damage(tmp_path)
    again = open_tier(tmp_path)
    assert sorted(recovered(again).values()) == sorted(headers.values())
    again.close()


def test_it_starts_where_its_index_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 2)
    tier.close()

    def fail(data: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(nvme_index, "_sum_of", fail)
        patched.setattr(nvme_index, "_readable", lambda path: False)
        again = open_tier(tmp_path)
    assert sorted(recovered(again).values()) == sorted(headers.values())
    again.close()


def test_an_index_from_an_older_time_brings_nothing_back_and_hides_nothing(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "data")
    old = fill(tier, 2)
    tier.sync()
    shutil.copytree(tmp_path / "data" / "index", tmp_path / "index")
    changed = list(old)[:5]
    expected = dict(old)
    for address in changed:
        tier.forget(address, expected.pop(address))
    for address in changed[:3]:
        expected[address] = put(tier, address, 1000 + address)
    tier.sync()
    abandon(tier)
    shutil.rmtree(tmp_path / "data" / "index")
    shutil.copytree(tmp_path / "index", tmp_path / "data" / "index")
    again = open_tier(tmp_path / "data")
    found = recovered(again)
    assert sorted(found.values()) == sorted(expected.values())
    for address, header in found.items():
        number = int.from_bytes(header.stored_key, "big")
        assert get(again, address, header) == bytes(payload_of(number))
    again.close()


def test_an_index_closed_long_ago_is_not_asked_of_segments_that_began_anew(
    tmp_path: Path,
) -> None:
    tier = open_tier(tmp_path / "data", 6 << 20)
    extents = tier.usable_bytes // EXTENT_BYTES
    held = fill(tier, extents)
    tier.close()
    shutil.copytree(tmp_path / "data" / "index", tmp_path / "index")
    tier = open_tier(tmp_path / "data", 6 << 20)
    assert recovered(tier) == held
    lives = {s.number: s.life for s in tier._log.segments.values()}
    for number, address in enumerate([*held, *held]):
        tier.forget(address, held[address])
        held[address] = put(tier, address, 5000 + number)
    tier.sync()
    assert any(lives[s.number] and lives[s.number] != s.life for s in tier._log.segments.values())
    abandon(tier)
    shutil.rmtree(tmp_path / "data" / "index")
    shutil.copytree(tmp_path / "index", tmp_path / "data" / "index")
    again = open_tier(tmp_path / "data", 6 << 20)
    again.check_integrity()
    assert sorted(recovered(again).values()) == sorted(held.values())
    again.close()


def test_of_two_blocks_of_one_name_a_crash_leaves_the_later(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 1)
    tier.open_extent(7, tier.slot_bytes(BLOCK_BYTES))
    address, old = next(iter(headers.items()))
    payload = payload_of(4711)
    new = header_of(address, payload)
    tier.write(7 * EXTENT_BYTES, new, payload)
    tier.sync()
    abandon(tier)
    again = open_tier(tmp_path)
    named = [(a, h) for a, h in recovered(again).items() if h.stored_key == old.stored_key]
    assert [header for _, header in named] == [new]
    assert get(again, *named[0]) == bytes(payload)
    again.close()


def test_what_was_not_synced_but_arrived_is_found(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 2)
    abandon(tier)
    again = open_tier(tmp_path)
    assert sorted(recovered(again).values()) == []  # No summary says which life it is.
    headers = fill_more(again, 5)
    again.sync()
    more = fill_more(again, 6)
    abandon(again)
    last = open_tier(tmp_path)
    found = sorted(recovered(last).values())
    assert found == sorted([*headers.values(), *more.values()][: len(found)])
    assert len(found) > len(headers)
    last.close()


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


def test_less_capacity_than_before_drops_segments_at_start(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 16 << 20)
    fill(tier, tier.usable_bytes // EXTENT_BYTES)
    tier.close()
    assert bytes_on_disk(tmp_path) > 6 << 20
    smaller = open_tier(tmp_path, 6 << 20)
    assert bytes_on_disk(tmp_path) <= 6 << 20
    held = {extent for extent, _ in smaller.recovered_extents()}
    assert {address // EXTENT_BYTES for address in recovered(smaller)} == held
    assert held
    for address, header in recovered(smaller).items():
        number = int.from_bytes(header.stored_key, "big")
        assert get(smaller, address, header) == bytes(payload_of(number))
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
    assert tier.healthy
    for address, header in headers.items():
        assert get(tier, address, header) == bytes(payload_of(address, 1))
    tier.close()
    again = open_tier(tmp_path)
    assert set(recovered(again).values()) <= set(headers.values())
    again.close()


def test_what_a_full_index_was_not_told_is_not_kept_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path)

    def full(batch: nvme_index.Batch) -> None:
        if batch.segments:
            raise TierFull("the index is full")

    def write_over_and_over() -> None:
        for number in range(60):
            put(tier, EXTENT_BYTES + number % 8 * size, number)
            tier.sync()

    size = tier.slot_bytes(BLOCK_BYTES)
    tier.open_extent(1, size)
    with monkeypatch.context() as patched:
        patched.setattr(tier._index, "apply", full)
        write_over_and_over()
        untold = len(tier._untold)
        assert 1 < untold <= len(tier._log.segments)
    write_over_and_over()
    assert len(tier._untold) < untold, "what began anew is told"
    tier.close()
    again = open_tier(tmp_path)
    assert len(recovered(again)) == 8
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

    sync = nvme_disk.DirectoryFile.fdatasync

    def sync_noted(file: nvme_disk.DirectoryFile) -> None:
        done.append("data")
        sync(file)

    monkeypatch.setattr(nvme_disk.DirectoryFile, "fdatasync", sync_noted)
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
    address, header = next(iter(fill(tier, 1).items()))
    tier.sync()
    put(tier, address + tier.slot_bytes(BLOCK_BYTES), 77)
    asked: list[object] = []

    def fail(file: nvme_disk.DirectoryFile) -> None:
        asked.append(file)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(nvme_disk.DirectoryFile, "fdatasync", fail)
    for _ in range(2):
        with pytest.raises(TierFailed) as caught:
            tier.sync()
        assert caught.value.errno == errno.EIO
    assert not tier.healthy
    with pytest.raises(TierFailed):
        put(tier, address, 1)
    with pytest.raises(TierFailed):
        get(tier, address, header)
    tier.forget(address, header)
    tier.close()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("code", "error", "healthy"),
    [
        (errno.ENOSPC, TierFull, True),
        (errno.EDQUOT, TierFull, True),
        (errno.EFBIG, TierFull, True),
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
        patched.setattr(nvme_log, "write_all", fail)
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
    address, header = next(iter(fill(tier, 1).items()))
    assert get(tier, address, header) == bytes(payload_of(address))
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


def test_a_closed_extent_takes_its_own_blocks_and_no_others(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    headers = fill(tier, 3)
    tier.sync()
    tier.close_extent(2)
    tier.sync()
    size = tier.slot_bytes(BLOCK_BYTES)
    kept = {a: h for a, h in headers.items() if a // EXTENT_BYTES != 2}
    assert recovered(tier) == kept

    # Opened again before the removal is on disk: only the new block is there.
    tier.close_extent(3)
    tier.open_extent(3, size)
    new = put(tier, 3 * EXTENT_BYTES, 1)
    tier.close()
    again = open_tier(tmp_path)
    ours = [h for a, h in kept.items() if a // EXTENT_BYTES == 1]
    assert sorted(recovered(again).values()) == sorted([*ours, new])
    again.close()


def churn(tier: NvmeTier, turns: int, seed: int) -> dict[int, BlockHeader]:
    """Blocks of two sizes in all the extents there may be, stored and forgotten."""
    rng = random.Random(seed)
    sizes = [tier.slot_bytes(BLOCK_BYTES), tier.slot_bytes(1)]
    places: list[tuple[int, int]] = []
    for extent in range(1, tier.usable_bytes // EXTENT_BYTES + 1):
        size = sizes[extent % 3 == 0]
        tier.open_extent(extent, size)
        nbytes = BLOCK_BYTES if size == sizes[0] else 1
        starts = range(extent * EXTENT_BYTES, (extent + 1) * EXTENT_BYTES - size + 1, size)
        places += [(address, nbytes) for address in starts]
    held: dict[int, BlockHeader] = {}
    for number in range(turns):
        address, nbytes = rng.choice(places)
        if address in held:
            tier.forget(address, held.pop(address))
        if rng.random() < 0.97:
            payload = payload_of(number, nbytes)
            held[address] = header_of(number, payload)
            tier.write(address, held[address], payload)
    return held


def test_segments_are_won_as_long_as_addresses_are_free(tmp_path: Path) -> None:
    """With every address used, in any order, and sizes mixed."""
    tier = open_tier(tmp_path, 6 << 20)
    held = churn(tier, 1500, 1)
    tier.check_integrity()
    assert tier.wear()["move"]
    assert bytes_on_disk(tmp_path) <= 6 << 20
    for address, header in held.items():
        number = int.from_bytes(header.stored_key, "big")
        assert get(tier, address, header) == bytes(payload_of(number, header.length))
    tier.close()
    again = open_tier(tmp_path, 6 << 20)
    assert sorted(recovered(again).values()) == sorted(held.values())
    again.check_integrity()
    again.close()


def test_readers_are_not_disturbed_by_blocks_that_move(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 6 << 20)
    extents = tier.usable_bytes // EXTENT_BYTES
    everything = fill(tier, extents)
    changing = list(everything)[::2]
    kept = {a: h for a, h in everything.items() if a not in set(changing)}
    done = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not done.is_set():
            for address, header in kept.items():
                try:
                    if get(tier, address, header) != bytes(payload_of(address)):
                        wrong.append(address)
                except CorruptBlock as error:
                    wrong.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    rng = random.Random(1)
    try:
        for number in range(400):
            put(tier, rng.choice(changing), number)
    finally:
        done.set()
        reader.join()
    assert wrong == []
    assert tier.wear()["move"]
    tier.check_integrity()
    tier.close()


def test_a_reader_that_was_overtaken_by_a_move_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path)
    everything = fill(tier, tier.usable_bytes // EXTENT_BYTES)
    address, header = next(iter(everything.items()))
    before = tier._log.where(address)
    assert before is not None
    rng = random.Random(1)
    others = list(everything)[1:]
    while before[0].life == before[1].life or before[0].next <= before[1].slot:
        put(tier, rng.choice(others), 1)
    where = tier._log.where
    answers = iter([before])
    monkeypatch.setattr(tier._log, "where", lambda a: next(answers, None) or where(a))
    assert get(tier, address, header) == bytes(payload_of(address))
    tier.close()


def test_what_is_stored_first_after_a_start_moves_nothing(tmp_path: Path) -> None:
    """There is capacity; none of it was preallocated in the life before."""
    tier = open_tier(tmp_path)
    fill_more(tier, 1, slots=2)
    tier.close()
    again = open_tier(tmp_path)
    size = again.slot_bytes(BLOCK_BYTES)
    for slot in range(2, EXTENT_BYTES // size):
        put(again, EXTENT_BYTES + slot * size, slot)
    assert again.wear()["move"] == 0
    again.close()
