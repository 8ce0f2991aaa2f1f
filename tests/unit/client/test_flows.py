"""What happens in which order, and what is given back when it goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvstore.client import calls, transfers
from kvstore.client.lease import Layout, LeaseBase
from kvstore.client.link import Budget
from kvstore.client.steps import Step, Work
from kvstore.clock import ManualClock
from kvstore.errors import (
    BadRequest,
    Conflict,
    LeaseExpired,
    NoSession,
    ReservationExpired,
    Unavailable,
)
from kvstore.types import ChainQuery, LayoutSpec, PutOutcome
from tests.unit.client.fake import Driver, FakeServer, gone, name_of, nothing

N = 1000
SPEC = LayoutSpec(model="m", dtype="f", block_tokens=1, block_bytes=N)
LAYOUT = Layout(SPEC.layout_id, SPEC)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def data(number: int) -> bytes:
    return bytes([number]) * N


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer(ManualClock())
    yield made
    os.close(made.extent)


@pytest.fixture(params=["local", "remote"])
def driver(request: pytest.FixtureRequest, server: FakeServer) -> Driver:
    made = Driver(server, local=request.param == "local", block_bytes=N)
    made.run(calls.register_layout(made.core, SPEC))
    server.steps.clear()
    return made


def put(driver: Driver, *numbers: int) -> list[PutOutcome]:
    keys, datas = [key(n) for n in numbers], [data(n) for n in numbers]
    return driver.run(transfers.put_many(driver.core, LAYOUT, keys, datas, b"", 0))


def get(driver: Driver, *numbers: int) -> list[transfers.Got]:
    return driver.run(transfers.get_many(driver.core, LAYOUT, [key(n) for n in numbers], None))


def check_nothing_held(server: FakeServer) -> None:
    assert server.leases == {}
    assert server.reservations == {}


def test_a_put_reserves_writes_and_commits_once_for_all_blocks(driver: Driver) -> None:
    assert put(driver, 1, 2, 3) == [PutOutcome.STORED] * 3
    writing = [] if driver.local else ["Write"]
    assert driver.server.steps == ["Reserve", *writing, "Commit"]
    assert driver.server.stored(key(2), N) == data(2)


def test_a_get_acquires_and_releases_once_for_all_blocks(driver: Driver) -> None:
    put(driver, 1, 2)
    driver.server.steps.clear()
    assert get(driver, 1, 9, 2) == [data(1), None, data(2)]
    reading = [] if driver.local else ["Read", "Read"]
    assert driver.server.steps == ["Acquire", *reading, "Release"]
    check_nothing_held(driver.server)


def test_nothing_held_needs_no_release(driver: Driver) -> None:
    assert get(driver, 1, 2) == [None, None]
    assert driver.server.steps == ["Acquire"]


def test_a_conflict_is_found_before_anything_is_written(driver: Driver) -> None:
    put(driver, 1)
    driver.server.steps.clear()
    with pytest.raises(Conflict):
        driver.run(
            transfers.put_many(driver.core, LAYOUT, [key(0), key(1)], [data(0), data(2)], b"", 0)
        )
    assert driver.server.steps == ["Reserve", "Abort"]
    check_nothing_held(driver.server)
    assert key(0) not in driver.server.blocks


@pytest.mark.parametrize("failing", ["Work", "WriteStream", "Commit"])
@pytest.mark.parametrize("error", [Unavailable("x"), KeyboardInterrupt()])
def test_a_put_that_fails_anywhere_aborts_its_reservation(
    driver: Driver, failing: str, error: BaseException
) -> None:
    def fail(step: Step) -> None:
        if name_of(step) == failing:
            raise error

    driver.before = fail
    if failing == "WriteStream" and driver.local:
        assert put(driver, 1) == [PutOutcome.STORED]
        return
    with pytest.raises(type(error)):
        put(driver, 1)
    assert driver.server.steps[-1] == "Abort"
    check_nothing_held(driver.server)
    driver.before = nothing
    assert put(driver, 1) == [PutOutcome.STORED]


@pytest.mark.parametrize("failing", ["Work", "ReadStream"])
@pytest.mark.parametrize("error", [Unavailable("x"), KeyboardInterrupt()])
def test_a_get_that_fails_anywhere_releases_its_leases(
    driver: Driver, failing: str, error: BaseException
) -> None:
    put(driver, 1)

    def fail(step: Step) -> None:
        if name_of(step) == failing:
            raise error

    driver.before = fail
    if failing == "ReadStream" and driver.local:
        assert get(driver, 1) == [data(1)]
        return
    with pytest.raises(type(error)):
        get(driver, 1)
    assert driver.server.steps[-1] == "Release"
    check_nothing_held(driver.server)


def test_a_release_that_fails_does_not_spoil_the_get(driver: Driver) -> None:
    put(driver, 1)

    def fail(step: Step) -> None:
        if name_of(step) == "Release":
            raise Unavailable("hung")

    driver.before = fail
    assert get(driver, 1) == [data(1)]


def test_an_abort_that_did_not_get_through_is_repeated_before_the_next_reserve(
    driver: Driver,
) -> None:
    """A local client's reservation is kept for as long as it might be writing."""

    def fail(step: Step) -> None:
        if name_of(step) in ("Commit", "Abort"):
            raise Unavailable("hung")

    driver.before = fail
    with pytest.raises(Unavailable):
        put(driver, 1)
    assert len(driver.server.reservations) == 1
    driver.before = nothing
    driver.server.steps.clear()
    assert put(driver, 2) == [PutOutcome.STORED]
    assert driver.server.steps[:2] == ["Abort", "Reserve"]
    check_nothing_held(driver.server)
    driver.server.steps.clear()
    put(driver, 3)
    assert driver.server.steps[0] == "Reserve"


def test_a_damaged_block_is_a_miss_and_counted(driver: Driver) -> None:
    put(driver, 1, 2)
    driver.server.damage(key(1))
    assert get(driver, 1, 2) == [None, data(2)]
    into = [bytearray(N), bytearray(N)]
    got = driver.run(transfers.get_many(driver.core, LAYOUT, [key(1), key(2)], into))
    assert got[0] is None
    assert driver.core.counters.corrupt == 2
    check_nothing_held(driver.server)


def test_a_copy_that_ends_after_its_lease_is_a_miss_and_counted(server: FakeServer) -> None:
    driver = Driver(server, local=True, block_bytes=N)
    put(driver, 1)

    def be_late(step: Step) -> None:
        if isinstance(step, Work):
            server.clock.advance_ms(30_001)

    driver.before = be_late
    assert get(driver, 1) == [None]
    assert driver.core.counters.expired == 1


def test_a_remote_lease_that_ends_while_reading_is_a_miss(server: FakeServer) -> None:
    driver = Driver(server, local=False, block_bytes=N)
    put(driver, 1)

    def expire(step: Step) -> None:
        if name_of(step) == "ReadStream":
            raise LeaseExpired("too late")

    driver.before = expire
    assert get(driver, 1) == [None]
    assert driver.core.counters.expired == 1


def test_a_remote_block_that_comes_short_is_a_miss(server: FakeServer) -> None:
    driver = Driver(server, local=False, block_bytes=N - 1)
    put(driver, 1)
    assert get(driver, 1) == [None]
    assert driver.core.counters.corrupt == 1


@pytest.mark.parametrize("operation", ["put", "get", "lookup"])
def test_a_lost_session_is_replaced_and_the_call_repeated(driver: Driver, operation: str) -> None:
    put(driver, 1)
    driver.server.restart()
    if operation == "put":
        assert put(driver, 1) == [PutOutcome.STORED]
        assert get(driver, 1) == [data(1)]
    elif operation == "get":
        assert get(driver, 1) == [None]
    else:
        with pytest.raises(AttributeError, match="Lookup"):  # Reached, and not faked.
            driver.run(calls.lookup(driver.core, [ChainQuery([LAYOUT.id], [key(1)])]))
    assert driver.core.counters.connects == 2
    assert driver.server.layouts == {LAYOUT.id}, "layouts are registered again"


def test_a_session_lost_twice_in_one_call_is_an_error_not_a_loop(driver: Driver) -> None:
    def lose(step: Step) -> None:
        if name_of(step) == "Acquire":
            driver.server.steps.append("Acquire")
            raise NoSession("again")

    driver.before = lose
    with pytest.raises(NoSession):
        get(driver, 1)
    assert driver.server.steps.count("Acquire") == 2


def test_numbers_of_an_earlier_session_are_never_sent_to_the_next(driver: Driver) -> None:
    """Both servers count from one, so the numbers would fit."""
    put(driver, 1)
    budget = Budget(5)
    chain = ChainQuery([LAYOUT.id], [key(1)])
    grants, link = driver.run(calls.acquire(driver.core, budget, [chain], 0))
    grant, _ = driver.run(calls.reserve(driver.core, budget, LAYOUT.id, [(key(2), b"")], 0))
    lease = LeaseBase(driver.core, link, grants[0], [LAYOUT])
    driver.server.restart()
    put(driver, 1)
    (current,), _ = driver.run(calls.acquire(driver.core, Budget(5), [chain], 0))
    held, reserved = dict(driver.server.leases), dict(driver.server.reservations)
    driver.server.steps.clear()
    assert lease.expired
    with pytest.raises(LeaseExpired):
        driver.run(transfers.read_lease(driver.core, lease, 0))
    with pytest.raises(LeaseExpired):
        driver.run(calls.renew(driver.core, [current.lease_id, grants[0].lease_id]))
    with pytest.raises(ReservationExpired):
        driver.run(calls.commit(driver.core, Budget(5), grant.reservation_id, [0], [0]))
    driver.run(calls.release(driver.core, [grants[0].lease_id], 1))
    driver.run(calls.abort(driver.core, grant.reservation_id, 1))
    assert driver.server.steps == []
    assert (driver.server.leases, driver.server.reservations) == (held, reserved)


def test_a_lost_server_is_tried_again_only_after_a_pause(driver: Driver) -> None:
    assert driver.core.link is not None
    driver.core.link.retire()
    tries = 0

    def count(step: Step) -> None:
        nonlocal tries
        if name_of(step) == "OpenSession":
            tries += 1
            gone(step)

    driver.before = count
    for _ in range(5):
        with pytest.raises(Unavailable):
            put(driver, 1)
    assert tries == 1
    pauses = []
    for expected in range(2, 9):
        start = driver.backoff_now
        while tries < expected:
            driver.backoff_now += 0.01
            with pytest.raises(Unavailable):
                put(driver, 1)
        pauses.append(driver.backoff_now - start)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(2.0, abs=0.02)
    driver.before = nothing
    driver.backoff_now += 2.01
    assert put(driver, 1) == [PutOutcome.STORED]


def test_rounds_bound_what_one_call_pins_and_leave_nothing_out(driver: Driver) -> None:
    most = 0

    def watch(step: Step) -> None:
        nonlocal most
        most = max(most, len(driver.server.leases))

    assert list(transfers._rounds(0, 5)) == []
    for count, nbytes in ((1, 1), (256, 1), (257, 1), (700, 1), (10, 1 << 30), (65, 1 << 20)):
        rounds = list(transfers._rounds(count, nbytes))
        assert [n for start, stop in rounds for n in range(start, stop)] == list(range(count))
        assert all(
            stop - start == 1
            or (stop - start <= 256 and (stop - start) * nbytes <= transfers.ROUND_BYTES)
            for start, stop in rounds
        )
    put(driver, 1)
    driver.after = watch
    got = driver.run(transfers.get_many(driver.core, LAYOUT, [key(1)] * 600, None))
    assert got == [data(1)] * 600
    assert most == 256


def test_a_closed_client_takes_no_calls(driver: Driver) -> None:
    driver.core.closed = True
    with pytest.raises(BadRequest, match="closed"):
        put(driver, 1)


def test_an_operation_out_of_time_does_not_start_another_step() -> None:
    budget = Budget(0.0)
    with pytest.raises(Unavailable):
        budget.left()
    assert budget.left_to_clean_up() > 0


def test_the_server_never_waits_longer_than_the_client() -> None:
    assert calls._clamp(60_000, Budget(1.0)) < 900
    assert calls._clamp(100, Budget(10.0)) == 100
    assert calls._clamp(10**9, Budget(1000.0)) == 60_000
    with pytest.raises(BadRequest):
        calls._clamp(-1, Budget(1.0))
