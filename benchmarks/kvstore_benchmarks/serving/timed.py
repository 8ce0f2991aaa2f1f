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


class TimedConnector(KVStoreConnector):
    """Steps that compute nothing are booked apart: in them the engine waits for the store,
    and has nothing else to do."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        # The workers' half is not on the engine's thread.
        self._times = None if self._scheduler is None else map_times(os.environ[FILE])
        self._idle = False


def _timed(name: str) -> Callable[..., Any]:
    inner = getattr(KVStoreConnector, name)
    own, idle = 2 * HOOKS.index(name), 2 * HOOKS.index(IDLE)

    def hook(self: TimedConnector, *arguments: Any, **named: Any) -> Any:
        times = self._times
        if times is None:
            return inner(self, *arguments, **named)
        started_ns, began_ns = perf_counter_ns(), thread_time_ns()
        try:
            return inner(self, *arguments, **named)
        finally:
            busy_ns, taken_ns = thread_time_ns() - began_ns, perf_counter_ns() - started_ns
            if name == BUILD:
                self._idle = not arguments[0].total_num_scheduled_tokens
            at = idle if self._idle and name in EACH_STEP else own
            times[at] += busy_ns
            times[at + 1] += taken_ns

    return hook


for _name in HOOKS:
    if _name != IDLE:
        setattr(TimedConnector, _name, _timed(_name))
