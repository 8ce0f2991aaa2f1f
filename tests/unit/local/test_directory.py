"""The directory: what readers may believe, whatever the writer or a vandal does."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time

import pytest

from kvstore.local.directory import (
    BEHIND_DRAM,
    ENTRY_BYTES,
    HEADER_BYTES,
    IN_DRAM,
    MAX_LOAD,
    STALE_AFTER_NS,
    SUPERSEDED,
    DirectoryReader,
    DirectoryWriter,
    table_bytes,
)
from kvstore.naming import namer

NAME = namer(b"secret", b"layout")
OTHER = namer(b"secret", b"other layout")


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def pair(slots: int = 1024) -> tuple[DirectoryWriter, DirectoryReader]:
    writer = DirectoryWriter(slots, b"an epoch", seed=7, now_ns=1)
    return writer, DirectoryReader(os.dup(writer.fd))


def test_what_is_listed_is_found_and_nothing_else() -> None:
    writer, reader = pair()
    for number in range(200):
        writer.put(NAME(key(number)), IN_DRAM if number % 2 else BEHIND_DRAM)
    for number in range(0, 200, 3):
        writer.remove(NAME(key(number)))
    for number in range(400):
        expected = 0
        if number < 200 and number % 3:
            expected = IN_DRAM if number % 2 else BEHIND_DRAM
        assert reader.find(NAME(key(number))) == expected
        assert reader.find(OTHER(key(number))) == 0


@pytest.mark.parametrize("length", [1, 2, 3, 8, 255, 256, 2000])
def test_a_prefix_is_found_to_the_position(length: int) -> None:
    writer, reader = pair(16384)
    keys = [key(n) for n in range(length)]
    for held in sorted({0, 1, length // 3, length - 1, length}):
        for dram in sorted({0, held // 2, held}):
            for position, each in enumerate(keys):
                name = NAME(each)
                if position < held:
                    writer.put(name, BEHIND_DRAM | (IN_DRAM if position < dram else 0))
                else:
                    writer.remove(name)
            assert reader.prefix([NAME], keys) == (held, dram)


def test_all_shards_must_hold_a_position() -> None:
    writer, reader = pair()
    keys = [key(n) for n in range(10)]
    for each in keys[:7]:
        writer.put(NAME(each), IN_DRAM)
    for each in keys[:4]:
        writer.put(OTHER(each), IN_DRAM)
    assert reader.prefix([NAME, OTHER], keys) == (4, 4)
    assert reader.prefix([OTHER, NAME], keys) == (4, 4)
    assert reader.prefix([], keys) == (0, 0)
    assert reader.prefix([NAME], []) == (0, 0)


def test_an_entry_with_any_bit_flipped_counts_as_absent() -> None:
    writer, reader = pair()
    writer.put(NAME(key(1)), IN_DRAM)
    raw = writer._map
    at = raw.find(NAME(key(1)))
    entry = raw[at : at + ENTRY_BYTES]
    for bit in range(ENTRY_BYTES * 8):
        damaged = bytearray(entry)
        damaged[bit // 8] ^= 1 << bit % 8
        raw[at : at + ENTRY_BYTES] = bytes(damaged)
        assert reader.find(NAME(key(1))) == 0
    raw[at : at + ENTRY_BYTES] = entry
    assert reader.find(NAME(key(1))) == IN_DRAM


def test_an_entry_of_another_table_does_not_pass() -> None:
    writer, reader = pair()
    foreign = DirectoryWriter(1024, b"an epoch", seed=8, now_ns=1)
    foreign.put(NAME(key(1)), IN_DRAM)
    writer._map[HEADER_BYTES:] = foreign._map[HEADER_BYTES:]
    assert reader.find(NAME(key(1))) == 0


def test_random_bytes_in_the_table_find_nothing() -> None:
    writer, reader = pair()
    rng = random.Random(1)
    writer._map[HEADER_BYTES:] = rng.randbytes(table_bytes(1024) - HEADER_BYTES)
    assert not any(reader.find(NAME(key(n))) for n in range(2000))


def test_a_client_cannot_write_into_it() -> None:
    writer, reader = pair()
    with pytest.raises(PermissionError):
        mmap.mmap(writer.fd, table_bytes(1024))
    with pytest.raises(PermissionError):
        os.pwrite(writer.fd, b"x", HEADER_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(writer.fd, 0)
    with pytest.raises(TypeError):
        reader._map[0:1] = b"x"


@pytest.mark.parametrize("content", [b"", b"x" * 5000, bytes(table_bytes(16))])
def test_what_is_no_directory_is_refused(content: bytes) -> None:
    fd = os.memfd_create("not-a-directory")
    os.write(fd, content)
    with pytest.raises(ValueError, match="directory"):
        DirectoryReader(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_server_that_went_or_hangs_is_not_believed() -> None:
    writer, reader = pair()
    now_ns = 10**12
    writer.beat(now_ns)
    assert reader.alive(now_ns + STALE_AFTER_NS - 1)
    assert not reader.alive(now_ns + STALE_AFTER_NS)
    writer.beat(now_ns + STALE_AFTER_NS)
    assert reader.alive(now_ns + STALE_AFTER_NS)
    assert not reader.superseded()
    writer.close(SUPERSEDED)
    assert not reader.alive(now_ns + STALE_AFTER_NS)
    assert reader.superseded()


def test_at_full_load_next_to_nothing_is_lost() -> None:
    writer, reader = pair(1 << 16)
    total = int((1 << 16) * MAX_LOAD)
    for number in range(total):
        writer.put(NAME(key(number)), IN_DRAM)
    assert writer.unlisted <= total // 10_000
    assert writer.entries == total - writer.unlisted
    found = sum(bool(reader.find(NAME(key(n)))) for n in range(total))
    assert found == writer.entries


def test_an_overfull_table_says_so_and_stays_right() -> None:
    writer, reader = pair(64)
    for number in range(500):
        writer.put(NAME(key(number)), IN_DRAM)
    assert writer.unlisted > 0
    assert writer.entries + writer.unlisted == 500
    for number in range(500):
        writer.remove(NAME(key(number)))
    assert writer.entries == 0
    assert not any(reader.find(NAME(key(n))) for n in range(500))


READER = """
import os, random, sys
from kvstore.local.directory import DirectoryReader
from kvstore.naming import namer
fd, seconds, seed = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
import time
reader, name, rng = DirectoryReader(fd), namer(b"secret", b"layout"), random.Random(seed)
end, found, absent, wrong = time.monotonic() + seconds, 0, 0, 0
while time.monotonic() < end:
    for _ in range(500):
        number = rng.randrange(64)
        info = reader.find(name(number.to_bytes(32, "little")))
        # The writer lists a key only with infos that name it.
        if info and info >> 8 != number:
            wrong += 1
        found += bool(info)
        absent += not info
print(found, absent, wrong)
"""


@pytest.mark.parametrize("seconds", [3, pytest.param(120, marks=pytest.mark.soak)])
def test_readers_that_race_the_writer_never_see_a_wrong_entry(seconds: int) -> None:
    """Few keys in few slots, so that entries are overwritten by others all the time."""
    writer = DirectoryWriter(64, b"an epoch", seed=7, now_ns=1)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(writer.fd), str(seconds), str(seed)],
            stdout=subprocess.PIPE,
            pass_fds=[writer.fd],
            text=True,
        )
        for seed in range(2)
    ]
    rng = random.Random(99)
    names = [NAME(key(n)) for n in range(64)]
    end = time.monotonic() + seconds + 2
    while time.monotonic() < end and any(r.poll() is None for r in readers):
        for _ in range(200):
            number = rng.randrange(64)
            if rng.random() < 0.5:
                writer.put(names[number], number << 8 | rng.randrange(1, 4))
            else:
                writer.remove(names[number])
    for reader in readers:
        out, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        found, absent, wrong = map(int, out.split())
        assert wrong == 0
        assert found > 100
        assert absent > 100
