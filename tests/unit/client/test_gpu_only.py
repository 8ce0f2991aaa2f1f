"""Blocks that are in a GPU's memory alone: a client never takes their addresses for memory of
the server's, nor for damage."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvstore.client import calls, connecting, gets
from kvstore.client.lease import LeaseBase
from kvstore.client.link import Budget
from kvstore.clock import ManualClock
from kvstore.errors import BadRequest, LeaseExpired
from kvstore.types import GPU_ONLY, ChainQuery
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.unit.client.fake import EXTENT_BYTES, Driver, FakeServer
from tests.unit.client.test_flows import (
    KINDS,
    LAYOUT,
    N,
    check_nothing_held,
    data,
    get,
    key,
    make_driver,
    put,
    trace,
)

GONE = [GPU_ONLY, GPU_ONLY | EXTENT_BYTES, (1 << 64) - 4096]
"""Such addresses: at offset 0, what is an extent's without the bit, the last there is."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer(ManualClock())
    yield made
    os.close(made.extent)


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, server: FakeServer) -> Driver:
    made = make_driver(server, request.param)
    put(made, 1, 2, 3)
    return made


def lift(driver: Driver, number: int, address: int) -> None:
    """The block is in a GPU's memory alone from now on."""
    driver.server.blocks[key(number)] = (address, driver.server.blocks[key(number)][1])


def lease(driver: Driver, *numbers: int) -> LeaseBase:
    chains = [ChainQuery([LAYOUT.id], [key(number) for number in numbers])]
    budget = Budget(driver.core.timeout_s)
    grants, link = driver.run(calls.acquire(driver.core, budget, chains, 0, reader=b"engine"))
    return LeaseBase(driver.core, link, grants[0], [LAYOUT])


def test_an_acquire_names_its_reader_and_others_name_none(driver: Driver) -> None:
    asked: list[pb.AcquireRequest] = []
    acquire = driver.server.Acquire

    def noted(request: pb.AcquireRequest) -> pb.AcquireResponse:
        asked.append(request)
        return acquire(request)

    driver.server.Acquire = noted  # type: ignore[method-assign]
    lease(driver, 1)
    get(driver, 1)
    assert [request.reader for request in asked] == [b"engine", b""]


@pytest.mark.parametrize("address", GONE)
def test_a_get_misses_them_without_a_copy_or_a_word_of_damage(driver: Driver, address: int) -> None:
    lift(driver, 2, address)
    assert get(driver, 2) == [None]
    assert get(driver, 1, 2, 3)[1] is None
    assert driver.server.reported == []
    assert driver.core.counters.corrupt == 0
    check_nothing_held(driver.server)
    assert get(driver, 3) == [data(3)]


@pytest.mark.parametrize("address", GONE)
def test_a_lease_reads_them_as_nothing_and_the_others_as_they_are(
    driver: Driver, address: int
) -> None:
    lift(driver, 2, address)
    held = lease(driver, 1, 2, 3)
    assert held.addresses[1] == address
    read = [driver.run(gets.read_lease(driver.core, held, index)) for index in range(3)]
    assert read == [data(1), None, data(3)]
    assert driver.server.reported == []
    assert driver.core.counters.corrupt == 0


def test_after_its_end_a_lease_says_so_of_them_too(driver: Driver) -> None:
    lift(driver, 1, GPU_ONLY)
    held = lease(driver, 1)
    held._released = True
    with pytest.raises(LeaseExpired):
        driver.run(gets.read_lease(driver.core, held, 0))


@pytest.mark.parametrize("address", GONE)
def test_no_view_is_given_of_them_and_no_memory_asked_for(driver: Driver, address: int) -> None:
    lift(driver, 1, address)
    held = lease(driver, 1)
    with pytest.raises(BadRequest):
        held._view(0)
    with pytest.raises(BadRequest):
        driver.run(connecting.slot(driver.core, address, N, None))
    if driver.local:
        with pytest.raises(BadRequest, match="GPU"):
            connecting.slot_at_hand(driver.core, address, N, None)


def test_they_are_left_out_of_a_report_of_damage(driver: Driver) -> None:
    whole = driver.server.blocks[key(1)][0]
    driver.run(calls.report_damage(driver.core, [GPU_ONLY, whole, *GONE]))
    assert driver.server.reported == [whole]
    assert trace(driver, lambda: driver.run(calls.report_damage(driver.core, GONE))) == []
