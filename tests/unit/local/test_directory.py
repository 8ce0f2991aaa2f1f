"""The directory: what readers may believe, whatever the writer or a vandal does."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import struct
from collections.abc import Callable

import numpy as np
import pytest

from kvstore.local.directory import (
    BEHIND_DRAM,
    CLOSED,
    HEADER_BYTES,
    IN_DRAM,
    MAX_LOAD,
    PAGE_WORDS,
    STALE_AFTER_NS,
    SUPERSEDED,
    WORD_BYTES,
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
    writer = DirectoryWriter(slots, b"an epoch", now_ns=1)
    return writer, DirectoryReader(os.dup(writer.fd))


def put(writer: DirectoryWriter, name: bytes, info: int = IN_DRAM) -> None:
    writer.change([(name, bool(info & IN_DRAM), bool(info & BEHIND_DRAM))])


def remove(writer: DirectoryWriter, name: bytes) -> None:
    put(writer, name, 0)


def words_of(writer: DirectoryWriter) -> list[int]:
    return writer._words.tolist()


def made(page: int, offset: int, number: int, slots: int = 1024) -> bytes:
    """A name with its home at `offset` of `page`, as a tenant may find by trying."""
    home = page * PAGE_WORDS + offset
    q = home << 64 - slots.bit_length() + 1 | (number + 1) << 2
    return struct.pack("<QQ", q, 0)


def test_what_is_listed_is_found_and_nothing_else() -> None:
    writer, reader = pair()
    for number in range(200):
        put(writer, NAME(key(number)), IN_DRAM if number % 2 else BEHIND_DRAM)
    for number in range(0, 200, 3):
        remove(writer, NAME(key(number)))
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
                if position < held:
                    put(writer, NAME(each), BEHIND_DRAM | IN_DRAM * (position < dram))
                else:
                    remove(writer, NAME(each))
            assert reader.prefix([NAME], keys) == (held, dram)


def test_a_prefix_is_found_in_a_crowded_table() -> None:
    """The search of a chain goes on from a block's home as the search of a block does."""
    writer, reader = pair(1024)
    keys = [key(n) for n in range(960)]
    for position, each in enumerate(keys):
        assert reader.prefix([NAME], keys) == (position, position)
        put(writer, NAME(each))
        if not reader.find(NAME(each)):
            break
    assert writer.unlisted == 1
    assert position > 500


def test_all_shards_must_hold_a_position() -> None:
    writer, reader = pair()
    keys = [key(n) for n in range(10)]
    for each in keys[:7]:
        put(writer, NAME(each))
    for position, each in enumerate(keys[:4]):
        put(writer, OTHER(each), IN_DRAM if position < 2 else BEHIND_DRAM)
    assert reader.prefix([NAME, OTHER], keys) == (4, 2)
    assert reader.prefix([OTHER, NAME], keys) == (4, 2)
    assert reader.prefix(iter([NAME]), keys) == (7, 7)
    assert reader.prefix([], keys) == (0, 0)
    assert reader.prefix([NAME], []) == (0, 0)


Choice = Callable[[random.Random], bytes]

CHOICES: list[Choice] = [
    # As the store names blocks; few, so that they come and go.
    lambda rng: NAME(key(rng.randrange(150))),
    # All of one page, which stays about full: runs go round its end.
    lambda rng: made(1, rng.randrange(PAGE_WORDS), rng.randrange(2), slots=128),
    # All of one home.
    lambda rng: made(0, 60, rng.randrange(80), slots=128),
    # Each home twice: all words but the first are displaced, and all move up.
    lambda rng: made(1, rng.randrange(34), rng.randrange(2), slots=128),
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("seed", range(4))
def test_changes_leave_exactly_what_they_say(choice: Choice, seed: int) -> None:
    """Against a dictionary. Nothing is lost or there twice when words move up; only where
    a page is full are blocks missing, and then not more of them than they are too many."""
    rng = random.Random(seed)
    writer, reader = pair(128)
    held: dict[bytes, int] = {}
    missed = 0

    def page_of(name: bytes) -> int:
        return writer.home(name) & -PAGE_WORDS

    for _ in range(1000):
        name, info = choice(rng), rng.choice((0, 0, 1, 2, 3))
        put(writer, name, info)
        if info:
            held[name] = info
        else:
            held.pop(name, None)
            assert reader.find(name) == 0
        page = page_of(name)
        here = [each for each in held if page_of(each) == page]
        found = [each for each in here if reader.find(each)]
        assert all(reader.find(each) == held[each] for each in found)
        words = writer._words[page : page + PAGE_WORDS].tolist()
        assert len(found) == sum(map(bool, words))
        if len(here) <= 2 * PAGE_WORDS:
            assert len(found) == min(len(here), PAGE_WORDS)
        missed += len(here) - len(found)
    assert writer.entries == sum(map(bool, words_of(writer)))
    assert bool(missed) == bool(writer.unlisted)
    for name in list(held):
        remove(writer, name)
    assert not any(words_of(writer))
    assert writer.entries == 0
    assert not writer._waiting


def test_made_up_names_cost_a_page_and_no_more() -> None:
    """A tenant that makes names collide fills a page. Others are not touched by it, and
    of a block that found no room nothing is left."""
    writer, reader = pair(1024)
    colliding = [made(3, 17, number) for number in range(500)]
    for name in colliding:
        put(writer, name)
    assert writer.entries == PAGE_WORDS
    assert writer.unlisted == 500 - PAGE_WORDS
    words = words_of(writer)
    assert all(words[3 * PAGE_WORDS : 4 * PAGE_WORDS])
    assert not any(words[: 3 * PAGE_WORDS])
    assert not any(words[4 * PAGE_WORDS :])
    assert [bool(reader.find(name)) for name in colliding] == [True] * 64 + [False] * 436
    for name in colliding:
        remove(writer, name)
    assert not any(words_of(writer))


def test_a_removal_moves_each_word_of_a_page_a_few_times_at_most() -> None:
    """However the names were made: removals run on the server's loop."""

    class Counting:
        def __init__(self, words: memoryview) -> None:
            self.words = words
            self.reads = 0

        def __getitem__(self, at: int) -> int:
            self.reads += 1
            return self.words[at]  # type: ignore[no-any-return]

        def __setitem__(self, at: int, word: int) -> None:
            self.words[at] = word

    rng = random.Random(5)
    writer, _ = pair(128)
    counting = Counting(writer._words)
    writer._words = counting  # type: ignore[assignment]
    worst = 0
    for choice in CHOICES[1:]:
        names: list[bytes] = []
        for _ in range(5000):
            name = choice(rng)
            if name not in names:
                entries = writer.entries
                put(writer, name)
                if writer.entries > entries:
                    names.append(name)
            if writer.entries == PAGE_WORDS:
                counting.reads = 0
                remove(writer, names.pop(rng.randrange(len(names))))
                worst = max(worst, counting.reads)
        for name in names:
            remove(writer, name)
    assert PAGE_WORDS < worst <= 5 * PAGE_WORDS


def test_a_torn_word_is_the_old_one_the_new_one_or_nobodys() -> None:
    """Every mixture of the bytes of two contents of a word, as a reader that races the
    writer might see them."""
    writer, reader = pair()
    rng = random.Random(1)
    one, other, *strangers = (made(2, 5, rng.getrandbits(50)) for _ in range(500))

    def contents(name: bytes, info: int) -> bytes:
        put(writer, name, info)
        at = writer.home(name)
        word = struct.pack("<Q", writer._words[at])
        remove(writer, name)
        assert not any(words_of(writer))
        return word

    def mixtures(old: bytes, new: bytes) -> list[int]:
        picks = range(1 << WORD_BYTES)
        mixed = [bytes((old, new)[p >> i & 1][i] for i in range(WORD_BYTES)) for p in picks]
        return [int.from_bytes(each, "little") for each in mixed]

    free = bytes(WORD_BYTES)
    home = writer.home(one)
    # The same block: exactly the old truth or the new one.
    for old, new in ((1, 2), (1, 3), (3, 2), (2, 1)):
        for word in mixtures(contents(one, old), contents(one, new)):
            writer._words[home] = word
            assert reader.find(one) in (old, new)
    # Coming, going, and one in the other's place: one of the two, or none.
    for before, after in (
        (free, contents(one, 1)),
        (contents(one, 3), free),
        (contents(one, 1), contents(other, 2)),
    ):
        for word in mixtures(before, after):
            writer._words[home] = word
            assert reader.find(one) in (0, 1, 2, 3)
            assert not any(map(reader.find, strangers))


def test_a_word_with_a_flipped_bit_is_not_the_blocks() -> None:
    writer, reader = pair()
    name = NAME(key(1))
    put(writer, name)
    home = writer.home(name)
    word = writer._words[home]
    for bit in range(2, 64):
        writer._words[home] = word ^ 1 << bit
        assert reader.find(name) == 0
    writer._words[home] = word
    assert reader.find(name) == IN_DRAM


def test_random_bytes_in_the_table_find_nothing() -> None:
    writer, reader = pair()
    rng = random.Random(1)
    writer._map[HEADER_BYTES:] = rng.randbytes(table_bytes(1024) - HEADER_BYTES)
    names = [NAME(key(n)) for n in range(2000)]
    assert not any(map(reader.find, names))
    assert reader.prefix([NAME], [key(n) for n in range(2000)]) == (0, 0)


def test_a_client_cannot_write_into_it() -> None:
    """Nor take memory away from under other readers, nor lift the seals."""
    writer, reader = pair()
    put(writer, NAME(key(1)))
    before = os.pread(writer.fd, table_bytes(1024), 0)
    as_clients_get_it = os.dup(writer.fd)
    nbytes = table_bytes(1024)
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = libc.fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    punch_hole, keep_size = 2, 1

    with pytest.raises(PermissionError):
        mmap.mmap(as_clients_get_it, nbytes)
    with pytest.raises(PermissionError):
        os.pwrite(as_clients_get_it, b"x", HEADER_BYTES)
    for size in (0, nbytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(as_clients_get_it, size)
    with pytest.raises(PermissionError):
        os.posix_fallocate(as_clients_get_it, nbytes, 1)
    assert fallocate(as_clients_get_it, punch_hole | keep_size, 0, nbytes) == -1
    with pytest.raises(PermissionError):
        fcntl.fcntl(as_clients_get_it, fcntl.F_ADD_SEALS, 0)
    # Through /proc it can be opened anew, which gives no other rights.
    reopened = os.open(f"/proc/self/fd/{as_clients_get_it}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(reopened, nbytes)
    # A mapping that was made for reading stays one.
    reading = mmap.mmap(as_clients_get_it, nbytes, prot=mmap.PROT_READ)
    with pytest.raises(TypeError):
        reading[0:1] = b"x"
    mprotect = libc.mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = np.frombuffer(reading, np.uint8).ctypes.data
    assert mprotect(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE) == -1

    assert os.pread(writer.fd, nbytes, 0) == before
    assert reader.find(NAME(key(1))) == IN_DRAM
    put(writer, NAME(key(2)))
    assert reader.find(NAME(key(2))) == IN_DRAM


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 5000,
        bytes(table_bytes(PAGE_WORDS)),
        struct.pack("<8sQ8s", b"kvdirec1", 64, b"an epoch").ljust(table_bytes(64), b"\0"),
        struct.pack("<8sQ8s", b"kvdirec2", 128, b"an epoch").ljust(table_bytes(64), b"\0"),
        struct.pack("<8sQ8s", b"kvdirec2", 96, b"an epoch").ljust(table_bytes(96), b"\0"),
        struct.pack("<8sQ8s", b"kvdirec2", 0, b"an epoch").ljust(table_bytes(0), b"\0"),
    ],
)
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


@pytest.mark.parametrize("state", [SUPERSEDED, CLOSED])
def test_a_table_that_was_closed_is_not_believed(state: int) -> None:
    """Not even when the host was started less than two seconds ago."""
    writer, reader = pair()
    assert reader.alive(1)
    writer.close(state)
    assert not reader.alive(1)
    assert not reader.alive(0)
    assert reader.superseded() == (state == SUPERSEDED)
    reader.find(NAME(key(1)))


def test_at_full_load_next_to_nothing_is_lost() -> None:
    slots = 1 << 16
    writer, reader = pair(slots)
    total = int(slots * MAX_LOAD)
    writer.change([(NAME(key(number)), True, False) for number in range(total)])
    assert writer.unlisted == 0
    assert writer.entries == total
    assert all(reader.find(NAME(key(n))) for n in range(total))


def test_a_larger_table_takes_everything_over() -> None:
    """Page by page, full pages and runs that go round a page's end included."""
    small, _ = pair(256)
    large, reader = pair(512)
    names = [NAME(key(n)) for n in range(80)]
    names += [made(2, 60, number, slots=256) for number in range(80)]
    for number, name in enumerate(names):
        put(small, name, 1 + number % 3)
    assert small.unlisted > 0
    seen = DirectoryReader(os.dup(small.fd))
    for page in range(4):
        large.take_pages(small, page, 1)
    found = {name: info for name in names if (info := seen.find(name))}
    assert {name: reader.find(name) for name in found} == found
    assert large.entries == sum(map(bool, words_of(large))) >= small.entries
    for name in names:
        remove(large, name)
    assert not any(words_of(large))


def test_a_larger_table_has_room_for_what_the_smaller_had_none_for() -> None:
    small, _ = pair(256)
    large, reader = pair(512)
    # Two halves of a page that become pages of their own.
    names = [made(2, offset, number, slots=256) for offset in (10, 40) for number in range(50)]
    for name in names:
        put(small, name)
    assert small.entries == PAGE_WORDS
    for page in range(4):
        large.take_pages(small, page, 1)
    assert all(map(reader.find, names))
    assert large.unlisted == 0
