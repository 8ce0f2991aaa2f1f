"""The sealed memfds of `DramTier`: what clients cannot do, what the machine gets back."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvstore.errors import TierFailed, TierFull
from kvstore.tiers import dram
from kvstore.tiers.dram import DramTier
from tests.unit.descriptors import open_descriptors

EXTENT_BYTES = 4 << 20


@pytest.fixture
def tier() -> Iterator[DramTier]:
    made = DramTier(EXTENT_BYTES, 4 * EXTENT_BYTES, spare_extents=2)
    yield made
    made.check_integrity()
    made.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def held_by_machine(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_a_client_can_neither_shrink_nor_grow_nor_reseal_an_extent(tier: DramTier) -> None:
    tier.open_extent(0)
    fd = os.dup(tier.extent_fd(0))
    try:
        for nbytes in (0, EXTENT_BYTES - 4096, EXTENT_BYTES + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, nbytes)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", EXTENT_BYTES)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(fd)


def test_a_client_sees_what_the_server_writes_and_the_other_way_round(tier: DramTier) -> None:
    tier.open_extent(1)
    with mmap.mmap(tier.extent_fd(1), EXTENT_BYTES) as client:
        tier.view(EXTENT_BYTES + 8192, 5)[:] = b"hello"
        assert client[8192:8197] == b"hello"
        client[0:3] = b"abc"
        assert bytes(tier.view(EXTENT_BYTES, 3)) == b"abc"


def test_closing_returns_the_memory_even_while_a_client_maps_it(tier: DramTier) -> None:
    tier.open_extent(0)
    tier.view(0, EXTENT_BYTES)[:] = b"x" * EXTENT_BYTES
    fd = os.dup(tier.extent_fd(0))
    client = mmap.mmap(fd, EXTENT_BYTES)
    try:
        assert held_by_machine(fd) == EXTENT_BYTES
        tier.close_extent(0)
        assert held_by_machine(fd) == 0
        assert client[:4] == bytes(4)
    finally:
        client.close()
        os.close(fd)


def test_closing_returns_the_memory_while_the_server_itself_holds_a_view(tier: DramTier) -> None:
    tier.open_extent(0)
    fd = os.dup(tier.extent_fd(0))
    view = tier.view(0, EXTENT_BYTES)
    view[:] = b"x" * EXTENT_BYTES
    tier.close_extent(0)
    assert held_by_machine(fd) == 0
    os.close(fd)
    assert bytes(view[:4]) == bytes(4)


def test_no_descriptor_is_left_when_extents_come_and_go() -> None:
    tier = DramTier(EXTENT_BYTES, 2 * EXTENT_BYTES, spare_extents=0)
    before = open_descriptors()
    for extent in range(20):
        tier.open_extent(extent)
        tier.close_extent(extent)
    assert open_descriptors() == before
    tier.close()


def test_first_writes_into_a_new_extent_do_not_fault(tier: DramTier) -> None:
    eventually(lambda: tier.spare_extents == 2)
    for extent in range(2):
        tier.open_extent(extent)
        view = tier.view(extent * EXTENT_BYTES, EXTENT_BYTES)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for offset in range(0, EXTENT_BYTES, 4096):
            view[offset] = 1
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
        assert faults < EXTENT_BYTES // 4096 // 10


def test_spares_are_made_ahead_and_count_towards_the_capacity(tier: DramTier) -> None:
    eventually(lambda: tier.spare_extents == 2)
    assert tier.held_bytes == 2 * EXTENT_BYTES
    for extent in range(4):
        tier.open_extent(extent)
        assert tier.held_bytes <= 4 * EXTENT_BYTES
    eventually(lambda: tier.held_bytes == 4 * EXTENT_BYTES)
    assert tier.spare_extents == 0
    with pytest.raises(TierFull):
        tier.open_extent(4)
    tier.close_extent(0)
    eventually(lambda: tier.spare_extents == 1)


def test_capacity_holds_while_many_threads_open_and_close(tier: DramTier) -> None:
    over: list[int] = []

    def work(worker: int) -> None:
        for turn in range(15):
            extent = worker * 1000 + turn
            tier.open_extent(extent)
            if tier.held_bytes > 4 * EXTENT_BYTES:
                over.append(extent)
            tier.close_extent(extent)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over == []


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOMEM, TierFull), (errno.EMFILE, TierFull), (errno.EIO, TierFailed)]
)
def test_memory_refused_is_an_error_and_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    tier = DramTier(EXTENT_BYTES, 4 * EXTENT_BYTES, spare_extents=0)
    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(dram, "_populate", refuse)
        with pytest.raises(error):
            tier.open_extent(0)
    assert tier.held_bytes == 0
    assert open_descriptors() == before
    tier.open_extent(0)
    tier.close()


def test_a_refused_spare_does_not_end_the_making_of_spares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = threading.Event()

    def refuse(*args: object) -> None:
        refused.set()
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patched:
        patched.setattr(dram, "_populate", refuse)
        tier = DramTier(EXTENT_BYTES, 4 * EXTENT_BYTES, spare_extents=1)
        assert refused.wait(10)
        eventually(lambda: tier.held_bytes == 0)
    tier.open_extent(0)
    eventually(lambda: tier.spare_extents == 1)
    tier.close()
