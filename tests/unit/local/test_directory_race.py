"""A writer and readers that race in processes of their own, over crowded tables that
are replaced all the time.

Blocks are of four kinds, and their kind says what an answer may be:

  steady     listed in every table from its first moment on, with an info of its own;
             their words move when others' are removed. A search may miss one only in
             passing: searched for ten times more in the same table, it must be found.
  turning    like steady, but the info changes all the time between 1, 2 and 3.
  fleeting   listed and removed all the time, always with an info of its own.
  absent     never listed.

An answer is wrong when an absent block is found; when a steady or fleeting one is found
with another info than its own; when a steady or turning one is missed eleven times in
a row; when a chain of steady blocks that absent ones follow is found to be longer than
its steady part, or shorter eleven times in a row.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine

import pytest

from kvstore import listing as listing_module
from kvstore.clock import MonotonicClock
from kvstore.listing import Listing
from kvstore.local.directory import MOST_INFO, SUPERSEDED
from kvstore.naming import namer

log = logging.getLogger(__name__)

SECRET, LAYOUT = b"secret", b"layout"
STEADY, TURNING, FLEETING, ABSENT = range(60), range(60, 70), range(70, 140), range(140, 200)
FIRST_SLOTS, MOST_SLOTS = 128, 1024
"""In the first tables 100 and more of 128 words are in use, and pages are full at times."""

READER = """
import random, socket, sys, time
from kvstore.clock import MonotonicClock
from kvstore.client.presence import Presence
from kvstore.naming import namer
from tests.unit.local.test_directory_race import *

seconds, seed = float(sys.argv[2]), int(sys.argv[3])
server = socket.socket(fileno=int(sys.argv[1]))

def fetch(timeout_s):
    server.settimeout(30)
    server.send(b"?")
    data, descriptors, _, _ = socket.recv_fds(server, 1, 1)
    if not descriptors:
        raise SystemExit("the writer has gone")
    return descriptors[0], SECRET

presence = Presence(fetch, MonotonicClock(), 30)
rng, name = random.Random(seed), namer(SECRET, LAYOUT)
searches = found = missed = passing = chains = wrong = tables = 0

def current():
    # As a lookup does it; tables that were left without a successor are asked for anew.
    global presence, tables
    before = presence._reader
    while presence.lookup([], [], lambda: True) is None:
        presence = Presence(fetch, MonotonicClock(), 30)
    tables += presence._reader is not before
    return presence._reader

AGAIN = range(10)

steady = [key(n) for n in STEADY]
def enough():
    return min(searches, found, missed) > 1000 and chains > 10 and tables > 2

end = time.monotonic() + seconds
# Longer on a machine that had other things to do.
while time.monotonic() < end or (not enough() and time.monotonic() < end + 50):
    reader = current()
    for _ in range(200):
        number = rng.randrange(ABSENT.stop)
        stored = name(key(number))
        info = reader.find(stored)
        searches += 1
        found += bool(info)
        missed += not info
        if number in ABSENT:
            wrong += bool(info)
        elif number in TURNING or not info:
            pass
        else:
            wrong += info != info_of(number)
        if not info and number < FLEETING.start:
            passing += 1
            wrong += not any(reader.find(stored) for _ in AGAIN)
    length = rng.randrange(1, len(steady) + 1)
    keys = steady[:length] + [key(n) for n in ABSENT]
    held = reader.prefix([name], keys).held
    chains += 1
    wrong += held > length
    if held < length:
        passing += 1
        wrong += not any(reader.prefix([name], keys).held == length for _ in AGAIN)
print(searches, found, missed, passing, chains, tables, wrong)
"""


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def info_of(number: int) -> int:
    return 1 + number % MOST_INFO


class Writer:
    """Changes a directory as fast as it can, and hands it out to whoever asks."""

    def __init__(self, readers: list[socket.socket]) -> None:
        name = namer(SECRET, LAYOUT)
        self.names = [name(key(number)) for number in range(FLEETING.stop)]
        self.changes = self.grown = self.restarted = 0
        self._readers = readers
        self._rng = random.Random(99)
        self._infos = {number: info_of(number) for number in (*STEADY, *TURNING)}
        self._growing: Coroutine[None, None, None] | None = None
        self._listing = self._new_listing()

    def _new_listing(self) -> Listing:
        made = Listing(0, b"an epoch", MonotonicClock())
        # In the order of their numbers: fleeting ones find no room if anyone does not.
        for number, info in sorted(self._infos.items()):
            made.change([self._change(number, info)])
            assert number in FLEETING or not made.unlisted
        return made

    def _change(self, number: int, info: int) -> tuple[bytes, bool, bool]:
        return self.names[number], bool(info & 1), bool(info & 2)

    def step(self) -> None:
        for _ in range(300):
            number = self._rng.randrange(TURNING.start, FLEETING.stop)
            info = info_of(number) * self._rng.randrange(2)
            if number in TURNING:
                info = self._rng.randrange(1, MOST_INFO + 1)
            self._infos[number] = info
            self._listing.change([self._change(number, info)])
            self.changes += 1
        self._replace()
        self._listing.beat()
        for reader in self._readers:
            try:
                asked = reader.recv(1)
            except BlockingIOError:
                continue
            if asked:
                socket.send_fds(reader, [b"!"], [self._listing.fd])

    def _replace(self) -> None:
        """A page of a larger table, or begin one, or go back to a small one."""
        if self._growing is not None:
            try:
                self._growing.send(None)
            except StopIteration:
                self._growing = None
                self.grown += 1
        elif self._rng.random() < 0.02:
            table = self._listing._table
            if table.slots < MOST_SLOTS:
                self._growing = self._listing.grow()
                return
            # Half of the time as if the server had been started again.
            fresh = self._new_listing()
            if self._rng.random() < 0.5:
                table.close(SUPERSEDED)
            else:
                self._listing.close()
            self._listing = fresh
            self.restarted += 1


@pytest.mark.parametrize("seconds", [3, pytest.param(120, marks=pytest.mark.soak)])
@pytest.mark.timeout(300)
def test_readers_that_race_the_writer_get_no_wrong_answer(
    seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_module, "MIN_SLOTS", FIRST_SLOTS)
    monkeypatch.setattr(listing_module, "PAGES_A_STEP", 1)
    ours: list[socket.socket] = []
    readers: list[subprocess.Popen[str]] = []
    for seed in range(2):
        our_end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        our_end.setblocking(False)
        ours.append(our_end)
        command = [sys.executable, "-c", READER, str(theirs.fileno()), str(seconds), str(seed)]
        readers.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                text=True,
                cwd=os.path.join(os.path.dirname(__file__), *[os.pardir] * 3),
            )
        )
        theirs.close()
    writer = Writer(ours)
    end = time.monotonic() + seconds + 60
    while time.monotonic() < end and any(reader.poll() is None for reader in readers):
        writer.step()
    log.info(
        "%d changes, %d tables outgrown, %d given up",
        writer.changes,
        writer.grown,
        writer.restarted,
    )
    for reader in readers:
        out, _ = reader.communicate(timeout=60)
        log.info("searches, found, missed, passing, chains, tables, wrong: %s", out.strip())
        assert reader.returncode == 0
        searches, found, missed, _passing, chains, tables, wrong = map(int, out.split())
        assert wrong == 0
        assert min(searches, found, missed) > 1000
        assert chains > 10
        assert tables > 2
    for our_end in ours:
        our_end.close()
    writer._listing.close()
