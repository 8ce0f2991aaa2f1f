"""What goes wrong a thousand times a second fills no disk with log, and hides nothing else."""

from __future__ import annotations

import logging

import pytest

from kvstore_server import logs
from kvstore_server.logs import Repeats


def record(message: str, level: int = logging.ERROR, line: int = 1) -> logging.LogRecord:
    return logging.LogRecord("asyncio", level, "base_events.py", line, message, None, None)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: time[0])
    return time


def test_what_is_said_over_and_over_is_left_out_and_counted(now: list[float]) -> None:
    repeats = Repeats()
    said = [repeats.filter(record(f"no descriptor\nof {number}")) for number in range(1000)]
    assert said.count(True) == Repeats.BURST
    now[0] += Repeats.PERIOD_S
    later = record("no descriptor\nof many")
    assert repeats.filter(later)
    assert vars(later)["fields"] == {"left_out": 1000 - Repeats.BURST}


def test_other_things_are_said_meanwhile(now: list[float]) -> None:
    repeats = Repeats()
    for _ in range(100):
        repeats.filter(record("no descriptor"))
    assert repeats.filter(record("a task failed"))
    assert repeats.filter(record("no descriptor", line=2))
    assert all(repeats.filter(record("ready", logging.INFO)) for _ in range(100))


def test_it_does_not_remember_everything(now: list[float]) -> None:
    repeats = Repeats()
    for number in range(2 * Repeats.MOST_PLACES):
        repeats.filter(record(f"message {number}"))
    assert len(repeats._said) == Repeats.MOST_PLACES
