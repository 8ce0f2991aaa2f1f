"""What happens in which order, and what is given back when it goes wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from kvstore.client import calls, gets, pieces, puts
from kvstore.client.lease import Layout, LeaseBase
from kvstore.client.link import Budget
from kvstore.client.steps import Begin, Call, Step, Work
from kvstore.clock import ManualClock
from kvstore.errors import (
    BadRequest,
    Conflict,
    LeaseExpired,
    NoSession,
    ReservationExpired,
    Unavailable,
)
from kvstore.types import ChainPresence, ChainQuery, LayoutSpec, PutOutcome, Reuse, Segment
from kvstore.wire.columns import unpack_keys
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.unit.client.fake import Driver, FakeServer, gone, name_of, nothing

N = 1000
SPEC = LayoutSpec(model="m", dtype="f", block_tokens=1, block_bytes=N)
LAYOUT = Layout(SPEC.layout_id, SPEC)
STORED, PRESENT, DENIED = PutOutcome.STORED, PutOutcome.PRESENT, PutOutcome.DENIED

# "blind": on the server's host, where the directory can tell nothing right now.
KINDS = ["local", "blind", "remote"]


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def data(number: int) -> bytes:
    return bytes([number]) * N


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer(ManualClock())
    yield made
    os.close(made.extent)


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, server: FakeServer) -> Driver:
    return make_driver(server, request.param)


def make_driver(server: FakeServer, kind: str) -> Driver:
    made = Driver(server, local=kind != "remote", block_bytes=N)
    if kind == "local":
        made.listed = lambda name: name in server.blocks
    made.run(calls.register_layout(made.core, SPEC))
    server.steps.clear()
    return made


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks a piece."""
    monkeypatch.setattr(pieces, "PIECE_BLOCKS", 2)


def put(driver: Driver, *numbers: int) -> list[PutOutcome]:
    keys, datas = [key(n) for n in numbers], [data(n) for n in numbers]
    return driver.run(puts.put_many(driver.core, LAYOUT, keys, datas, b"", 0))


def get(driver: Driver, *numbers: int) -> list[gets.Got]:
    return driver.run(gets.get_many(driver.core, LAYOUT, [key(n) for n in numbers], None))


def trace(driver: Driver, operation: Callable[[], object]) -> list[str]:
    """The steps of an operation, in order."""
    names: list[str] = []
    driver.before = lambda step: names.append(name_of(step))
    operation()
    driver.before = nothing
    return names


def check_nothing_held(server: FakeServer) -> None:
    assert server.leases == {}
    assert server.slots == {}


# Puts


def test_a_put_of_one_piece_reserves_and_commits_once(driver: Driver) -> None:
    assert put(driver, 1, 2, 3) == [STORED] * 3
    # From afar the server is asked first which blocks need not be sent at all.
    expected = ["Reserve", "Commit"] if driver.local else ["Commit", "Write", "Commit"]
    assert driver.server.steps == expected
    assert driver.server.stored(key(2), N) == data(2)
    check_nothing_held(driver.server)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_every_further_piece_costs_one_commit_that_reserves_ahead(
    driver: Driver, pieces: int
) -> None:
    numbers = range(2 * pieces)
    assert put(driver, *numbers) == [STORED] * len(numbers)
    if driver.local:
        assert driver.server.steps == ["Reserve", *["Commit"] * pieces]
    else:
        assert driver.server.steps == ["Commit", *["Write", "Commit"] * pieces]
    assert driver.server.reserved == len(numbers), "no slot more than was needed"
    check_nothing_held(driver.server)
    for number in numbers:
        assert driver.server.stored(key(number), N) == data(number)


@pytest.mark.usefixtures("small_pieces")
def test_a_piece_is_copied_while_the_commit_before_it_is_under_way(server: FakeServer) -> None:
    driver = make_driver(server, "blind")
    driver.late = True
    assert trace(driver, lambda: put(driver, 1, 2, 3, 4, 5)) == [
        "Reserve",
        "Work", "Begin Commit",
        "Work", "End Commit", "Begin Commit",
        "Work", "End Commit", "Begin Commit",
        "End Commit",
    ]  # fmt: skip


@pytest.mark.usefixtures("small_pieces")
def test_the_blocks_of_a_put_are_one_chain_whatever_the_pieces(driver: Driver) -> None:
    parents: dict[bytes, bytes] = {}

    def watch(step: Step) -> None:
        request = getattr(getattr(step, "call", step), "request", None)
        if isinstance(request, pb.CommitRequest):
            for segment in request.segments:
                above = segment.parent
                for name in unpack_keys(segment.keys):
                    parents[name] = above
                    above = name

    put(driver, 3)
    driver.before = watch
    keys, datas = [key(n) for n in range(7)], [data(n) for n in range(7)]
    driver.run(puts.put_many(driver.core, LAYOUT, keys, datas, key(50), 0))
    assert parents == {key(n): key(n - 1) if n else key(50) for n in range(7)}


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_what_is_there_already_is_asked_for_and_not_copied(server: FakeServer, kind: str) -> None:
    driver = make_driver(server, kind)
    put(driver, 1, 2)
    server.steps.clear()
    server.written = server.reserved = 0
    assert put(driver, 1, 2, 3) == [PRESENT, PRESENT, STORED]
    check_nothing_held(server)
    if kind == "local":
        assert server.steps == ["Commit", "Reserve", "Commit"]
        assert server.reserved == 1
    else:
        assert server.steps[:3] == ["Commit", "Write", "Commit"]
        assert server.written == 1
    server.steps.clear()
    assert put(driver, 1, 2) == [PRESENT, PRESENT]
    assert server.steps[0] == "Commit" and "Write" not in server.steps
    check_nothing_held(server)


def test_what_the_directory_lists_but_the_server_lost_is_written_after_all(
    server: FakeServer,
) -> None:
    driver = make_driver(server, "local")
    put(driver, 1, 4)
    driver.listed = lambda name: name in {key(n) for n in (1, 2, 3, 4)}
    assert put(driver, 1, 2, 3, 4, 5) == [PRESENT, STORED, STORED, PRESENT, STORED]
    for number in (2, 3, 5):
        assert server.stored(key(number), N) == data(number)
    check_nothing_held(server)


def test_a_conflict_is_raised_when_the_others_are_stored(driver: Driver) -> None:
    put(driver, 1)
    keys = [key(n) for n in range(4)]
    with pytest.raises(Conflict):
        driver.run(
            puts.put_many(driver.core, LAYOUT, keys, [data(0), data(9), data(2), data(3)], b"", 0)
        )
    assert driver.server.stored(key(1), N) == data(1)
    for number in (0, 2, 3):
        assert driver.server.stored(key(number), N) == data(number)
    check_nothing_held(driver.server)


def test_two_writers_of_a_block_both_write_and_the_second_finds_it_present(
    server: FakeServer,
) -> None:
    first, second = make_driver(server, "blind"), make_driver(server, "blind")
    outcomes = []

    def be_overtaken(step: Step) -> None:
        if isinstance(step, Work):
            first.after = nothing
            outcomes.append(put(second, 1, 2))

    first.after = be_overtaken
    outcomes.append(put(first, 1, 2))
    assert outcomes == [[STORED, STORED], [PRESENT, PRESENT]]
    assert server.stored(key(1), N) == data(1)
    check_nothing_held(server)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("room", range(7))
def test_what_there_is_no_room_for_is_denied(driver: Driver, room: int) -> None:
    driver.server.room = room
    assert put(driver, *range(7)) == [STORED] * room + [DENIED] * (7 - room)
    check_nothing_held(driver.server)


@pytest.mark.usefixtures("small_pieces")
def test_room_that_comes_a_slot_at_a_time_is_used(driver: Driver) -> None:
    free = driver.server._free
    spare = [free.pop() for _ in range(8)]
    driver.server.room = 1

    def make_room(step: Step) -> None:
        if name_of(step) == "Reserve" and not free and spare:
            free.append(spare.pop())

    driver.before = make_room
    assert put(driver, *range(7)) == [STORED] * 7
    check_nothing_held(driver.server)


def test_an_outcome_of_a_later_version_does_not_make_a_put_go_on_for_ever(driver: Driver) -> None:
    tries = 0
    answer = driver.server._commit

    def from_the_future(name: bytes, slot: int, value: int) -> object:
        nonlocal tries
        if slot and name == key(1):
            tries += 1
            assert tries < 10
            driver.server._close([slot])
            return 77
        return answer(name, slot, value)

    driver.server._commit = from_the_future  # type: ignore[assignment,method-assign]
    assert put(driver, 0, 1, 2) == [STORED, DENIED, STORED]
    check_nothing_held(driver.server)


# Gets


def test_a_get_acquires_and_releases_once_for_a_prefix(driver: Driver) -> None:
    put(driver, 1, 2)
    driver.server.steps.clear()
    assert get(driver, 1, 2) == [data(1), data(2)]
    reading = [] if driver.local else ["Read", "Read"]
    assert driver.server.steps == ["Acquire", *reading, "Release"]
    check_nothing_held(driver.server)


@pytest.mark.usefixtures("small_pieces")
def test_every_call_of_a_get_says_what_is_known_of_the_next_use(driver: Driver) -> None:
    """Three pieces, and what lies beyond a hole."""
    put(driver, *range(4), 5)
    said: list[bytes] = []

    def note(step: Step) -> None:
        call = step.call if isinstance(step, Begin) else step
        if isinstance(call, Call) and isinstance(call.request, pb.AcquireRequest):
            said.extend(chain.reuse.session for chain in call.request.chains)

    driver.before = note
    keys = [key(n) for n in range(6)]
    got = driver.run(gets.get_many(driver.core, LAYOUT, keys, None, Reuse(session=b"s")))
    assert got == [data(n) if n != 4 else None for n in range(6)]
    assert len(said) >= 4 and set(said) == {b"s"}


def test_nothing_held_needs_no_release(driver: Driver) -> None:
    assert get(driver, 1) == [None]
    assert driver.server.steps == ["Acquire"]
    driver.server.steps.clear()
    assert get(driver, 1, 2) == [None, None]
    assert "Release" not in driver.server.steps


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("into", [False, True], ids=["new", "into"])
def test_holes_are_misses_wherever_they_lie(kind: str, into: bool) -> None:
    for held in itertools.product([False, True], repeat=5):
        server = FakeServer(ManualClock())
        driver = make_driver(server, kind)
        for number in itertools.compress(range(5), held):
            put(driver, number)
        keys = [key(n) for n in range(5)]
        buffers = [bytearray(b"\xee" * (N + 1)) for _ in keys] if into else None
        got = driver.run(gets.get_many(driver.core, LAYOUT, keys, buffers))
        assert got == [data(n) if there else None for n, there in enumerate(held)], held
        for buffer, there in zip(buffers or (), held, strict=False):
            assert there or buffer == b"\xee" * (N + 1)
            assert buffer[N] == 0xEE
        check_nothing_held(server)
        os.close(server.extent)


@pytest.mark.usefixtures("small_pieces")
def test_a_piece_is_read_while_the_next_one_is_acquired(server: FakeServer) -> None:
    driver = make_driver(server, "local")
    put(driver, 1, 2, 3, 4, 5)
    release = ["Begin Release", "Drop Release"]
    assert trace(driver, lambda: get(driver, 1, 2, 3, 4, 5)) == [
        "Acquire", "Begin Acquire", "Work", *release,
        "End Acquire", "Begin Acquire", "Work", *release,
        "End Acquire", "Work", *release,
    ]  # fmt: skip


def test_a_block_the_directory_lists_but_the_server_lost_is_a_miss(server: FakeServer) -> None:
    driver = make_driver(server, "local")
    put(driver, 2, 4)
    driver.listed = lambda name: True
    for got, number in zip(get(driver, 1, 2, 3, 4), (1, 2, 3, 4), strict=True):
        assert got in ((None,) if number in (1, 3) else (None, data(number)))
    check_nothing_held(server)


def test_a_damaged_block_is_a_miss_counted_and_reported(driver: Driver) -> None:
    put(driver, 1, 2)
    driver.server.damage(key(1))
    address, _ = driver.server.blocks[key(1)]
    assert get(driver, 1, 2) == [None, data(2)]
    assert driver.server.reported == [address], "the server is told, and of nothing else"
    into = [bytearray(N), bytearray(N)]
    got = driver.run(gets.get_many(driver.core, LAYOUT, [key(1), key(2)], into))
    assert got[0] is None
    assert driver.core.counters.corrupt == 2
    check_nothing_held(driver.server)


def test_a_copy_that_ends_after_its_lease_is_a_miss_and_counted(server: FakeServer) -> None:
    driver = make_driver(server, "local")
    put(driver, 1)

    def be_late(step: Step) -> None:
        if isinstance(step, Work):
            server.clock.advance_ms(30_001)

    driver.before = be_late
    assert get(driver, 1) == [None]
    assert driver.core.counters.expired == 1


def test_a_remote_lease_that_ends_while_reading_is_a_miss(server: FakeServer) -> None:
    driver = make_driver(server, "remote")
    put(driver, 1)

    def expire(step: Step) -> None:
        if name_of(step) == "ReadStream":
            raise LeaseExpired("too late")

    driver.before = expire
    assert get(driver, 1) == [None]
    assert driver.core.counters.expired == 1


def test_a_remote_block_that_comes_short_is_a_miss(server: FakeServer) -> None:
    driver = make_driver(server, "remote")
    put(driver, 1)
    driver.block_bytes = N - 1
    assert get(driver, 1) == [None]
    assert driver.core.counters.corrupt == 1
    assert driver.server.reported == [server.blocks[key(1)][0]]


# What one call takes


@pytest.mark.usefixtures("small_pieces")
def test_what_one_call_pins_and_reserves_is_bounded(driver: Driver) -> None:
    most_slots = most_blocks = 0

    def watch(step: Step) -> None:
        nonlocal most_slots, most_blocks
        held = driver.server.leases.values()
        most_blocks = max(most_blocks, sum(len(keys) for _, keys in held))
        most_slots = max(most_slots, len(driver.server.slots))

    driver.late = True
    driver.after = watch
    numbers = range(20)
    put(driver, *numbers)
    assert get(driver, *numbers) == [data(n) for n in numbers]
    # One piece is being committed, one written, and one is reserved ahead.
    assert 4 <= most_slots <= 6
    # One is being read, one acquired ahead.
    assert 2 <= most_blocks <= 4


def test_a_piece_has_at_most_so_many_blocks_and_bytes() -> None:
    for nbytes in (1, 1 << 10, 1 << 20, (1 << 20) + 1, 1 << 24):
        count = pieces.blocks_a_piece(nbytes)
        assert count <= pieces.PIECE_BLOCKS and count * nbytes <= pieces.PIECE_BYTES
    assert pieces.blocks_a_piece(1 << 30) == 1, "a block is never divided"


# Failures


class Failure:
    """Lets the step with a certain number fail, once."""

    def __init__(self, driver: Driver, number: int, error: BaseException, when: str) -> None:
        self.failed = ""
        self._driver = driver
        self._left = number
        self._error = error
        # A call that is begun is not waited for: it fails before it is sent, or at its
        # end. And it cannot fail to be dropped.
        self._spared = "Drop" if when == "before" else "Begin"
        setattr(driver, when, self._count)

    def _count(self, step: Step) -> None:
        name = name_of(step)
        if name.startswith(self._spared) or self.failed:
            return
        if not self._left:
            self.failed = name
            raise self._error
        self._left -= 1

    def end(self) -> None:
        self._driver.before = self._driver.after = nothing


def each_failure(
    kind: str, error: BaseException, when: str, late: bool
) -> Iterator[tuple[Driver, Callable[[], Failure]]]:
    """A server that holds blocks 0, 1, 3 and 6, and a driver of it, for each step there
    is; what comes with them makes that step fail."""
    for number in itertools.count():
        server = FakeServer(ManualClock())
        driver = make_driver(server, kind)
        put(driver, 0, 1, 3, 6)
        driver.late = late
        failures: list[Failure] = []

        def fail(
            driver: Driver = driver, number: int = number, failures: list[Failure] = failures
        ) -> Failure:
            failures.append(Failure(driver, number, error, when))
            return failures[0]

        yield driver, fail
        os.close(server.extent)
        if not failures[0].failed:
            assert number > 5
            return


ERRORS = pytest.mark.parametrize("error", [Unavailable("x"), KeyboardInterrupt()], ids=repr)
WHEN = pytest.mark.parametrize("when", ["before", "after"])
LATE = pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
@ERRORS
@WHEN
@LATE
def test_a_put_that_fails_at_any_step_gives_back_its_slots(
    kind: str, error: BaseException, when: str, late: bool
) -> None:
    for driver, fail in each_failure(kind, error, when, late):
        failure = fail()
        with contextlib.suppress(type(error)):
            put(driver, *range(7))
        failure.end()
        assert "Abort" in failure.failed or driver.server.slots == {}, failure.failed
        # Others do not overwrite what it stored, nor it what they store.
        other = make_driver(driver.server, kind)
        assert set(put(other, *range(20, 30))) == {STORED}
        assert set(put(driver, *range(7))) <= {STORED, PRESENT}
        assert get(other, *range(7)) == [data(n) for n in range(7)], failure.failed
        assert get(driver, *range(20, 30)) == [data(n) for n in range(20, 30)]
        if driver.local:
            check_nothing_held(driver.server)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
@ERRORS
@WHEN
@LATE
def test_a_get_that_fails_at_any_step_gives_back_its_leases(
    kind: str, error: BaseException, when: str, late: bool
) -> None:
    expected = [data(n) if n in (0, 1, 3, 6) else None for n in range(7)]
    for driver, fail in each_failure(kind, error, when, late):
        failure = fail()
        with contextlib.suppress(type(error)):
            assert get(driver, *range(7)) == expected
        failure.end()
        # A lease of which the answer was lost ends with its time.
        lost = isinstance(error, Unavailable) and failure.failed in ("Acquire", "End Acquire")
        assert lost or driver.server.leases == {}, failure.failed
        assert driver.server.slots == {}
        assert get(driver, *range(7)) == expected


def test_a_release_that_is_not_heard_does_not_spoil_the_get(driver: Driver) -> None:
    put(driver, 1)
    release = driver.server.Release

    def hang(request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        raise Unavailable("hung")

    driver.server.Release = hang  # type: ignore[method-assign]
    assert get(driver, 1) == [data(1)]
    driver.server.Release = release  # type: ignore[method-assign]


def test_slots_of_an_answer_that_was_lost_come_back_with_their_session(driver: Driver) -> None:
    def lose(step: Step) -> None:
        if name_of(step) in ("Reserve", "End Commit"):
            raise Unavailable("hung")

    driver.after = lose
    budget = Budget(5)
    if driver.local:
        with pytest.raises(Unavailable):
            driver.run(calls.reserve(driver.core, budget, LAYOUT.id, 3, 0))
    else:
        with pytest.raises(Unavailable):
            driver.run(calls.commit(driver.core, budget, LAYOUT.id, [], 3))
    assert driver.server.reserved == 3
    check_nothing_held(driver.server)
    driver.after = nothing
    assert put(driver, 1) == [STORED]
    assert driver.core.counters.connects == 2


def test_a_commit_whose_answer_was_lost_may_be_repeated_with_the_session_gone(
    driver: Driver,
) -> None:
    """What it published is there for good, and its slots are closed."""

    def lose(step: Step) -> None:
        if name_of(step) == "End Commit":
            raise Unavailable("hung")

    driver.after = lose
    with pytest.raises(Unavailable):
        put(driver, 1, 2)
    driver.after = nothing
    assert driver.server.stored(key(1), N) == data(1)
    assert put(driver, 1, 2) == [PRESENT, PRESENT]
    check_nothing_held(driver.server)


@pytest.mark.parametrize("kind", ["local", "blind"])
def test_an_abort_that_did_not_get_through_is_repeated_before_the_next_reserve(
    server: FakeServer, kind: str
) -> None:
    """A local client's reservation is kept for as long as it might be writing."""
    driver = make_driver(server, kind)
    driver.late = True

    def fail(step: Step) -> None:
        if name_of(step) == "Work":
            raise KeyboardInterrupt
        if name_of(step) == "End Abort":
            raise Unavailable("hung")

    driver.before = fail
    with pytest.raises(KeyboardInterrupt):
        put(driver, 1)
    assert len(server.slots) == 1
    driver.before = nothing
    server.steps.clear()
    assert put(driver, 2) == [STORED]
    assert server.steps[:2] == ["Abort", "Reserve"]
    check_nothing_held(server)
    server.steps.clear()
    put(driver, 3)
    assert server.steps[0] == "Reserve"


def test_an_abort_that_is_owed_to_a_session_that_is_lost_is_in_nobodys_way(
    server: FakeServer,
) -> None:
    driver = make_driver(server, "blind")
    assert driver.core.link is not None
    driver.core.link.owed_aborts.add(driver.core.link.tag + 5)
    server.restart()
    assert put(driver, 1) == [STORED]
    assert driver.core.counters.connects == 2


# A server that is lost and found


@pytest.mark.parametrize("operation", ["put", "get", "lookup"])
def test_a_lost_session_is_replaced_and_the_call_repeated(driver: Driver, operation: str) -> None:
    put(driver, 1)
    driver.listed = None
    driver.server.restart()
    if operation == "put":
        assert put(driver, 1) == [STORED]
        assert get(driver, 1) == [data(1)]
    elif operation == "get":
        assert get(driver, 1) == [None]
    else:
        query = [ChainQuery([LAYOUT.id], [key(1)])]
        assert driver.run(calls.lookup(driver.core, query)) == [ChainPresence(0, 0)]
    assert driver.core.counters.connects == 2
    assert driver.server.layouts == {LAYOUT.id}, "layouts are registered again"


@pytest.mark.usefixtures("small_pieces")
@LATE
def test_a_session_lost_in_the_middle_of_a_get_costs_misses_only(
    driver: Driver, late: bool
) -> None:
    put(driver, *range(6))
    reads = 0

    def restart(step: Step) -> None:
        nonlocal reads
        reads += name_of(step) in ("Work", "ReadStream")
        if reads == (1 if driver.local else 3):
            # The first piece is read.
            driver.after = nothing
            driver.server.restart()

    driver.late = late
    driver.after = restart
    got = get(driver, *range(6))
    # What was acquired before the loss is in memory that stays, if that is shared.
    good = 4 if driver.local and not late else 2
    assert got == [data(n) if n < good else None for n in range(6)]
    assert driver.core.counters.connects == 2
    check_nothing_held(driver.server)


@pytest.mark.usefixtures("small_pieces")
def test_slots_of_a_lost_session_are_not_used_in_the_next(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From afar: the answer that grants them and those that follow are of two sessions."""
    monkeypatch.setattr(puts, "ASKED_AT_ONCE", 2)
    driver = make_driver(server, "remote")
    asked = 0

    def restart(step: Step) -> None:
        nonlocal asked
        asked += name_of(step) == "Commit"
        if asked == 1:
            driver.after = nothing
            server.restart()

    driver.after = restart
    assert put(driver, *range(5)) == [STORED] * 5
    for number in range(5):
        assert server.stored(key(number), N) == data(number)
    check_nothing_held(server)


def test_a_session_lost_twice_in_one_call_is_an_error_not_a_loop(driver: Driver) -> None:
    tries = 0

    def lose(step: Step) -> None:
        nonlocal tries
        if name_of(step) == "Acquire":
            tries += 1
            raise NoSession("again")

    driver.before = lose
    with pytest.raises(NoSession):
        get(driver, 1)
    assert tries == 2


@pytest.mark.parametrize("lost", ["Begin Commit", "End Commit", "WriteStream"])
def test_a_session_lost_while_writing_says_so_and_the_next_put_goes_on(
    driver: Driver, lost: str
) -> None:
    def restart(step: Step) -> None:
        if name_of(step) == lost:
            driver.before = nothing
            driver.server.restart()

    driver.late = True
    driver.before = restart
    if lost == "WriteStream" and driver.local:
        assert put(driver, 1) == [STORED]
        return
    with pytest.raises((ReservationExpired, NoSession)):
        put(driver, 1, 2)
    assert driver.server.blocks == {}
    assert put(driver, 1, 2) == [STORED, STORED]
    check_nothing_held(driver.server)


def test_numbers_of_an_earlier_session_are_never_sent_to_the_next(driver: Driver) -> None:
    """Both servers count from one, so the numbers would fit."""
    put(driver, 1)
    budget = Budget(5)
    chain = ChainQuery([LAYOUT.id], [key(1)])
    grants, link = driver.run(calls.acquire(driver.core, budget, [chain], 0))
    grant, _ = driver.run(calls.reserve(driver.core, budget, LAYOUT.id, 2, 0))
    lease = LeaseBase(driver.core, link, grants[0], [LAYOUT])
    driver.server.restart()
    put(driver, 1)
    (current,), _ = driver.run(calls.acquire(driver.core, Budget(5), [chain], 0))
    ours, _ = driver.run(calls.reserve(driver.core, Budget(5), LAYOUT.id, 2, 0))
    held, reserved = dict(driver.server.leases), dict(driver.server.slots)
    driver.server.steps.clear()
    assert lease.expired
    with pytest.raises(LeaseExpired):
        driver.run(gets.read_lease(driver.core, lease, 0))
    with pytest.raises(LeaseExpired):
        driver.run(calls.renew(driver.core, [current.lease_id, grants[0].lease_id]))
    segment = Segment(b"", [key(2), key(3)], [ours.first_slot, grant.first_slot], [0, 0])
    with pytest.raises(ReservationExpired):
        driver.run(calls.commit(driver.core, Budget(5), LAYOUT.id, [segment], 0))
    driver.run(calls.release(driver.core, [grants[0].lease_id], 1))
    driver.run(calls.abort(driver.core, [grant.first_slot, grant.first_slot + 1], 1))
    assert driver.server.steps == []
    assert (driver.server.leases, driver.server.slots) == (held, reserved)


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
    assert put(driver, 1) == [STORED]


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
