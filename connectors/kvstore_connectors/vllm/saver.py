"""Copies finished blocks out of the engine's KV cache into the store, in a thread.

A job may be cancelled at any moment, because its blocks are about to be
overwritten, and cancelling never waits for the thread. That is sound because a
block is published only if its job was still uncancelled after its bytes had been
copied and hashed: then the copy was finished before anyone was allowed to write.
A copy that raced with a cancellation is thrown away.

One call to the server publishes all that was copied since the last, of whichever
jobs, and brings the slots for what comes next (`slots`).

Jobs wait for nobody: when more is queued than `MAX_QUEUED_BYTES`, when there is no
server, or when a finished request has held its blocks for `FLUSH_S`, they are
dropped and counted. A lost store is a later miss, no more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash
from vllm.logger import init_logger

from kvstore.errors import KVStoreError, Unavailable
from kvstore.types import CommitOutcome, Segment
from kvstore_connectors.vllm.link import is_loss
from kvstore_connectors.vllm.metadata import JobReport
from kvstore_connectors.vllm.slots import Slot, SlotsAhead
from kvstore_connectors.vllm.stats import ConnectorStats
from kvstore_connectors.vllm.threads import outlive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvstore_connectors.vllm.blocks import HostBlocks
    from kvstore_connectors.vllm.link import Attached, StoreLink
    from kvstore_connectors.vllm.metadata import StoreJob

logger = init_logger("vllm.kvstore")

MAX_QUEUED_BYTES = 2 << 30
CHUNK_BYTES = 32 << 20
CHUNK_BLOCKS = 1024
"""Copied and committed at a time, and reserved ahead."""

IDLE_S = 1.0
"""Without a job for this long, the slots reserved ahead are given back."""
FLUSH_S = 2.0


@dataclass(slots=True, eq=False)
class _Save:
    """`taken`: blocks of the job that the thread has taken up."""

    job: StoreJob
    taken: int = 0
    cancelled: bool = False
    reported: bool = False
    lost: bool = False


@dataclass(slots=True)
class _Part:
    """Blocks `start` to `stop` of a job, and what they were written into."""

    save: _Save
    start: int
    stop: int
    slots: list[Slot] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)


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
        self._chunk = max(1, min(CHUNK_BLOCKS, CHUNK_BYTES // blocks.block_bytes))
        self._slots = SlotsAhead(self._chunk)
        self._thread = threading.Thread(
            target=outlive, args=(self._run, self._count_error), name="kvstore-save", daemon=True
        )
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

    def _take(self) -> list[_Part]:
        """What is queued, up to a chunk."""
        parts: list[_Part] = []
        room = self._chunk
        while self._queue and room:
            save = self._queue[0]
            start = save.taken
            save.taken = stop = min(start + room, len(save.job.keys))
            self._queued_blocks -= stop - start
            if stop == len(save.job.keys):
                self._queue.popleft()
            if not save.cancelled:
                parts.append(_Part(save, start, stop))
                room -= stop - start
        return parts

    # In the thread.

    def _run(self) -> None:
        while self._wait_for_work():
            self._work()

    def _work(self) -> None:
        with self._condition:
            parts = self._take()
        started_s = time.monotonic()
        stored = False
        try:
            stored = self._save(parts)
        except KVStoreError as error:
            logger.debug("A store to the KV store failed: %s", error)
        finally:
            with self._condition:
                self.stats.add(store_seconds=time.monotonic() - started_s)
                for part in parts:
                    save = part.save
                    save.lost |= not stored or len(part.slots) < part.stop - part.start
                    if save.taken == len(save.job.keys):
                        self._report(save, lost=save.lost)
            self._on_done()

    def _count_error(self) -> None:
        with self._condition:
            self.stats.add(thread_errors=1)

    def _wait_for_work(self) -> bool:
        """False when the thread is to end."""
        with self._condition:
            timeout_s = IDLE_S if self._slots else None
            self._condition.wait_for(lambda: self._closing or self._queue, timeout_s)
            if self._closing or self._queue:
                return not self._closing
        with self._link.borrow() as attached:
            self._slots.give_back(attached)
        return True

    def _save(self, parts: list[_Part]) -> bool:
        """Whether the blocks that got a slot are in the store now."""
        if not parts:
            return True
        with self._link.borrow() as attached:
            if attached is None:
                return False
            try:
                self._save_chunk(attached, parts)
            except KVStoreError as error:
                if is_loss(error):
                    self._link.failed(attached, error)
                raise
            return True

    def _save_chunk(self, attached: Attached, parts: list[_Part]) -> None:
        layout = attached.layouts[self._shard]
        present = sum(self._skip_present(attached, part) for part in parts)
        wanted = sum(part.stop - part.start for part in parts)
        slots = self._slots.take(attached, layout, wanted)
        denied = wanted - len(slots)
        try:
            self._copy(attached, parts, slots)
        except BaseException:
            self._slots.drop(attached, [slot for part in parts for slot in part.slots] + slots)
            raise
        # What was left over, and what a cancelled job wrote.
        self._slots.put_back(slots)
        outcomes = self._commit(attached, parts)
        stored = outcomes.count(CommitOutcome.STORED)
        with self._condition:
            self.stats.add(
                stored_blocks=stored,
                stored_bytes=stored * self._blocks.block_bytes,
                denied_blocks=denied,
                present_blocks=present + len(outcomes) - stored,
            )

    def _skip_present(self, attached: Attached, part: _Part) -> int:
        """Pass over the blocks that are there already, as far as can be seen."""
        layout_ids = [attached.layouts[self._shard].id]
        seen = attached.client.peek(layout_ids, part.save.job.keys[part.start : part.stop])
        held = 0 if seen is None else seen.held
        part.start += held
        return held

    def _copy(self, attached: Attached, parts: list[_Part], slots: list[Slot]) -> None:
        """Fill slots, taken from the end of `slots`, with the blocks of the parts."""

        def fill(views: list[memoryview]) -> None:
            for part in parts:
                for index in range(part.start, part.stop):
                    if part.save.cancelled or not slots:
                        break
                    if attached.dropped or self._closing:
                        raise Unavailable("the connection was given up")
                    part.slots.append(slots.pop())
                    view = views.pop()
                    self._blocks.save(part.save.job.block_ids[index], view)
                    part.checksums.append(xxhash.xxh3_64_intdigest(view))

        if slots:
            ids, addresses = [slot.id for slot in slots], [slot.address for slot in slots]
            attached.client.write_slots(ids, addresses, self._blocks.block_bytes, fill)

    def _commit(self, attached: Attached, parts: list[_Part]) -> list[CommitOutcome]:
        """Publish what was copied of jobs that are still wanted."""
        segments: list[Segment] = []
        written: list[Slot] = []
        for part in parts:
            # Not before here: see the module's first paragraph.
            if part.save.cancelled:
                self._slots.put_back(part.slots)
            else:
                segments += _segments(part)
                written += part.slots
        if not segments:
            return []
        layout = attached.layouts[self._shard]
        try:
            answer = attached.client.commit(layout, segments, ahead=self._slots.to_reserve)
        except BaseException:
            self._slots.drop(attached, written)
            raise
        self._slots.add(attached, answer.slots)
        return answer.outcomes


def _segments(part: _Part) -> list[Segment]:
    """What was copied, as runs of consecutive positions of a chain."""
    job = part.save.job
    segments = []
    count = len(part.slots)
    begin = 0
    for end in range(1, count + 1):
        at = part.start + end
        if end == count or job.parents[at] != job.keys[at - 1]:
            first = part.start + begin
            segments.append(
                Segment(
                    job.parents[first],
                    job.keys[first:at],
                    [slot.id for slot in part.slots[begin:end]],
                    part.checksums[begin:end],
                )
            )
            begin = end
    return segments
