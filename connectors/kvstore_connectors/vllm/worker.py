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

from kvstore.errors import ConfigError, DeviceError
from kvstore_connectors.vllm.adapter_files import LoadedAdapters
from kvstore_connectors.vllm.blocks import blocks_of, device_of
from kvstore_connectors.vllm.loader import Loader
from kvstore_connectors.vllm.metadata import JobReport, StepMetadata, WorkerReport
from kvstore_connectors.vllm.saver import Saver
from kvstore_connectors.vllm.stats import ConnectorStats

if TYPE_CHECKING:
    import torch

    from kvstore.device.base import Device
    from kvstore.types import LayoutSpec
    from kvstore_connectors.vllm.blocks import Geometry
    from kvstore_connectors.vllm.link import StoreLink

logger = init_logger("vllm.kvstore")

IDLE_WAIT_S = 0.002
"""Measured with 125 MB to load in the engine's own process, where a copy takes 26 ms:
the load takes 543 ms without a wait, 28 ms with 1 ms, 25 ms with 2 ms and 22 ms with
5 ms. The engine's empty steps hold the interpreter lock that the copies need."""


class WorkerSide:
    """One rank. `link`: with this rank's own layouts. `geometries`: of each stored group.
    `writes`: whether this rank stores, or another with equal KV does. `loads`: whether the
    engine loads at all. `specs_for(salt)`: the layouts. `adapters`: None where the engine has no
    LoRA."""

    def __init__(
        self,
        *,
        link: StoreLink,
        geometries: Sequence[Geometry],
        rank: int,
        shard: int,
        writes: bool,
        loads: bool,
        specs_for: Callable[[str], Sequence[LayoutSpec]],
        adapters: LoadedAdapters | None,
    ) -> None:
        self._link = link
        self._rank = rank
        self._adapters = adapters
        self._geometries = geometries
        self._shard = shard
        self._writes = writes
        self._loads = loads
        self._specs_for = specs_for
        self._salt = ""
        self._news = threading.Condition()
        self._device: Device | None = None
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self._failed_blocks: set[int] = set()
        # What this rank answers for orders it does not carry out: another rank
        # with equal KV stores them, or its KV cache is not what was expected.
        self._not_mine: dict[int, JobReport] = {}
        self._refused: set[str] = set()
        self._prefill = 0

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor], reader: bytes = b"") -> None:
        """A KV cache that is not as configured is left alone: every order fails. `reader`: see
        `reader_of`."""
        try:
            self._device = device = device_of(kv_caches)
            blocks = [blocks_of(device, kv_caches, each) for each in self._geometries]
        except (ConfigError, DeviceError) as error:
            logger.warning("KVStoreConnector is off: %s.", error)
            return
        self._loader = Loader(
            self._link, device, blocks, self._shard, self._announce,
            expects=self._loads, reader=reader,
        )  # fmt: skip
        self._saver = Saver(self._link, device, blocks, self._announce)
        self._link.wait_first_try()

    @property
    def layouts(self) -> list[LayoutSpec]:
        """Of what it keeps in the store: none where it has to leave its KV cache alone."""
        return [] if self._saver is None else self._link.specs

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
        self._prefill = meta.prefill
        if self._loader is not None:
            self._loader.give_up(meta.unwanted)
        for job in meta.loads:
            if self._loader is not None and self._has_adapter(meta, job.request_id):
                self._loader.submit(job)
            else:
                self._refused.add(job.request_id)

    def start_stores(self, meta: StepMetadata) -> None:
        """After the forward pass that completes the blocks."""
        saver = self._saver
        for job in meta.stores:
            if saver is None or not self._has_adapter(meta, job.request_id):
                self._not_mine[job.job_id] = JobReport(workers=1, lost=True)
            elif self._writes:
                saver.submit(job)
            else:
                self._not_mine[job.job_id] = JobReport(workers=1, lost=False)

    def _has_adapter(self, meta: StepMetadata, request_id: str) -> bool:
        """Whether a request is computed with what its keys say."""
        adapter = meta.adapters.get(request_id)
        return adapter is None or (self._adapters is not None and self._adapters.has(adapter))

    def take_loaded(self, meta: StepMetadata) -> tuple[set[str], set[str]]:
        """(requests whose load has ended, those of them of which nothing is loaded)."""
        refused, self._refused = self._refused, set()
        loader, saver = self._loader, self._saver
        if loader is None or saver is None:
            return refused, refused
        if meta.idle and (loader.busy or saver.busy):
            with self._news:
                self._news.wait_for(
                    lambda: loader.has_results() or saver.has_reports(), IDLE_WAIT_S
                )
        results = loader.take_results()
        self._failed_blocks |= results.failed_blocks
        return refused | results.finished, refused | results.failed

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> WorkerReport | None:
        jobs, self._not_mine = self._not_mine, {}
        if self._saver is not None:
            jobs.update(self._saver.take_reports())
        loaded = {} if self._adapters is None else self._adapters.take_news()
        prefill, self._prefill = self._prefill, 0
        if not jobs and not loaded and not prefill:
            return None
        adapters = {number: {self._rank: each} for number, each in loaded.items()}
        return WorkerReport(jobs, adapters, prefill)

    def take_stats(self) -> ConnectorStats | None:
        total: ConnectorStats | None = None
        for part in (self._loader, self._saver):
            stats = None if part is None else part.take_stats()
            if stats is not None:
                total = stats if total is None else total.aggregate(stats)
        return total

    def close(self) -> None:
        if self._adapters is not None:
            self._adapters.close()
        if self._saver is not None:
            self._saver.close()
        if self._loader is not None:
            self._loader.close()
        if self._device is not None:
            self._device.close()
        self._link.close()

    def _announce(self) -> None:
        with self._news:
            self._news.notify_all()
