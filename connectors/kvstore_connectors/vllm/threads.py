"""How the connector's threads run: wherever they may, and on after a bug.

A thread of the connector that ended would be noticed by nobody: requests would wait
for its answers, or lose every hit, until the engine is started again. So a bug costs what
was under way, and is logged and counted.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable

from vllm.logger import init_logger

logger = init_logger("vllm.kvstore")

PAUSE_S = 0.1
"""Between an error and the next try, so that one that repeats does not use up a core."""


def outlive(run: Callable[[], None], count: Callable[[], None]) -> None:
    """Call `run` until it returns; after an error nobody foresaw, `count` and again."""
    _roam()
    while True:
        try:
            return run()
        except Exception:
            logger.exception("The KV store connector failed in an unforeseen way.")
            count()
            time.sleep(PAUSE_S)


def _roam() -> None:
    """Let the calling thread run on all cores that vLLM was given.

    vLLM binds the thread that makes this one to a core, for the computation; copies would
    take turns with it there, while others idle. What vLLM was given is what the process
    has that started this one, where there is one.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        # A thread may have lost its cores meanwhile, and a process its parent.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(parent.pid))
