"""The directory: which blocks the store holds, readable without asking it.

The server writes a table into a sealed memfd; clients map it read-only (the seal
F_SEAL_FUTURE_WRITE makes the kernel refuse them anything else) and search it. What
they find is advice: a lookup costs no RPC, and an acquire confirms it.

The table. After a header of 4096 bytes come words of 64 bits, a power of two of
them. Let q be the first eight bytes of a block's stored key, as a little-endian
number. Stored keys are outputs of a keyed hash, so q needs no further hashing:

    word = q XOR info       info: 1 in DRAM, 2 behind it, 3 both; 0: not listed
    home = the highest bits of q, as many as tell the words of the table apart

Every 64 words are a page, and every page is a hash table of its own: linear probing
(Knuth, TAOCP vol. 3, 6.4) that goes on at the page's begin when it comes to its end.
A word of 0 is free and ends a search. So whatever keys a tenant finds by trying (it
knows its own secret), a search and a listing look at one page at most, a removal goes
round it a few times, and names of its own that agree in 62 bits count as one. A block
whose page is full is not listed, and lookups miss it, until there is room: the writer
remembers a page's worth of them for each. By chance that does not
happen: at the greatest load 19 words of a page are in use, give or take four. A tenant
that has n blocks with keys made for it can fill n / 64 pages, and hide what belongs
there from lookups; from acquires it can hide nothing.

The memory model. There are no locks, and no order is assumed between the writer's
stores and a reader's loads. An aligned word is one store and one load on every
machine this is likely to run on, but even that is not needed: suppose that a reader
sees some bytes of an old and some of a new content of a word.
  * Old and new speak of the same block: they differ in the two bits of info, which
    lie in one byte, so the reader sees one of them.
  * They speak of two blocks: what it sees agrees with a third block's q, but for
    the two bits, with a probability of 2^-62. With one of the two blocks' own it may
    agree, with the info of either, while that block is coming or going.
Nothing is missed for good, either: a search passes words that are not 0, and between
a block's home and its word there is never a 0. That is why removal closes the gap from
behind (Knuth's algorithm R): each word that has to move is first copied to its new
place, and the last place that was emptied is zeroed at the end. A reader that was
past the new place and finds the old one overwritten misses that block, this once.

So what a reader finds may be out of date in both directions, which is what advice may
be, and is otherwise wrong once in 2^62 / 64 searches, which costs an acquire that is
answered with less. Other bytes than those asked for can never come of it: addresses
are not in the table.

A table is replaced by a larger one when it fills up, and dies with its server. One
word of the header says so: `beat` is the server's last sign of life or, once the
table is not current, SUPERSEDED or CLOSED, which look like signs of life from long
ago. A reader looks at it before each search, and treats everything as absent until
it has mapped the successor.

Whose blocks. Stored keys are made with a tenant's secret. A client has its own
tenant's only, so of others' words it learns nothing but how many there are.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.naming import Namer
from kvstore.types import ChainPresence

HEADER_BYTES = 4096
WORD_BYTES = 8
PAGE_WORDS = 64

MAGIC = b"kvdirec2"

IN_DRAM = 1
BEHIND_DRAM = 2
MOST_INFO = 3

STALE_AFTER_NS = 2_000_000_000
"""Without a beat for this long the server counts as gone."""
SUPERSEDED = -(1 << 62)
CLOSED = -(1 << 61)

FILLED_AT_ONCE = 4096
"""Pages: as many words as lie in a cache, and no more memory than that beside the table."""

MAX_LOAD = 0.3
"""Share of words in use beyond which a table should be replaced. A lookup of a partly held
chain takes 10 to 20 % longer at 0.5 than at 0.25."""

_HEADER = struct.Struct("<8sQ8s")
_BEAT_WORD = 64
"""In a cache line of its own: it changes all the time, the rest of the header never."""

F_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1; not among the constants of Python 3.11."""

_q = struct.Struct("<Q8x").unpack
_PAGE = -PAGE_WORDS
_OFFSET = PAGE_WORDS - 1

# Half the cost of calling the class, and a large part of a lookup's.
_presence = partial(tuple.__new__, ChainPresence)
_NOTHING = ChainPresence(0, 0)


class DirectoryHeader(NamedTuple):
    """`slots`: words of the table, a power of two."""

    slots: int
    epoch: bytes


def table_bytes(slots: int) -> int:
    """Size of a table's memfd."""
    return HEADER_BYTES + slots * WORD_BYTES


class DirectoryWriter:
    """The server's side of one table. Not thread-safe.

    `slots` is a power of two and at least a page; `epoch` is 8 bytes. The memfd is
    this object's until `close`; give clients duplicates of `fd` only.
    """

    def __init__(self, slots: int, epoch: bytes, now_ns: int) -> None:
        if slots < PAGE_WORDS or slots & (slots - 1):
            raise ValueError(f"the number of slots is a power of two, and {PAGE_WORDS} or more")
        self.slots = slots
        self.entries = 0
        self.unlisted = 0
        """How often a block found its page full. Lookups miss it then."""
        # By page: infos, by q, of blocks that wait for room there. Only full pages
        # have any, and PAGE_WORDS of them at most.
        self._waiting: dict[int, dict[int, int]] = {}
        self._shift = _shift(slots)
        self.fd = os.memfd_create("kvstore-directory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, table_bytes(slots))
            self._map = mmap.mmap(self.fd, table_bytes(slots))
            # Our own mapping is writable and stays so; every later one is not.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise
        self._map[: _HEADER.size] = _HEADER.pack(MAGIC, slots, epoch)
        self._beat, self._words = _beat_and_words(self._map)
        self.beat(now_ns)

    @property
    def load(self) -> float:
        """Share of the words in use."""
        return self.entries / self.slots

    def beat(self, now_ns: int) -> None:
        """Show that the server lives."""
        self._beat[0] = now_ns

    def change(self, changes: Iterable[tuple[bytes, bool, bool]]) -> None:
        """Blocks came to or went from a tier: (stored key, in DRAM, behind DRAM)."""
        # Written out for the usual case, in which a block's home is free or its own:
        # this is what the server's loop pays for every block that comes and goes.
        words, shift = self._words, self._shift
        for stored_key, in_dram, behind in changes:
            (q,) = _q(stored_key)
            home = q >> shift
            word = words[home]
            if not (in_dram or behind):
                if word:
                    self._remove(q, home)
            elif not word:
                words[home] = q ^ (in_dram | behind << 1)
                self.entries += 1
            elif word ^ q <= MOST_INFO:
                words[home] = q ^ (in_dram | behind << 1)
            else:
                self._put(q, in_dram | behind << 1, home)

    def fill(self, numbers: npt.NDArray[np.uint64], info: int) -> None:
        """List many in a table that is empty, by their numbers (`numbers_of`), which are
        sorted in place.

        As if one came after the other, in the order of their homes: then each goes to its
        home or right behind the one before it. So it is done for the first of every page at
        once, then for the second of every page, ... The few that come to their page's end
        are listed one by one."""
        numbers.sort()
        pages = self.slots // PAGE_WORDS
        for first in range(0, pages, FILLED_AT_ONCE):
            last = min(first + FILLED_AT_ONCE, pages)
            bounds = [page * PAGE_WORDS << self._shift for page in (first, last)]
            begin = np.searchsorted(numbers, np.uint64(bounds[0]))
            end = len(numbers) if last == pages else np.searchsorted(numbers, np.uint64(bounds[1]))
            self._fill_pages(numbers[begin:end], info, first, last)

    def _fill_pages(
        self, numbers: npt.NDArray[np.uint64], info: int, first: int, last: int
    ) -> None:
        # Names that agree in all that is listed count as one.
        numbers = numbers[np.concatenate(([True], np.diff(numbers >> 2) != 0))[: len(numbers)]]
        homes = (numbers >> self._shift).astype(np.int64)
        begins = np.searchsorted(homes, np.arange(first, last) * PAGE_WORDS)
        counts = np.diff(begins, append=len(numbers))
        latest = np.full(last - first, -1)
        left: list[int] = []
        pages = np.flatnonzero(counts)
        words = np.frombuffer(self._words, np.uint64)
        for rank in range(PAGE_WORDS):
            pages = pages[counts[pages] > rank]
            if not len(pages):
                break
            rows = begins[pages] + rank
            at = np.maximum(homes[rows], latest[pages] + 1)
            latest[pages] = at
            inside = at < (first + pages + 1) * PAGE_WORDS
            words[at[inside]] = numbers[rows[inside]] ^ np.uint64(info)
            self.entries += int(inside.sum())
            left += rows[~inside].tolist()
        for page in np.flatnonzero(counts > PAGE_WORDS).tolist():
            left += range(begins[page] + PAGE_WORDS, begins[page] + counts[page])
        del words
        for q in numbers[left].tolist():
            self._put(q, info, q >> self._shift)

    def home(self, stored_key: bytes) -> int:
        """Where the search for a block begins."""
        return int(_q(stored_key)[0]) >> self._shift

    def _put(self, q: int, info: int, home: int) -> None:
        at, word = _place(self._words, q, home)
        if at < 0:
            self.unlisted += 1
            waiting = self._waiting.setdefault(home & _PAGE, {})
            if q in waiting or len(waiting) < PAGE_WORDS:
                waiting[q] = info
            return
        self._words[at] = q ^ info
        self.entries += not word

    def _remove(self, q: int, home: int) -> None:
        words, shift = self._words, self._shift
        hole, word = _place(words, q, home)
        if hole < 0:
            self._wait_no_more(q, home)
        if hole < 0 or not word:
            return
        self.entries -= 1
        at, stay = hole, 0
        while stay < _OFFSET:
            at = at & _PAGE | at + 1 & _OFFSET
            word = words[at]
            if not word:
                break
            # Whether the hole is between the word's home and the word.
            if at - (word >> shift) & _OFFSET >= at - hole & _OFFSET:
                words[hole] = word
                hole, stay = at, 0
            else:
                # A page without a free word has to be gone round until nothing moves.
                stay += 1
        words[hole] = 0
        waiting = self._waiting.get(home & _PAGE)
        if waiting:
            q = next(iter(waiting))
            info = waiting[q]
            self._wait_no_more(q, home)
            self._put(q, info, q >> shift)

    def _wait_no_more(self, q: int, home: int) -> None:
        waiting = self._waiting.get(home & _PAGE, {})
        waiting.pop(q, None)
        if not waiting:
            self._waiting.pop(home & _PAGE, None)

    def take_pages(self, old: DirectoryWriter, first: int, pages: int) -> None:
        """Copy pages of a table half as large. Their words go to as many pairs of
        pages here, which must still be empty, and all find room there. So may blocks
        that found none in the old table."""
        assert old.slots * 2 == self.slots
        begin, end = first * PAGE_WORDS, (first + pages) * PAGE_WORDS
        fresh = [0] * (2 * (end - begin))
        shift, base = self._shift, 2 * begin
        for word in filter(None, old._words[begin:end].tolist()):
            at = (word >> shift) - base
            while fresh[at]:
                at = at & _PAGE | at + 1 & _OFFSET
            fresh[at] = word
            self.entries += 1
        self._words[base : 2 * end] = memoryview(array("Q", fresh))
        if old._waiting:
            for page in range(begin, end, PAGE_WORDS):
                for q, info in old._waiting.get(page, {}).items():
                    self._put(q, info, q >> shift)

    def close(self, state: int = CLOSED) -> None:
        """Tell readers, then let go. What they have mapped stays as it is."""
        self._beat[0] = state
        self._beat.release()
        self._words.release()
        self._map.close()
        os.close(self.fd)


class DirectoryReader:
    """A client's side of one table.

    Takes `fd` over. Searches may run in several threads at once. Raises ValueError
    when `fd` is not a table that this code can read.
    """

    def __init__(self, fd: int) -> None:
        try:
            size = os.fstat(fd).st_size
            if size < HEADER_BYTES:
                raise ValueError("too small for a directory")
            table = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        magic, slots, epoch = _HEADER.unpack(table[: _HEADER.size])
        if (
            magic != MAGIC
            or slots < PAGE_WORDS
            or slots & (slots - 1)
            or table_bytes(slots) != size
        ):
            raise ValueError("not a directory of this version")
        self.header = DirectoryHeader(slots, epoch)
        # The mapping goes with the last reference to these.
        self.beat, self._words = _beat_and_words(table)
        """Its one word: nanoseconds, see the module's text."""
        self._shift = _shift(slots)

    def alive(self, now_ns: int) -> bool:
        """Whether the table is current: neither replaced nor left by its server."""
        return now_ns - self.beat[0] < STALE_AFTER_NS

    def superseded(self) -> bool:
        """Whether there is a successor to map."""
        return self.beat[0] == SUPERSEDED

    def find(self, stored_key: bytes) -> int:
        """What is said of a block: IN_DRAM, BEHIND_DRAM, both, or 0 when absent."""
        words = self._words
        (q,) = _q(stored_key)
        at = home = q >> self._shift
        info: int = words[at] ^ q
        while info > MOST_INFO:
            if info == q:  # The word is 0.
                return 0
            at = at & _PAGE | at + 1 & _OFFSET
            if at == home:
                return 0
            info = words[at] ^ q
        return info

    def prefix(self, namers: Iterable[Namer], keys: Sequence[bytes]) -> ChainPresence:
        """How much of a chain all layouts hold; `namers` has one for each.

        By binary search, which is exact where presence is a prefix (as the store
        keeps it); where a block was lost in the middle it may report more or less.
        `keys` are 32 bytes each.
        """
        held = in_dram = 0
        most = most_dram = len(keys)
        if not most:
            return _NOTHING
        for name in namers:
            # The two usual answers first: nothing, and everything.
            first = self.find(name(keys[0]))
            if not first:
                return _NOTHING
            held = most
            last = self.find(name(keys[held - 1]))
            if not last:
                held, last = self._search(name, keys, first, held - 1, IN_DRAM | BEHIND_DRAM)
            if last & IN_DRAM:
                in_dram = held if held < most_dram else most_dram
            elif first & IN_DRAM:
                high = held if held < most_dram else most_dram
                in_dram = self._search(name, keys, first, high, IN_DRAM)[0]
            else:
                in_dram = 0
            most, most_dram = held, in_dram
        return _presence((held, in_dram))

    def _search(
        self, name: Namer, keys: Sequence[bytes], first: int, high: int, wanted: int
    ) -> tuple[int, int]:
        """How many of keys[:high] are found with one of the bits `wanted`, and what is
        said of the last of those. The first is known to be, with `first`."""
        # `find` written out: eleven of these are what a lookup of 2,000 blocks costs.
        words, shift, q_of = self._words, self._shift, _q
        low, last = 1, first
        while low < high:
            middle = (low + high) // 2
            (q,) = q_of(name(keys[middle]))
            at = home = q >> shift
            info = words[at] ^ q
            while info > MOST_INFO:
                if info == q:
                    info = 0
                    break
                at = at & _PAGE | at + 1 & _OFFSET
                info = 0 if at == home else words[at] ^ q
            if info & wanted:
                low, last = middle + 1, info
            else:
                high = middle
        return low, last


def numbers_of(stored_keys: bytes) -> npt.NDArray[np.uint64]:
    """The numbers under which blocks are listed, of their stored keys one after the other."""
    return np.frombuffer(stored_keys, "<u8")[::2]


def _shift(slots: int) -> int:
    """By how much a q is shifted to the right to become a home."""
    return 64 - slots.bit_length() + 1


def _beat_and_words(table: mmap.mmap) -> tuple[memoryview, memoryview]:
    """The word of the header that changes, signed, and the table's words."""
    raw = memoryview(table)
    beat = raw[_BEAT_WORD * WORD_BYTES : (_BEAT_WORD + 1) * WORD_BYTES]
    return beat.cast("q"), raw[HEADER_BYTES:].cast("Q")


def _place(words: memoryview, q: int, home: int) -> tuple[int, int]:
    """Where a block's word is, and the word; failing that the first free place and 0;
    failing that -1 and a word that is not the block's."""
    at = home
    while True:
        word = words[at]
        if word ^ q <= MOST_INFO or not word:
            return at, word
        at = at & _PAGE | at + 1 & _OFFSET
        if at == home:
            return -1, word
