"""Copies do not take turns with the computation on one core while others idle."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection

from kvstore_connectors.vllm.threads import outlive


def worker(answers: Connection) -> None:
    """As vLLM's: its main thread is bound to a core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cores: list[set[int]] = []
    thread = threading.Thread(
        target=outlive, args=(lambda: cores.append(os.sched_getaffinity(0)), lambda: None)
    )
    thread.start()
    thread.join()
    answers.send((cores, os.sched_getaffinity(0)))


def test_threads_of_a_bound_worker_run_wherever_its_engine_may() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=worker, args=(theirs,))
    process.start()
    assert ours.poll(30)
    cores, main = ours.recv()
    process.join(30)
    assert cores == [os.sched_getaffinity(0)]
    assert len(main) == 1


def test_threads_of_an_engine_in_the_users_own_process_stay_where_it_is() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    cores: list[set[int]] = []
    os.sched_setaffinity(0, one)
    try:
        thread = threading.Thread(
            target=outlive, args=(lambda: cores.append(os.sched_getaffinity(0)), lambda: None)
        )
        thread.start()
        thread.join()
    finally:
        os.sched_setaffinity(0, before)
    assert cores == [one]
