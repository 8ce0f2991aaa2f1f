"""Copies finished blocks out of the engine's KV cache into the store, in a thread.

A job may be cancelled at any moment, because its blocks are about to be
overwritten, and cancelling never waits for the thread. That is sound because a
block is published only if its job was still uncancelled after its bytes had been
copied and hashed: then the copy was finished before anyone was allowed to write.
A copy that raced with a cancellation is thrown away.

Jobs wait for nobody: when more is queued than `MAX_QUEUED_BYTES`, when there is no
server, or when a finished request has held its blocks for `FLUSH_S`, they are
dropped and counted. A lost store is a later miss, no more.
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
from kvstore.types import ReservationGrant, ReserveOutcome
from kvstore_connectors.vllm.link import is_loss
from kvstore_connectors.vllm.metadata import JobReport
from kvstore_connectors.vllm.stats import ConnectorStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvstore_connectors.vllm.blocks import HostBlocks
    from kvstore_connectors.vllm.link import Attached, StoreLink
    from kvstore_connectors.vllm.metadata import StoreJob

logger = init_logger("vllm.kvstore")

MAX_QUEUED_BYTES = 2 << 30
CHUNK_BYTES = 32 << 20
"""Reserved, copied and committed at a time: two calls to the server for each."""

RESERVE_WAIT_MS = 100
FLUSH_S = 2.0


@dataclass(slots=True, eq=False)
class _Save:
    job: StoreJob
    cancelled: bool = False
    reported: bool = False


class Saver:
    """Runs `StoreJob`s; all methods but `close` are cheap and never wait."""

    def __init__(
        self, link: StoreLink, blocks: HostBlocks, shard: int, on_done: Callable[[], None]
    ) -> None:
        """`on_done` is called, from a thread, when `take_reports` has news."""
        self._link = link
        self._blocks = blocks
        self._shard = shard
        self._on_done = on_done
        self._condition = threading.Condition()
        self._queue: deque[_Save] = deque()
        self._queued_blocks = 0
        self._saves: dict[int, _Save] = {}
        self._reports: dict[int, JobReport] = {}
        self._of_request: dict[str, set[int]] = {}
        # Finished requests whose blocks are held, and since when.
        self._flushing: dict[str, float] = {}
        self._closing = False
        self.stats = ConnectorStats()
        self._max_queued_blocks = max(1, MAX_QUEUED_BYTES // blocks.block_bytes)
        self._chunk = max(1, CHUNK_BYTES // blocks.block_bytes)
        self._thread = threading.Thread(target=self._run, name="kvstore-save", daemon=True)
        self._thread.start()

    def submit(self, job: StoreJob) -> None:
        """Queue a job whose blocks are computed, or drop it at once."""
        save = _Save(job)
        with self._condition:
            self._saves[job.job_id] = save
            self._of_request.setdefault(job.request_id, set()).add(job.job_id)
            behind = self._queued_blocks + len(job.keys) > self._max_queued_blocks
            if behind or not self._link.up:
                self._drop(save)
                return
            self._queue.append(save)
            self._queued_blocks += len(job.keys)
            self._condition.notify()

    def cancel(self, job_ids: Iterable[int]) -> None:
        """From the return of this call on, nothing read of these jobs' blocks is published."""
        with self._condition:
            for job_id in job_ids:
                save = self._saves.get(job_id)
                if save is not None:
                    self._drop(save)

    def cancel_all(self) -> None:
        self.cancel(list(self._saves))

    def flush(self, request_id: str) -> None:
        """The request has finished: `take_flushed` names it once its jobs are reported."""
        with self._condition:
            self._flushing[request_id] = time.monotonic()

    @property
    def flushing(self) -> bool:
        return bool(self._flushing)

    def has_flushed(self) -> bool:
        return any(request_id not in self._of_request for request_id in self._flushing)

    def take_flushed(self) -> set[str]:
        """Finished requests that no job reads any more; each is named once."""
        if not self._flushing:
            return set()
        now_s = time.monotonic()
        with self._condition:
            for request_id, since_s in self._flushing.items():
                if now_s - since_s > FLUSH_S:
                    for job_id in list(self._of_request.get(request_id, ())):
                        self._drop(self._saves[job_id])
            flushed = {each for each in self._flushing if each not in self._of_request}
            for request_id in flushed:
                del self._flushing[request_id]
        return flushed

    def take_reports(self) -> dict[int, JobReport]:
        """Jobs that ended since the last call."""
        if not self._reports:
            return {}
        with self._condition:
            reports, self._reports = self._reports, {}
        return reports

    def take_stats(self) -> ConnectorStats | None:
        if self.stats.is_empty():
            return None
        with self._condition:
            return self.stats.take()

    def close(self, timeout_s: float = 5.0) -> None:
        """Drops what is queued and ends the thread after the block it is copying."""
        self.cancel_all()
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(timeout_s)

    # With the lock held.

    def _drop(self, save: _Save) -> None:
        if not save.reported:
            save.cancelled = True
            self.stats.add(skipped_blocks=len(save.job.keys))
            self._report(save, lost=True)

    def _report(self, save: _Save, *, lost: bool) -> None:
        if save.reported:
            return
        save.reported = True
        job = save.job
        del self._saves[job.job_id]
        self._reports[job.job_id] = JobReport(workers=1, lost=lost)
        jobs = self._of_request[job.request_id]
        jobs.discard(job.job_id)
        if not jobs:
            del self._of_request[job.request_id]

    # In the thread.

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closing or self._queue)
                if self._closing:
                    return
                save = self._queue.popleft()
                self._queued_blocks -= len(save.job.keys)
            if save.cancelled:
                continue
            started_s = time.monotonic()
            try:
                complete = self._save(save)
            except KVStoreError as error:
                logger.debug("A store to the KV store failed: %s", error)
                complete = False
            except Exception:
                logger.exception("A store to the KV store failed in an unforeseen way.")
                complete = False
            with self._condition:
                self.stats.add(store_seconds=time.monotonic() - started_s)
                self._report(save, lost=not complete)
            self._on_done()

    def _save(self, save: _Save) -> bool:
        """Whether every block of the job is in the store now, as far as known."""
        complete = True
        for start in range(0, len(save.job.keys), self._chunk):
            if save.cancelled or self._closing:
                return False
            with self._link.borrow() as attached:
                if attached is None:
                    return False
                try:
                    complete &= self._save_chunk(attached, save, start)
                except KVStoreError as error:
                    if is_loss(error):
                        self._link.failed(attached, error)
                    raise
        return complete

    def _save_chunk(self, attached: Attached, save: _Save, start: int) -> bool:
        job, client = save.job, attached.client
        stop = min(start + self._chunk, len(job.keys))
        entries = list(zip(job.keys[start:stop], job.parents[start:stop], strict=True))
        layout = attached.layouts[self._shard]
        grant = client.reserve(layout, entries, RESERVE_WAIT_MS)
        outcomes = [result.outcome for result in grant.results]
        granted = outcomes.count(ReserveOutcome.GRANTED)
        denied = outcomes.count(ReserveOutcome.DENIED)
        stored = 0
        if grant.reservation_id:
            try:
                stored = self._fill(attached, save, start, grant)
            finally:
                if stored < granted:
                    client.abort(grant.reservation_id)
        with self._condition:
            self.stats.add(
                stored_blocks=stored,
                stored_bytes=stored * self._blocks.block_bytes,
                denied_blocks=denied,
                present_blocks=len(entries) - granted - denied,
            )
        return stored == granted and not denied

    def _fill(self, attached: Attached, save: _Save, start: int, grant: ReservationGrant) -> int:
        """Copy and publish the granted blocks; how many were published."""
        client, block_bytes = attached.client, self._blocks.block_bytes
        indices: list[int] = []
        checksums: list[int] = []
        for index, result in enumerate(grant.results):
            if result.outcome is not ReserveOutcome.GRANTED:
                continue
            if save.cancelled or attached.dropped:
                return 0
            slot = client.slot(result.address, block_bytes, True, epoch=attached.epoch)
            self._blocks.save(save.job.block_ids[start + index], slot)
            checksums.append(xxhash.xxh3_64_intdigest(slot))
            indices.append(index)
        # Not before here: see the module's first paragraph.
        if save.cancelled:
            return 0
        client.commit(grant.reservation_id, indices, checksums)
        return len(indices)
