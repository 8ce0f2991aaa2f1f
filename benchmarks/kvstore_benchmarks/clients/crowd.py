"""The parent's side: clients in processes of their own that start work together."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.errors import KVStoreError
from kvstore_benchmarks.clients.polite import Tally
from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.pipe import Pipe

START_TIMEOUT_S = 60.0
SPARE_S = 120.0
"""How much longer than planned a piece of work may take before it is given up."""
AT_ONCE = 4
"""Clients that start side by side: more would only be in each other's way."""
BARRIER_S = 0.5
PER_CLIENT_S = 0.01
"""For the barrier: until every client has read when to begin."""


class WorkerFailed(KVStoreError):
    """A client's process could not do what it was asked."""


@dataclass(frozen=True, slots=True)
class Shift:
    """What became of one piece of work that several clients did together."""

    seconds: float
    tallies: list[Tally]
    server_cpu: float
    """Seconds of CPU a second, the server's; one core is 1."""
    rude: dict[str, Any] | None = None
    """What the rude client said of itself."""


class Crowd(Closing):
    """A context manager; leaving it ends every client."""

    def __init__(self, endpoint: str, server_pid: int, seed: int) -> None:
        self._endpoint = endpoint
        self._server_pid = server_pid
        self._seed = seed
        self._stack = ExitStack()
        self._workers: list[Pipe] = []
        self._apart = False

    def close(self) -> None:
        self._stack.close()

    def grow(self, count: int) -> None:
        """Have at least `count` clients attached. Raises `WorkerFailed`, `ChildFailed`."""
        while len(self._workers) < count:
            first = len(self._workers)
            for number in range(first, min(first + AT_ONCE, count)):
                self._workers.append(self._stack.enter_context(self._worker(number)))
            for worker in self._workers[first:]:
                _answer(worker, START_TIMEOUT_S)
                self._place(worker.pid)

    def apart(self, apart: bool) -> None:
        """Whether the server has a core to itself and the clients the others, or all run
        wherever the kernel puts them. With one core there is no difference."""
        self._apart = apart
        for pid in (self._server_pid, *(worker.pid for worker in self._workers)):
            self._place(pid)

    def fill(self) -> None:
        """Put what the prompts have in common."""
        self.grow(1)
        self._workers[0].send({"do": "fill"})
        _answer(self._workers[0], SPARE_S)

    def work(self, count: int, seconds: float) -> Shift:
        """The first `count` clients work at the same time."""
        return self._shift(count, seconds, None)

    def beside(self, count: int, seconds: float, way: str) -> Shift:
        """The first `count` clients work beside a rude one that comes for this."""
        with self._worker(len(self._workers)) as rude:
            _answer(rude, START_TIMEOUT_S)
            self._place(rude.pid)
            return self._shift(count, seconds, (rude, way))

    def _shift(self, count: int, seconds: float, rude: tuple[Pipe, str] | None) -> Shift:
        self.grow(count)
        workers = self._workers[:count]
        start_ns = time.monotonic_ns() + int((BARRIER_S + PER_CLIENT_S * count) * 1e9)
        request = {"start_ns": start_ns, "seconds": seconds}
        if rude is not None:
            # What it prepares is not part of the measurement: it comes first.
            start_ns += int(BARRIER_S * 1e9)
            request["start_ns"] = start_ns
            rude[0].send({"do": rude[1], **request})
        for worker in workers:
            worker.send({"do": "work", **request})
        time.sleep(max(start_ns - time.monotonic_ns(), 0) / 1e9)
        cpu_s, began = cpu_seconds(self._server_pid), time.monotonic()
        time.sleep(seconds)
        cpu = (cpu_seconds(self._server_pid) - cpu_s) / (time.monotonic() - began)
        tallies = [Tally(**_answer(worker, seconds + SPARE_S)) for worker in workers]
        said = None
        if rude is not None:
            stopped = _is_stopped(rude[0].pid)
            os.kill(rude[0].pid, signal.SIGCONT)
            said = {"stopped": stopped, **_answer(rude[0], seconds + SPARE_S)}
        return Shift(seconds, tallies, cpu, said)

    def _place(self, pid: int) -> None:
        every = os.sched_getaffinity(0)
        cores = every
        if self._apart and len(every) > 1:
            first = {min(every)}
            cores = first if pid == self._server_pid else every - first
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):  # Threads come and go.
                os.sched_setaffinity(int(thread.name), cores)

    def _worker(self, number: int) -> Pipe:
        command = [sys.executable, "-m", "kvstore_benchmarks.clients.worker"]
        command += [self._endpoint, str(self._seed), str(number)]
        return Pipe(command, {})


def _answer(worker: Pipe, timeout_s: float) -> dict[str, Any]:
    said: dict[str, Any] = worker.receive(timeout_s)
    if "error" in said:
        raise WorkerFailed(said["error"])
    return said


def cpu_seconds(pid: int) -> float:
    """Of CPU that a process has used so far."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_stopped(pid: int) -> bool:
    return _stat(pid)[0] == "T"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before it may hold
    anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
