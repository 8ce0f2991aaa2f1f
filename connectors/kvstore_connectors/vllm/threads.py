"""Threads that outlive a bug: it costs what was under way, and is logged and counted.

A thread of the connector that ended would be noticed by nobody: requests would wait
for its answers, or lose every hit, until the engine is started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.logger import init_logger

logger = init_logger("vllm.kvstore")

PAUSE_S = 0.1
"""Between an error and the next try, so that one that repeats does not use up a core."""


def outlive(run: Callable[[], None], count: Callable[[], None]) -> None:
    """Call `run` until it returns; after an error nobody foresaw, `count` and again."""
    while True:
        try:
            return run()
        except Exception:
            logger.exception("The KV store connector failed in an unforeseen way.")
            count()
            time.sleep(PAUSE_S)
