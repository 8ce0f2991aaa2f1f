"""Sweeps over processes: in order, and never a wait for one that is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from kvstore.cli.ending import ending_what_was_started
from kvstore.errors import InternalError
from kvstore.sim.processes import spread
from kvstore.sim.replay import Progress


def square(number: int, progress: Progress) -> int:
    progress(0.5)
    return number * number


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_results_come_in_the_order_of_their_parts(processes: int) -> None:
    assert spread(5, square, processes) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_what_is_enough_is_the_same_for_any_number_of_processes(processes: int) -> None:
    asked: list[list[int]] = []

    def enough(found: list[int]) -> bool:
        asked.append(list(found))
        return found[-1] >= 4

    assert spread(8, square, processes, enough=enough) == [0, 1, 4]
    assert asked == [[0], [0, 1], [0, 1, 4]]


def test_progress_ends_at_the_whole() -> None:
    told: list[float] = []
    spread(4, square, 2, told.append)
    assert told[-1] == 1.0


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_part_raises_is_raised(processes: int) -> None:
    def fail(number: int, _: Progress) -> int:
        if number == 2:
            raise KeyError("no such policy")
        return number

    with pytest.raises(KeyError, match="no such policy"):
        spread(3, fail, processes)


def test_a_failed_part_ends_others_whatever_they_do_with_sigterm() -> None:
    def do(number: int, _: Progress) -> int:
        if number == 0:
            raise ValueError("the first one")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
        return number

    with ending_what_was_started(), pytest.raises(ValueError, match="the first one"):
        spread(2, do, 2)


def test_a_killed_process_is_an_error_and_no_wait() -> None:
    def do(number: int, _: Progress) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(InternalError, match="ended before"):
        spread(3, do, 2)


def test_processes_end_with_a_killed_asker() -> None:
    seen, shown = multiprocessing.Pipe()

    def do(number: int, _: Progress) -> int:
        shown.send(os.getpid())
        time.sleep(0.1)
        return number

    asker = multiprocessing.get_context("fork").Process(target=spread, args=(10_000, do, 2))
    asker.start()
    workers = {seen.recv() for _ in range(3)}
    asker.kill()
    asker.join()
    for worker in workers:
        while not _ended(worker):  # ended by the test's limit if it never is
            time.sleep(0.01)


def _ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"
