"""Work in many parts, each core taking the next one.

Not a `multiprocessing.Pool`: that ends its processes with SIGTERM, which one that was only just
forked loses where the command handles it, and then waits for it for ever; and it waits for ever
for what a killed process had begun.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from kvstore.errors import InternalError
from kvstore.sim.replay import Progress

POLL_S = 0.2

T = TypeVar("T")
Part = Callable[[int, Progress], T]
"""Does the part of that number."""


def spread(
    parts: int,
    do: Part[T],
    processes: int,
    progress: Progress | None = None,
    enough: Callable[[list[T]], bool] | None = None,
) -> list[T]:
    """What came of each part, in their order. What `do` needs is shared, not copied.

    `enough`: asked of what came of the first parts, of one, of two and so on; where it says so,
    that is all. However many processes there are, it is the same.

    Raises what a part raises, and `InternalError` if a process ends before its part; whatever
    else was being done is stopped.
    """
    tell = progress or (lambda done: None)
    found: list[T] = []
    if processes == 1 or parts == 1:
        for number in range(parts):
            found.append(do(number, lambda part: tell((len(found) + part) / parts)))
            if enough is not None and enough(found):
                break
        return found
    context = multiprocessing.get_context("fork")
    done: Any = context.Array("d", parts, lock=False)
    results: dict[int, T] = {}
    workers: dict[Connection, ForkProcess] = {}
    try:
        for _ in range(min(processes, parts)):
            ours, theirs = context.Pipe()
            inherited = [*workers, ours]
            worker = context.Process(target=_work, args=(theirs, inherited, do, done), daemon=True)
            worker.start()
            workers[ours] = worker
            # While somebody else has an end open, its process is not seen to end.
            theirs.close()
        left = iter(range(parts))
        for ours in workers:
            ours.send(next(left))
        while len(found) < parts:
            for ready in wait(list(workers), POLL_S):
                assert isinstance(ready, Connection)
                number, result = _result(ready)
                results[number] = result
                while len(found) in results:
                    found.append(results[len(found)])
                    if enough is not None and enough(found):
                        return found
                following = next(left, None)
                if following is not None:
                    ready.send(following)
            tell(sum(done) / parts)
    finally:
        for ours, worker in workers.items():
            worker.kill()
            worker.join()
            ours.close()
    return found


def _result(ready: Connection) -> tuple[int, Any]:
    try:
        number, result, error = ready.recv()
    except (EOFError, OSError):
        raise InternalError("a process ended before what it had to do") from None
    if error is not None:
        raise error
    return number, result


def _work(orders: Connection, inherited: list[Connection], do: Part[Any], done: Any) -> None:
    # A terminal interrupts all; who started this one then ends it, without a word.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for end in inherited:
        end.close()
    while True:
        try:
            number: int = orders.recv()
        except EOFError:  # killed, who would give more
            return

        def note(part: float, number: int = number) -> None:
            done[number] = part

        try:
            result, error = do(number, note), None
        except Exception as found:  # noqa: BLE001 - the asker's to handle
            result, error = None, found
        note(1.0)
        orders.send((number, result, error))
