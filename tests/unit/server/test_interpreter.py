"""Garbage goes, and what is no garbage is not looked at again and again."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest

from kvstore_server import interpreter


class Thing:
    other: Thing | None = None


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interpreter, "POLL_S", 0.001)
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    gc.enable()
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def with_collector(busy: Callable[[], bool], body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        collecting = asyncio.ensure_future(interpreter.short_collections(busy))
        await asyncio.sleep(0)
        await body()
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)

    asyncio.run(main())


def full_collections() -> int:
    return gc.get_stats()[2]["collections"]


def make(rounds: int) -> list[Thing]:
    """As many objects as take `rounds` collections of middle-aged ones."""
    made = [Thing() for _ in range(rounds * interpreter.YOUNG_OBJECTS * interpreter.MIDDLE_ROUNDS)]
    made += [Thing() for _ in range(2 * interpreter.YOUNG_OBJECTS * interpreter.MIDDLE_ROUNDS)]
    return made


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came about")


def test_what_was_made_at_the_start_is_not_visited() -> None:
    interpreter.prepare_interpreter()
    before = full_collections()
    kept = make(20)
    assert full_collections() == before

    async def body() -> None:
        assert gc.isenabled()
        assert gc.get_freeze_count() >= len(kept)

    with_collector(lambda: False, body)


def test_rings_that_grew_old_are_freed() -> None:
    async def body() -> None:
        ring = Thing()
        ring.other = ring
        gone = weakref.ref(ring)
        kept = make(3)  # The ring is old by now.
        del ring
        assert gone() is not None
        kept += make(interpreter.DUE_AFTER)
        await until(lambda: gone() is None)

    with_collector(lambda: False, body)


def test_what_is_made_later_is_set_aside_too() -> None:
    async def body() -> None:
        frozen = gc.get_freeze_count()
        kept = make(interpreter.DUE_AFTER)
        await until(lambda: gc.get_freeze_count() >= frozen + len(kept) - 1)

    with_collector(lambda: False, body)


def test_calls_are_waited_for_but_not_for_long() -> None:
    async def body() -> None:
        before = full_collections()
        kept = make(interpreter.DUE_AFTER)
        await asyncio.sleep(0.05)
        assert full_collections() == before
        kept += make(interpreter.OVERDUE_AFTER - interpreter.DUE_AFTER)
        await until(lambda: full_collections() == before + 1)

    with_collector(lambda: True, body)
