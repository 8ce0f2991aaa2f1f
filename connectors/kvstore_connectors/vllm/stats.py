"""Counters of the connector, through vLLM's own log line and `/metrics`.

Scheduler and workers each count what happened since they were last asked; vLLM
adds the counts up. Blocks are counted once a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS = {
    "asked_blocks": "Prompt blocks the store was asked for.",
    "found_blocks": "Prompt blocks the store held, of those asked for.",
    "unneeded_blocks": "Blocks the store handed out and vLLM computed or had itself by then.",
    "acquire_timeouts": "Requests computed because the store did not answer in time.",
    "handover_timeouts": "Prompts that another vLLM was to store and did not in time.",
    "detached": "Requests computed without asking, for want of a server.",
    "loaded_blocks": "Blocks loaded into the engine's KV cache.",
    "loaded_bytes": "Bytes of the blocks loaded.",
    "load_seconds": "Seconds spent loading.",
    "vram_blocks": "Blocks of those loaded that the store had in the GPU's memory.",
    "straight_blocks": "Blocks of those loaded that were in the GPU's memory alone.",
    "straight_misses": "Blocks leased in the GPU's memory alone that were gone by then.",
    "failed_loads": "Loads given up and recomputed: server lost, lease over, damaged bytes.",
    "damaged_blocks": "Blocks that arrived with the wrong checksum.",
    "stored_blocks": "Blocks written to the store.",
    "stored_bytes": "Bytes of the blocks written.",
    "store_seconds": "Seconds spent storing.",
    "present_blocks": "Blocks offered that the store already had or was just getting.",
    "denied_blocks": "Blocks the store had no space for.",
    "thread_errors": "Errors nobody foresaw, survived; each is in the log.",
    "landed_blocks": "Blocks handed over that were written into a GPU's memory, once for each.",
    "not_landed_blocks": "Blocks handed over of which none was: no place, or not reached.",
    "skipped_blocks": "Blocks not stored: too far behind, preempted, or no server.",
}


@dataclass
class ConnectorStats(KVConnectorStats):
    """`data` maps names of `COUNTERS` to amounts; names that are 0 are left out."""

    data: dict[str, Any] = field(default_factory=dict)

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            if amount:
                self.data[name] = self.data.get(name, 0) + amount

    def take(self) -> ConnectorStats | None:
        """What was counted since the last call, None if nothing."""
        if not self.data:
            return None
        taken, self.data = ConnectorStats(self.data), {}
        return taken

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        self.add(**other.data)
        return self

    def is_empty(self) -> bool:
        return not self.data

    def reduce(self) -> dict[str, int | float]:
        summary: dict[str, int | float] = {
            name: amount for name, amount in self.data.items() if not name.endswith("_seconds")
        }
        for verb, nbytes in (("load", "loaded_bytes"), ("store", "stored_bytes")):
            seconds = self.data.get(f"{verb}_seconds", 0)
            if seconds:
                rate = self.data.get(nbytes, 0) / seconds / 1e9
                summary[f"{verb}_GBps"] = round(rate, 2)
        return summary


class ConnectorPromMetrics(KVConnectorPromMetrics):
    """One counter `vllm:kvstore_<name>` for each of `COUNTERS`, labelled as vLLM's own."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._counters: dict[str, dict[int, Any]] = {}
        for name, documentation in COUNTERS.items():
            counter: Any = make(
                name=f"vllm:kvstore_{name}", documentation=documentation, labelnames=labelnames
            )
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            counters = self._counters.get(name)
            if counters is not None:
                counters[engine_idx].inc(amount)
