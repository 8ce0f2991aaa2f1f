"""The server killed, restarted, hung: errors are typed, prompt, and end by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from itertools import count
from typing import Any

import pytest

import kvstore
from kvstore import PutOutcome, Segment
from kvstore.client import pieces, wire
from kvstore.client.steps import WritePiece
from kvstore.errors import (
    BadRequest,
    LeaseExpired,
    ReservationExpired,
    Unavailable,
)
from kvstore.local import copy
from kvstore.local.attachment import Attachment
from kvstore.local.directory import STALE_AFTER_NS
from tests.integration.client.conftest import (
    Server,
    block,
    eventually,
    key,
    layout_of,
    until_nothing_is_held,
)

USUAL_TIMEOUT_S = 8
"""Less than a call takes that does not heed the time it was given, more than a machine stands
still."""


def test_nobody_there_is_unavailable_at_once(driver: Callable[..., Any], tmp_path: Any) -> None:
    for endpoint in (str(tmp_path / "none"), f"unix://{tmp_path}/none", "127.0.0.1:1"):
        started = time.monotonic()
        with pytest.raises(Unavailable):
            driver(endpoint, timeout_s=30)
        assert time.monotonic() - started < 20


def test_who_comes_while_the_server_starts_shares_its_memory_all_the_same(
    server: Server, driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no attach socket yet, and a moment later gRPC answered."""
    connect, tries = Attachment.connect, count()

    def late(*args: Any, **kwargs: Any) -> Attachment:
        if not next(tries):
            raise Unavailable("not yet") from FileNotFoundError()
        return connect(*args, **kwargs)

    monkeypatch.setattr(Attachment, "connect", late)
    client = driver(server.socket)
    try:
        assert client.is_local
        layout = layout_of(client, 5000)
        client.put(layout, key(1), block(1, 5000))
        assert client.get(layout, key(1)) == block(1, 5000)
    finally:
        client.close()


def test_a_killed_and_restarted_server_is_found_again(
    fresh_server: Server, driver: Callable[..., Any], place: str, connect: Any
) -> None:
    if place == "remote":
        # The port must be the same after the restart.
        fresh_server.arguments[fresh_server.arguments.index("127.0.0.1:0")] = fresh_server.remote
    client = connect(fresh_server, timeout_s=30)
    layout = layout_of(client, 5000)
    client.put(layout, key(1), block(1, 5000))
    epoch = client.epoch
    lease = client.acquire(layout, [key(1)])
    grant = client.reserve(layout, 1, 0)

    fresh_server.kill()
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(Unavailable):
            client.get(layout, key(1))
    assert time.monotonic() - started < 20, "a dead server must not cost its timeout"

    fresh_server.start()
    assert eventually(lambda: client.get(layout, key(1))) is None
    assert client.epoch != epoch
    assert client.is_local == (place == "local")
    assert client.put(layout, key(1), block(3, 5000)) is PutOutcome.STORED
    # The new server hands out the old numbers again; they must not be taken for them.
    current = client.acquire(layout, [key(1)])
    current_grant = client.reserve(layout, 1, 0)
    assert lease.expired
    with pytest.raises(LeaseExpired):
        lease.read(0)
    with pytest.raises(LeaseExpired):
        client.renew([lease.lease_id])
    with pytest.raises(ReservationExpired):
        client.commit(layout, [Segment(b"", [key(2)], [grant.first_slot], [0])])
    lease.release()
    client.abort([grant.first_slot])
    assert current.read(0) == block(3, 5000)
    assert client.stats().reservations == 1
    client.abort([current_grant.first_slot])
    if place == "local":
        with pytest.raises(LeaseExpired):
            client.slot(grant.addresses[0], 5000, epoch=epoch)
        with pytest.raises(LeaseExpired):
            client.write_slots([grant.first_slot], grant.addresses, 5000, print)


def test_a_hung_server_costs_the_timeout_and_is_used_again_when_it_goes_on(
    fresh_server: Server, connect: Any
) -> None:
    client = eventually(lambda: connect(fresh_server, timeout_s=0.5))
    layout = eventually(lambda: layout_of(client, 5000))
    eventually(lambda: client.put(layout, key(1), block(1, 5000)))
    fresh_server.send(signal.SIGSTOP)
    try:
        actions: list[Callable[[], Any]] = [
            lambda: client.get(layout, key(1)),
            lambda: client.put(layout, key(2), block(2, 5000)),
            lambda: client.prefetch(layout, [key(1)]),
            lambda: client.stats(),
        ]
        for action in actions:
            started = time.monotonic()
            with pytest.raises(Unavailable):
                action()
            assert time.monotonic() - started < USUAL_TIMEOUT_S
        # A lookup on the server's host needs no answer, until the server has shown no
        # sign of life for a while.
        time.sleep(STALE_AFTER_NS / 1e9)
        with pytest.raises(Unavailable):
            client.lookup(layout, [key(1)])
    finally:
        fresh_server.send(signal.SIGCONT)
    assert eventually(lambda: client.get(layout, key(1))) == block(1, 5000)
    # It may have been stored for a caller that had waited long enough.
    outcome = eventually(lambda: client.put(layout, key(9), block(9, 5000)))
    assert outcome in (PutOutcome.STORED, PutOutcome.PRESENT)
    # Whatever the server granted without being heard went with its session.
    deadline = time.monotonic() + 30
    while eventually(client.stats).reservations:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hung_server_does_not_hang_a_new_client(
    fresh_server: Server, driver: Callable[..., Any]
) -> None:
    fresh_server.send(signal.SIGSTOP)
    try:
        for endpoint in (fresh_server.socket, fresh_server.remote):
            started = time.monotonic()
            with pytest.raises(Unavailable):
                driver(endpoint, timeout_s=0.4)
            assert time.monotonic() - started < USUAL_TIMEOUT_S
    finally:
        fresh_server.send(signal.SIGCONT)


def test_views_of_a_dead_servers_memory_stay_readable(fresh_server: Server) -> None:
    """An engine that is reading must not be killed by the loss of its cache."""
    with kvstore.Client(fresh_server.socket, timeout_s=2) as client:
        layout = layout_of(client, 5000)
        client.put(layout, key(1), block(1, 5000))
        view = client.acquire(layout, [key(1)]).view(0)
        fresh_server.kill()
        assert bytes(view) == block(1, 5000)
        with pytest.raises(Unavailable):
            client.stats()
        assert bytes(view) == block(1, 5000)


def _hold_and_die(socket: str, ready: Any) -> None:
    client = kvstore.Client(socket)
    layout = layout_of(client, 5000)
    client.acquire(layout, [key(1)])
    client.reserve(layout, 3, 0)
    ready.set()
    time.sleep(60)


def test_what_a_killed_client_held_is_given_back(fresh_server: Server) -> None:
    with kvstore.Client(fresh_server.socket) as client:
        layout = layout_of(client, 5000)
        client.put(layout, key(1), block(1, 5000))
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        process = context.Process(target=_hold_and_die, args=(fresh_server.socket, ready))
        process.start()
        assert ready.wait(30)
        stats = client.stats()
        assert (stats.leases, stats.reservations, stats.sessions) == (1, 1, 2)
        process.kill()
        process.join()
        deadline = time.monotonic() + 30
        while client.stats()[2:5] != (1, 0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _put_and_hang(endpoint: str, count: int, ready: Any) -> None:
    """Put blocks 0 to 11, in pieces of 4; hang in the copy of the one after `count`."""
    copied = 0

    def count_down() -> None:
        nonlocal copied
        if copied == count:
            ready.set()
            time.sleep(60)
        copied += 1

    def copying(destination: memoryview, source: memoryview) -> int:
        half = source.nbytes // 2
        copy.copy_bytes(destination[:half], source[:half])
        count_down()
        return copy_checked(destination, source)

    def sending(piece: WritePiece) -> bytes:
        count_down()
        return encode_write(piece)

    copy_checked, encode_write = copy.copy_checked, wire.encode_write
    copy.copy_checked, wire.encode_write = copying, sending
    pieces.PIECE_BLOCKS = 4
    client = kvstore.Client(endpoint)
    keys, datas = [key(n) for n in range(12)], [block(n, 50_000) for n in range(12)]
    client.put_many(layout_of(client, 50_000), keys, datas)


@pytest.mark.parametrize("copied", [0, 2, 3, 6, 11])
def test_a_client_killed_in_the_middle_of_a_copy_publishes_none_of_it(
    server: Server, place: str, copied: int
) -> None:
    endpoint = server.socket if place == "local" else server.remote
    with kvstore.Client(server.socket) as client:
        layout = layout_of(client, 50_000)
        before = client.stats()
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        process = context.Process(target=_put_and_hang, args=(endpoint, copied, ready))
        process.start()
        assert ready.wait(30)
        # The commit of the piece before the one in hand may still be on its way.
        done = copied - copied % 4
        deadline = time.monotonic() + 30
        while (stats := client.stats()).committed_blocks - before.committed_blocks < done:
            assert time.monotonic() < deadline
        assert stats.reservations > 0
        process.kill()
        process.join()
        until_nothing_is_held(client)
        stats = client.stats()
        assert stats.tenant_blocks == stats.tiers[0].blocks == done
        slot_bytes = layout.spec.slot_bytes
        assert stats.tiers[0].used_bytes - before.tiers[0].used_bytes == done * slot_bytes
        keys, datas = [key(n) for n in range(12)], [block(n, 50_000) for n in range(12)]
        assert client.get_many(layout, keys) == datas[:done] + [None] * (12 - done)
        outcomes = [PutOutcome.PRESENT] * done + [PutOutcome.STORED] * (12 - done)
        assert client.put_many(layout, keys, datas) == outcomes
        assert client.get_many(layout, keys) == datas


def test_a_closed_client_says_so_and_gives_its_session_back(server: Server, connect: Any) -> None:
    with kvstore.Client(server.socket) as watcher:
        before = watcher.stats().sessions
        client = connect(server)
        assert watcher.stats().sessions == before + 1
        client.close()
        client.close()
        with pytest.raises(BadRequest, match="closed"):
            client.stats()
        deadline = time.monotonic() + 30
        while watcher.stats().sessions != before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_to_make_its_own_client(server: Server) -> None:
    with kvstore.Client(server.socket) as client:
        child = os.fork()
        if child == 0:
            try:
                client.stats()
            except BadRequest:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        client.stats()


def test_a_cancelled_call_gives_back_what_it_holds(server: Server) -> None:
    async def run() -> None:
        async with kvstore.AsyncClient(server.socket) as client:
            layout = await client.register_layout(
                kvstore.LayoutSpec(model="m", dtype="f", block_tokens=1, block_bytes=1 << 20)
            )
            keys = [key(number) for number in range(8)]
            datas = [block(number, 1 << 20) for number in range(8)]
            for delay in (0.0, 0.001, 0.002, 0.003, 0.005, 0.008, 0.013):
                task = asyncio.create_task(client.put_many(layout, keys, datas))
                await asyncio.sleep(delay)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                reading = asyncio.create_task(client.get_many(layout, keys))
                await asyncio.sleep(delay)
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
            deadline = time.monotonic() + 30
            while (await client.stats())[3:5] != (0, 0):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            outcomes = await client.put_many(layout, keys, datas)
            assert set(outcomes) <= {PutOutcome.STORED, PutOutcome.PRESENT}
            assert await client.get_many(layout, keys) == datas

    asyncio.run(run())


@pytest.mark.parametrize("operation", ["reserve", "commit", "acquire"])
def test_an_interrupted_call_ends_at_once_and_the_client_goes_on(
    fresh_server: Server, place: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C, here while the server hangs."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def hang() -> None:
        fresh_server.send(signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    def naming(segments: Sequence[Segment], tag: int) -> Any:
        if any(any(segment.slots) for segment in segments):
            hang()
        return segment_messages(segments, tag)

    segment_messages = wire.segment_messages
    before = signal.signal(signal.SIGALRM, interrupt)
    endpoint = fresh_server.socket if place == "local" else fresh_server.remote
    try:
        with kvstore.Client(endpoint, timeout_s=60) as client:
            layout = layout_of(client, 5000)
            client.put(layout, key(1), block(1, 5000))
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                if operation == "commit":
                    monkeypatch.setattr(wire, "segment_messages", naming)
                else:
                    hang()
                if operation == "acquire":
                    client.get(layout, key(1))
                client.put(layout, key(2), block(2, 5000))
            monkeypatch.undo()
            assert time.monotonic() - started < 30
            fresh_server.send(signal.SIGCONT)
            assert eventually(lambda: client.get(layout, key(1))) == block(1, 5000)
            outcome = client.put(layout, key(2), block(2, 5000))
            assert outcome in (PutOutcome.STORED, PutOutcome.PRESENT)
            until_nothing_is_held(client)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        fresh_server.send(signal.SIGCONT)


class CancelledAt:
    """A coroutine whose task is cancelled at one of the points where it waits.

    How: "waiting" at once; "settled" just as what it waits for there is done, but
    before it hears of it; "twice" at once, and again where it waits next.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], point: int, how: str) -> None:
        self._steps = coroutine.__await__()
        self._points = {point, point + 1} if how == "twice" else {point}
        self._settled = how == "settled"
        self.reached = False

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        step: Callable[[], Any] = partial(self._steps.send, None)
        for point in count():
            try:
                waiting = step()
            except StopIteration as stop:
                return stop.value
            if point in self._points:
                self.reached = True
                if self._settled and waiting is not None:
                    waiting.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            try:
                result = yield waiting
                step = partial(self._steps.send, result)
            except BaseException as error:  # noqa: BLE001 - it goes on into the coroutine
                step = partial(self._steps.throw, error)


@pytest.mark.parametrize("how", ["waiting", "settled", "twice"])
@pytest.mark.parametrize("operation", ["put", "get"])
def test_a_call_cancelled_at_any_point_gives_back_what_it_holds(
    server: Server, place: str, operation: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BLOCKS", 2)

    async def cancel(client: kvstore.AsyncClient, layout: kvstore.Layout, point: int) -> bool:
        """Whether there was such a point."""
        numbers = range(10 * point, 10 * point + 5)
        keys, datas = [key(n) for n in numbers], [block(n, 5000) for n in numbers]
        if operation == "put":
            await client.put_many(layout, keys[:1], datas[:1])
            call = CancelledAt(client.put_many(layout, keys, datas), point, how)
        else:
            # With holes, so that it asks for more than one prefix.
            for index in (0, 1, 3, 4):
                await client.put(layout, keys[index], datas[index])
            call = CancelledAt(client.get_many(layout, keys), point, how)

        async def run() -> None:
            await call

        task = asyncio.create_task(run())
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(result, asyncio.CancelledError) or not call.reached or result is None
        deadline = time.monotonic() + 30
        while (held := (await client.stats())[3:5]) != (0, 0):
            assert time.monotonic() < deadline, (point, held)
            await asyncio.sleep(0.005)
        outcomes = await client.put_many(layout, keys, datas)
        assert set(outcomes) <= {PutOutcome.STORED, PutOutcome.PRESENT}
        assert await client.get_many(layout, keys) == datas
        return call.reached

    async def run() -> None:
        endpoint = server.socket if place == "local" else server.remote
        async with kvstore.AsyncClient(endpoint) as client:
            spec = kvstore.LayoutSpec(model="m", dtype="f", block_tokens=1, block_bytes=5000)
            layout = await client.register_layout(spec)
            point = 0
            while await cancel(client, layout, point):
                point += 1
            assert point > 5
            assert client.counters.connects == 1, "a cancelled call costs nobody the session"

    asyncio.run(run())
