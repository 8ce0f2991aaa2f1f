"""Copies leased slots into the engine's KV cache, in a thread of its own with helpers.

A block counts as loaded only when the checksum of its slot, taken after the copy,
is the one the lease named, and the clock, read after that, is before the lease's
end: whatever might have happened to the slot meanwhile shows in one of the two.
From the first block on that fails, the rest of the request is reported as failed,
and vLLM computes it.

Once a request's blocks are reported, in whatever way, no thread touches them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import xxhash
from vllm.logger import init_logger

from kvstore.errors import KVStoreError
from kvstore.local import copy
from kvstore_connectors.vllm.stats import ConnectorStats
from kvstore_connectors.vllm.threads import outlive

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore_connectors.vllm.blocks import HostBlocks
    from kvstore_connectors.vllm.link import Attached, StoreLink
    from kvstore_connectors.vllm.metadata import LoadJob

logger = init_logger("vllm.kvstore")


class Loader:
    """Runs `LoadJob`s; `submit` and `take_results` are cheap and never wait."""

    def __init__(
        self, link: StoreLink, blocks: HostBlocks, shard: int, on_done: Callable[[], None]
    ) -> None:
        """`on_done` is called, from a thread, when `take_results` has news."""
        self._link = link
        self._blocks = blocks
        self._shard = shard
        self._on_done = on_done
        self._condition = threading.Condition()
        self._jobs: deque[tuple[LoadJob, float]] = deque()
        self._unreported = 0
        self._finished: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._closing = False
        self.stats = ConnectorStats()
        self._thread = threading.Thread(
            target=outlive, args=(self._run, self._count_error), name="kvstore-load", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether some load has not been taken as a result."""
        return self._unreported > 0

    def submit(self, job: LoadJob) -> None:
        with self._condition:
            self._jobs.append((job, time.monotonic()))
            self._unreported += 1
            self._condition.notify()

    def has_results(self) -> bool:
        return bool(self._finished)

    def take_results(self) -> tuple[set[str], set[int]]:
        """(requests whose load has ended, blocks among theirs that are not loaded)."""
        with self._condition:
            finished, self._finished = self._finished, set()
            failed, self._failed_blocks = self._failed_blocks, set()
            self._unreported -= len(finished)
        return finished, failed

    def take_stats(self) -> ConnectorStats | None:
        if self.stats.is_empty():
            return None
        with self._condition:
            return self.stats.take()

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the blocks that are being copied."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closing or self._jobs)
                if self._closing:
                    return
                job, started_s = self._jobs.popleft()
            good = 0
            try:
                good = self._load(job)
            except KVStoreError as error:
                logger.debug("A load from the KV store failed: %s", error)
            finally:
                self._report(job, good, started_s)

    def _count_error(self) -> None:
        with self._condition:
            self.stats.add(thread_errors=1)

    def _load(self, job: LoadJob) -> int:
        """How many blocks of the job's front are loaded and right."""
        with self._link.borrow() as attached:
            if attached is None or attached.epoch != job.epoch:
                return 0
            bad: list[int] = [len(job.block_ids)]

            def work(start: int, stop: int) -> None:
                # What follows a bad block is not loaded.
                if start < min(bad) and not self._closing:
                    good = self._copy_blocks(attached, job, start, stop)
                    if time.clock_gettime_ns(time.CLOCK_MONOTONIC) < job.expires_ns:
                        start += good
                if start < stop:
                    bad.append(start)

            copy.share(work, len(job.block_ids), self._blocks.block_bytes)
            return min(bad) if attached.client.epoch == job.epoch else 0

    def _copy_blocks(self, attached: Attached, job: LoadJob, start: int, stop: int) -> int:
        """How many of these blocks are right, up to the first that is not."""
        addresses, checksums = job.addresses[self._shard], job.checksums[self._shard]
        block_bytes = self._blocks.block_bytes
        for index in range(start, stop):
            slot = attached.client.slot(addresses[index], block_bytes, epoch=job.epoch)
            self._blocks.load(job.block_ids[index], slot)
            if xxhash.xxh3_64_intdigest(slot) != checksums[index]:
                with self._condition:
                    self.stats.add(damaged_blocks=1)
                return index - start
        return stop - start

    def _report(self, job: LoadJob, good: int, started_s: float) -> None:
        failed = job.block_ids[good:]
        with self._condition:
            self._failed_blocks.update(failed)
            self._finished.add(job.request_id)
            self.stats.add(
                loaded_blocks=good,
                loaded_bytes=good * self._blocks.block_bytes,
                load_seconds=time.monotonic() - started_s,
                failed_loads=bool(failed),
            )
        self._on_done()
