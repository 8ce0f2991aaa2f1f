"""A loop in virtual time that gets nowhere says so, and with what."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.simulation import timeless
from tests.simulation.timeless import Endless, NothingToDo, TimelessLoop


def run(body: Coroutine[Any, Any, None], ends_s: float = 100.0) -> None:
    loop = TimelessLoop()
    loop.ends_s = ends_s
    task = loop.create_task(body)
    try:
        loop.run_until_complete(task)
    finally:
        task.cancel()
        loop.ends_s = math.inf
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()


def test_waiting_costs_no_time() -> None:
    async def body() -> None:
        began_s = asyncio.get_running_loop().time()
        await asyncio.sleep(50)
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(50)

    run(body())


def test_a_wait_of_nothing_again_and_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeless, "MOST_TURNS", 1000)

    async def body() -> None:
        for _ in range(10_000):
            await asyncio.sleep(1e-12)

    with pytest.raises(Endless, match="1 tasks"):
        run(body())


def test_time_that_passes_for_nothing_is_found() -> None:
    async def body() -> None:
        for _ in range(10_000):
            await asyncio.sleep(1)

    with pytest.raises(Endless, match="at 101"):
        run(body())


def test_who_waits_for_nobody_is_found() -> None:
    async def body() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(NothingToDo):
        run(body())
