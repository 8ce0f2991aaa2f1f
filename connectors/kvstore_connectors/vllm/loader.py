"""Copies leased slots into the engine's KV cache, in a thread of its own with helpers.

A block counts as loaded only when the checksum of its slot, taken after the copy,
is the one the lease named, and the clock, read after that, is before the lease's
end: whatever might have happened to the slot meanwhile shows in one of the two.
Of a model with one KV cache group, what follows the first block that fails is reported
as failed, and vLLM computes it. Of others it is the whole request: what was loaded of
one group is of no use without the rest.

Once a request's blocks are reported, in whatever way, no thread touches them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash
from vllm.logger import init_logger

from kvstore.errors import KVStoreError
from kvstore.local import copy
from kvstore_connectors.vllm.stats import ConnectorStats
from kvstore_connectors.vllm.threads import outlive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore_connectors.vllm.blocks import HostBlocks
    from kvstore_connectors.vllm.link import Attached, StoreLink
    from kvstore_connectors.vllm.metadata import LoadJob, LoadPart

logger = init_logger("vllm.kvstore")


@dataclass(slots=True)
class LoadResults:
    """`finished`: requests whose load has ended. Of those, `failed`: the ones of which
    nothing counts as loaded; `failed_blocks`: blocks of the others that do not."""

    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


class Loader:
    """Runs `LoadJob`s; `submit` and `take_results` are cheap and never wait."""

    def __init__(
        self,
        link: StoreLink,
        blocks: Sequence[HostBlocks],
        shard: int,
        on_done: Callable[[], None],
    ) -> None:
        """`blocks`: of each stored group. `on_done` is called, from a thread, when
        `take_results` has news."""
        self._link = link
        self._blocks = blocks
        self._shard = shard
        self._on_done = on_done
        self._condition = threading.Condition()
        self._jobs: deque[tuple[LoadJob, float]] = deque()
        self._unreported = 0
        self._results = LoadResults()
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
        return bool(self._results.finished)

    def take_results(self) -> LoadResults:
        """What has ended since the last call."""
        with self._condition:
            results, self._results = self._results, LoadResults()
            self._unreported -= len(results.finished)
        return results

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
        """How many blocks of the job's front, part after part, are loaded and right."""
        with self._link.borrow() as attached:
            if attached is None or attached.epoch != job.epoch:
                return 0
            good = 0
            for part in job.parts:
                loaded = self._load_part(attached, job, part)
                good += loaded
                if loaded < len(part.block_ids):
                    break
            return good if attached.client.epoch == job.epoch else 0

    def _load_part(self, attached: Attached, job: LoadJob, part: LoadPart) -> int:
        bad: list[int] = [len(part.block_ids)]

        def work(start: int, stop: int) -> None:
            # What follows a bad block is not loaded.
            if start < min(bad) and not self._closing:
                good = self._copy_blocks(attached, job, part, start, stop)
                if time.clock_gettime_ns(time.CLOCK_MONOTONIC) < job.expires_ns:
                    start += good
            if start < stop:
                bad.append(start)

        copy.share(work, len(part.block_ids), self._blocks[part.group].block_bytes)
        return min(bad)

    def _copy_blocks(
        self, attached: Attached, job: LoadJob, part: LoadPart, start: int, stop: int
    ) -> int:
        """How many of these blocks are right, up to the first that is not."""
        addresses, checksums = part.addresses[self._shard], part.checksums[self._shard]
        blocks = self._blocks[part.group]
        for index in range(start, stop):
            slot = attached.client.slot(addresses[index], blocks.block_bytes, epoch=job.epoch)
            blocks.load(part.block_ids[index], slot)
            if xxhash.xxh3_64_intdigest(slot) != checksums[index]:
                with self._condition:
                    self.stats.add(damaged_blocks=1)
                return index - start
        return stop - start

    def _report(self, job: LoadJob, good: int, started_s: float) -> None:
        whole = sum(len(part.block_ids) for part in job.parts)
        nbytes, left = 0, good
        for part in job.parts:
            loaded = min(left, len(part.block_ids))
            nbytes += loaded * self._blocks[part.group].block_bytes
            left -= loaded
        failed = good < whole or not job.parts
        with self._condition:
            self._results.finished.add(job.request_id)
            if failed and len(self._blocks) == 1 and job.parts:
                self._results.failed_blocks.update(job.parts[0].block_ids[good:])
            elif failed:
                self._results.failed.add(job.request_id)
            self.stats.add(
                loaded_blocks=good,
                loaded_bytes=nbytes,
                load_seconds=time.monotonic() - started_s,
                failed_loads=failed,
            )
        self._on_done()
