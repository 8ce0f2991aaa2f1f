"""Work that may never end, because it asks a drive that may never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait


def ended_within(seconds: float, work: Callable[[], None]) -> bool:
    """Whether `work`, done in a thread of its own, ended in time; blocks until then. The
    thread is left behind otherwise. Raises what `work` raises."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - For whoever waits.
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="kvstore-closing", daemon=True).start()
    if not wait([future], seconds).done:
        return False
    future.result()
    return True
