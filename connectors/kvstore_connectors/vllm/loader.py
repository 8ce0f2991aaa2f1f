"""Copies leased slots into the engine's KV cache, in threads of its own.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash
from vllm.logger import init_logger

from kvstore.errors import KVStoreError
from kvstore_connectors.vllm.stats import ConnectorStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore_connectors.vllm.blocks import HostBlocks
    from kvstore_connectors.vllm.link import Attached, StoreLink
    from kvstore_connectors.vllm.metadata import LoadJob

logger = init_logger("vllm.kvstore")

THREADS = 2
PART_BLOCKS = 16
"""Blocks a thread takes at a time: small enough to share one request's load."""


@dataclass(slots=True, eq=False)
class _Load:
    """A job under way. `good` is how many blocks of its front are known to be right."""

    job: LoadJob
    started_s: float
    next_block: int = 0
    parts_running: int = 0
    first_bad: int = 0


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
        self._loads: deque[_Load] = deque()
        self._unreported = 0
        self._finished: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._closing = False
        self.stats = ConnectorStats()
        self._threads = [
            threading.Thread(target=self._run, name=f"kvstore-load-{index}", daemon=True)
            for index in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        """Whether some load has not been taken as a result."""
        return self._unreported > 0

    def submit(self, job: LoadJob) -> None:
        load = _Load(job, time.monotonic(), first_bad=len(job.block_ids))
        with self._condition:
            self._loads.append(load)
            self._unreported += 1
            self._condition.notify_all()

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
        """Ends the threads after the blocks they are copying."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closing or self._loads)
                if self._closing:
                    return
                load, start, stop = self._take_part()
            try:
                good = self._copy_part(load.job, start, stop)
            except KVStoreError as error:
                logger.debug("A load from the KV store failed: %s", error)
                good = 0
            except Exception:
                logger.exception("A load from the KV store failed in an unforeseen way.")
                good = 0
            self._part_done(load, start, stop, good)

    def _take_part(self) -> tuple[_Load, int, int]:
        load = self._loads[0]
        start = load.next_block
        stop = min(start + PART_BLOCKS, len(load.job.block_ids))
        load.next_block = stop
        load.parts_running += 1
        if stop == len(load.job.block_ids):
            self._loads.popleft()
        return load, start, stop

    def _copy_part(self, job: LoadJob, start: int, stop: int) -> int:
        """How many blocks of the part's front are loaded and right."""
        with self._link.borrow() as attached:
            if attached is None or attached.epoch != job.epoch:
                return 0
            good = self._copy_blocks(attached, job, start, stop)
            if time.clock_gettime_ns(time.CLOCK_MONOTONIC) >= job.expires_ns:
                return 0
            if attached.client.epoch != job.epoch:
                return 0
            return good

    def _copy_blocks(self, attached: Attached, job: LoadJob, start: int, stop: int) -> int:
        addresses, checksums = job.addresses[self._shard], job.checksums[self._shard]
        block_bytes = self._blocks.block_bytes
        for index in range(start, stop):
            slot = attached.client.slot(addresses[index], block_bytes, False, epoch=job.epoch)
            self._blocks.load(job.block_ids[index], slot)
            if xxhash.xxh3_64_intdigest(slot) != checksums[index]:
                with self._condition:
                    self.stats.add(damaged_blocks=1)
                return index - start
        return stop - start

    def _part_done(self, load: _Load, start: int, stop: int, good: int) -> None:
        with self._condition:
            load.parts_running -= 1
            if good < stop - start:
                load.first_bad = min(load.first_bad, start + good)
                self._give_up_rest(load)
            if load.parts_running or load.next_block < len(load.job.block_ids):
                return
            block_ids = load.job.block_ids
            failed = block_ids[load.first_bad :]
            self._failed_blocks.update(failed)
            self._finished.add(load.job.request_id)
            self.stats.add(
                loaded_blocks=load.first_bad,
                loaded_bytes=load.first_bad * self._blocks.block_bytes,
                load_seconds=time.monotonic() - load.started_s,
                failed_loads=bool(failed),
            )
        self._on_done()

    def _give_up_rest(self, load: _Load) -> None:
        load.next_block = len(load.job.block_ids)
        if self._loads and self._loads[0] is load:
            self._loads.popleft()
