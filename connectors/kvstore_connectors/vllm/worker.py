"""A worker's half: runs the scheduler's orders against this rank's KV cache.

Its methods are called on the engine's thread between the steps' computations and
only move jobs to and from the copying threads. The one wait, of `IDLE_WAIT_S`, is
in a step that computes nothing and would otherwise be repeated at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvstore_connectors.vllm.blocks import HostBlocks
from kvstore_connectors.vllm.loader import Loader
from kvstore_connectors.vllm.metadata import JobReport, StepMetadata, WorkerReport
from kvstore_connectors.vllm.saver import Saver
from kvstore_connectors.vllm.stats import ConnectorStats

if TYPE_CHECKING:
    import torch

    from kvstore.types import LayoutSpec
    from kvstore_connectors.vllm.layout import Geometry
    from kvstore_connectors.vllm.link import StoreLink

logger = init_logger("vllm.kvstore")

ATTACH_WAIT_S = 5.0
IDLE_WAIT_S = 0.001


class WorkerSide:
    """One rank. `writes`: whether this rank stores, or another with equal KV does."""

    def __init__(
        self,
        *,
        link: StoreLink,
        geometry: Geometry,
        shard: int,
        writes: bool,
        specs_for: Callable[[str], Sequence[LayoutSpec]],
    ) -> None:
        self._link = link
        self._geometry = geometry
        self._shard = shard
        self._writes = writes
        self._specs_for = specs_for
        self._salt = ""
        self._news = threading.Condition()
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self._failed_blocks: set[int] = set()
        # Reports of jobs that another rank runs for this one.
        self._not_mine: dict[int, JobReport] = {}
        self._flushed_elsewhere: set[str] = set()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Raises `ConfigError` for a KV cache that is not as configured."""
        blocks = HostBlocks(kv_caches, self._geometry)
        self._loader = Loader(self._link, blocks, self._shard, self._announce)
        self._saver = Saver(self._link, blocks, self._shard, self._announce)
        # The first requests would miss without it, and nobody is waiting yet.
        self._link.wait_attached(ATTACH_WAIT_S)

    def before_step(self, meta: StepMetadata) -> None:
        """Before any block may be overwritten."""
        if self._saver is None:
            return
        self._saver.cancel(meta.cancelled)
        if meta.salt != self._salt:
            self._salt = meta.salt
            # What is queued was computed before the change.
            self._saver.cancel_all()
            self._link.change_layouts(self._specs_for(meta.salt))

    def start_loads(self, meta: StepMetadata) -> None:
        assert self._loader is not None
        for job in meta.loads:
            self._loader.submit(job)

    def start_stores(self, meta: StepMetadata) -> None:
        """After the forward pass that completes the blocks."""
        assert self._saver is not None
        for job in meta.stores:
            if self._writes:
                self._saver.submit(job)
            else:
                self._not_mine[job.job_id] = JobReport(workers=1, lost=False)
        for request_id in meta.flushing:
            if self._writes:
                self._saver.flush(request_id)
            else:
                self._flushed_elsewhere.add(request_id)

    def take_finished(self, meta: StepMetadata) -> tuple[set[str], set[str]]:
        """(requests whose blocks may go, requests whose load has ended)."""
        assert self._loader is not None and self._saver is not None
        if meta.idle and (self._loader.busy or self._saver.flushing):
            with self._news:
                self._news.wait_for(self._has_news, IDLE_WAIT_S)
        loaded, failed = self._loader.take_results()
        self._failed_blocks |= failed
        flushed = self._saver.take_flushed() | self._flushed_elsewhere
        self._flushed_elsewhere = set()
        return flushed, loaded

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> WorkerReport | None:
        assert self._saver is not None
        jobs, self._not_mine = self._not_mine, {}
        jobs.update(self._saver.take_reports())
        return WorkerReport(jobs) if jobs else None

    def take_stats(self) -> ConnectorStats | None:
        assert self._loader is not None and self._saver is not None
        total = self._loader.take_stats()
        more = self._saver.take_stats()
        if total is None or more is None:
            return total or more
        return total.aggregate(more)

    def close(self) -> None:
        if self._saver is not None:
            self._saver.close()
        if self._loader is not None:
            self._loader.close()
        self._link.close()

    def _announce(self) -> None:
        with self._news:
            self._news.notify_all()

    def _has_news(self) -> bool:
        assert self._loader is not None and self._saver is not None
        return self._loader.has_results() or self._saver.has_flushed()
