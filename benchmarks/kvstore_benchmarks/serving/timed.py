"""The connector with a clock around each hook of the scheduler: for `hooks`, which reads it.

vLLM loads this by its module's path, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter_ns, thread_time_ns
from typing import TYPE_CHECKING, Any

from kvstore_benchmarks.serving.hooks import EACH_STEP, FILE, HOOKS, IDLE, map_times
from kvstore_connectors.vllm.connector import KVStoreConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig

BUILD = "build_connector_meta"

Hook = Callable[..., Any]


class TimedConnector(KVStoreConnector):
    """Steps that compute nothing are booked apart: in them the engine waits for the store,
    and has nothing else to do."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        # The workers' half is not on the engine's thread.
        if self._scheduler is not None:
            self._times = map_times(os.environ[FILE])
            self._idle = False
            for name in HOOKS:
                if name != IDLE:
                    setattr(self, name, self._timed(name, getattr(self, name)))

    def book(self, name: str, busy_ns: int, taken_ns: int) -> None:
        """A hook, or `IDLE`, was called."""
        at = 2 * HOOKS.index(name)
        self._times[at] += busy_ns
        self._times[at + 1] += taken_ns

    def _timed(self, name: str, hook: Hook) -> Hook:
        def timed(*arguments: Any) -> Any:
            # The clock is a system call, which the engine's work has driven out of the caches
            # like everything else; that is not to be the hook's.
            thread_time_ns()
            early_ns = thread_time_ns()
            started_ns, began_ns = perf_counter_ns(), thread_time_ns()
            try:
                return hook(*arguments)
            finally:
                ended_ns, taken_ns = thread_time_ns(), perf_counter_ns() - started_ns
                clock_ns = began_ns - early_ns
                if name == BUILD:
                    self._idle = not arguments[0].total_num_scheduled_tokens
                booked = IDLE if self._idle and name in EACH_STEP else name
                self.book(booked, max(0, ended_ns - began_ns - clock_ns), taken_ns - clock_ns)

        return timed
