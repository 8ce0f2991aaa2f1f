"""The client's map of extents, over memory files made here."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator

import pytest

from kvstore.errors import BadRequest, InternalError, Unavailable
from kvstore.local.arena import Arena
from kvstore.types import GPU_ONLY
from tests.unit.descriptors import open_descriptors
from tests.unit.local.attach_server import EXTENT_BYTES, sealed_memfd


class Files:
    """Extents by number, and how often each was asked for."""

    def __init__(self) -> None:
        self.files: dict[int, int] = {}
        self.asked: list[int] = []

    def fetch(self, extent: int) -> tuple[int, int]:
        self.asked.append(extent)
        descriptor = self.files.setdefault(extent, sealed_memfd())
        return os.dup(descriptor), EXTENT_BYTES

    def bytes_at(self, address: int, nbytes: int) -> bytes:
        return os.pread(self.files[address // EXTENT_BYTES], nbytes, address % EXTENT_BYTES)


@pytest.fixture
def files() -> Iterator[Files]:
    made = Files()
    yield made
    for descriptor in made.files.values():
        os.close(descriptor)


def mappings() -> int:
    with open("/proc/self/maps") as lines:
        return sum("memfd:extent" in line for line in lines)


def test_writes_arrive_in_the_servers_file_at_that_address(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    address = 5 * EXTENT_BYTES + 8192
    arena.view(address, 5, writable=True)[:] = b"hello"
    assert files.bytes_at(address, 5) == b"hello"
    assert bytes(arena.view(address, 5, writable=False)) == b"hello"
    arena.check_integrity()


def test_readers_cannot_write(files: Files) -> None:
    view = Arena(EXTENT_BYTES, files.fetch).view(0, 16, writable=False)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_an_extent_is_asked_for_once_even_by_many_threads(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    barrier = threading.Barrier(8)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        barrier.wait()
        try:
            for _ in range(200):
                address = chance.randrange(4) * EXTENT_BYTES + seed * 4096
                arena.view(address, 4096, writable=True)[:] = bytes([seed]) * 4096
                assert bytes(arena.view(address, 4096, writable=False)) == bytes([seed]) * 4096
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(files.asked) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(EXTENT_BYTES - 10, 11), (0, EXTENT_BYTES + 1), (0, -1), (EXTENT_BYTES - 1, 1 << 40)],
)
def test_a_range_that_leaves_its_extent_is_refused(files: Files, offset: int, nbytes: int) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    with pytest.raises(BadRequest):
        arena.view(offset, nbytes, writable=False)
    with pytest.raises(BadRequest):
        arena.views([offset], nbytes, writable=False)
    for view in (arena.view, lambda address, *_, **kind: arena.views([address], 16, **kind)):
        with pytest.raises(BadRequest):
            view(-4096, 16, writable=False)
    assert files.asked == []


@pytest.mark.parametrize("address", [GPU_ONLY, GPU_ONLY | 4096, (1 << 64) - 4096])
def test_a_block_in_a_gpus_memory_alone_is_at_no_address_here(files: Files, address: int) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    with pytest.raises(BadRequest, match="GPU"):
        arena.view(address, 16, writable=False)
    with pytest.raises(BadRequest, match="GPU"):
        arena.view_mapped(address, 16, writable=True)
    with pytest.raises(BadRequest, match="GPU"):
        arena.views([0, address], 16, writable=False)
    assert files.asked == [0]


def test_views_of_many_addresses_are_those_of_each(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    addresses = [3 * EXTENT_BYTES + 4096, 0, EXTENT_BYTES - 8, 3 * EXTENT_BYTES]
    for index, view in enumerate(arena.views(addresses, 8, writable=True)):
        view[:] = bytes([index]) * 8
    for index, address in enumerate(addresses):
        assert files.bytes_at(address, 8) == bytes([index]) * 8
    assert all(view.readonly for view in arena.views(addresses, 8, writable=False))
    assert files.asked == [3, 0]


def test_addresses_of_the_largest_extent_number_are_told_apart(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    address = (1 << 64) - EXTENT_BYTES + 4096
    assert arena.locate(address) == ((1 << 48) - 1, 4096)


def test_a_view_outlives_its_extents_mapping_and_then_the_memory_goes(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    # What earlier tests left to the collector must not go in between.
    gc.collect()
    before = mappings()
    view = arena.view(4096, 3, writable=True)
    view[:] = b"abc"
    arena.drop(0)
    arena.drop(0)
    arena.close()
    assert bytes(view) == b"abc"
    assert mappings() == before + 1
    del view
    gc.collect()
    assert mappings() == before


def test_the_number_of_mapped_extents_is_bounded(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch, max_extents=3)
    for extent in range(10):
        arena.view(extent * EXTENT_BYTES, 1, writable=True)[0] = extent
        arena.check_integrity()
    assert arena.mapped_extents == 3
    assert arena.view(0, 1, writable=False)[0] == 0
    assert files.asked == [*range(10), 0]


def test_a_mapping_keeps_no_descriptor(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    arena.view(0, 1, writable=False)
    before = open_descriptors()
    for extent in range(1, 20):
        arena.view(extent * EXTENT_BYTES, 1, writable=False)
    assert open_descriptors() == before + 19  # The test's own files.


def test_a_closed_arena_maps_nothing_more(files: Files) -> None:
    arena = Arena(EXTENT_BYTES, files.fetch)
    arena.view(0, 1, writable=False)
    arena.close()
    with pytest.raises(Unavailable):
        arena.view(0, 1, writable=False)
    arena.check_integrity()


@pytest.mark.parametrize(
    ("nbytes", "seals"), [(EXTENT_BYTES // 2, 6), (EXTENT_BYTES * 2, 6), (EXTENT_BYTES, 0)]
)
def test_memory_that_could_end_early_is_refused(nbytes: int, seals: int) -> None:
    """A copy past a file's end is a SIGBUS that kills the whole engine."""
    before = open_descriptors()
    arena = Arena(EXTENT_BYTES, lambda _: (sealed_memfd(nbytes, seals=seals), EXTENT_BYTES))
    with pytest.raises(InternalError):
        arena.view(0, 1, writable=False)
    assert arena.mapped_extents == 0
    assert open_descriptors() == before


def test_an_extent_that_cannot_be_had_is_asked_for_again(files: Files) -> None:
    failing = [True]

    def fetch(extent: int) -> tuple[int, int]:
        if failing.pop() if failing else False:
            raise Unavailable("hung")
        return files.fetch(extent)

    arena = Arena(EXTENT_BYTES, fetch)
    with pytest.raises(Unavailable):
        arena.view(0, 1, writable=False)
    assert arena.view_mapped(0, 1, writable=False) is None
    assert arena.view(0, 1, writable=False).nbytes == 1


@pytest.mark.parametrize("extent_bytes", [0, -4096, 3 << 20])
def test_an_extent_size_that_is_no_power_of_two_is_refused(extent_bytes: int) -> None:
    with pytest.raises(BadRequest):
        Arena(extent_bytes, lambda _: (0, 0))
