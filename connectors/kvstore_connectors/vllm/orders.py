"""Orders to store: which blocks, of which request, and whether they are still read.

Only full blocks of prompts are stored, in the step that completes them, and not if
they are known to be in the store. That knowledge is a bounded memory of keys; it
may be wrong in both directions, which costs a question or a later miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore_connectors.vllm.metadata import StoreJob, WorkerReport

MAX_KNOWN_KEYS = 1 << 18


class KnownKeys:
    """The keys most recently seen in the store, at most `capacity` of them."""

    def __init__(self, capacity: int = MAX_KNOWN_KEYS) -> None:
        self._capacity = capacity
        self._keys: dict[bytes, None] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._keys.pop(key, None)
            self._keys[key] = None
        while len(self._keys) > self._capacity:
            del self._keys[next(iter(self._keys))]

    def discard(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._keys.pop(key, None)

    def clear(self) -> None:
        self._keys.clear()


@dataclass(slots=True)
class _Pending:
    request_id: str
    keys: list[bytes]
    workers_left: int
    lost: bool = False


class StoreOrders:
    """Jobs ordered and not yet reported by every worker."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._next_job = 1
        self._pending: dict[int, _Pending] = {}
        # Jobs that read blocks a request still owns.
        self._reading: dict[str, set[int]] = {}
        self.known = KnownKeys()

    def __len__(self) -> int:
        return len(self._pending)

    def order(
        self,
        request_id: str,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        block_ids: Sequence[int],
    ) -> StoreJob | None:
        """A job for those of the blocks that are not known to be in the store."""
        job = StoreJob(self._next_job, request_id, [], [], [])
        for key, parent, block_id in zip(keys, parents, block_ids, strict=True):
            if key not in self.known:
                job.block_ids.append(block_id)
                job.keys.append(key)
                job.parents.append(parent)
        if not job.keys:
            return None
        self._next_job += 1
        # As if they were there: another request must not store them too.
        self.known.add(job.keys)
        self._pending[job.job_id] = _Pending(request_id, job.keys, self._workers)
        self._reading.setdefault(request_id, set()).add(job.job_id)
        return job

    def reads_blocks_of(self, request_id: str) -> bool:
        return request_id in self._reading

    def cancel(self, request_ids: Iterable[str]) -> list[int]:
        """The requests' blocks may be reused at once; the jobs that must not publish them.

        Covers requests that have ended meanwhile, too.
        """
        cancelled: list[int] = []
        for request_id in request_ids:
            cancelled += self._reading.pop(request_id, ())
        for job_id in cancelled:
            self.known.discard(self._pending[job_id].keys)
        return cancelled

    def reported(self, report: WorkerReport) -> None:
        for job_id, news in report.jobs.items():
            job = self._pending.get(job_id)
            if job is None:
                continue
            job.workers_left -= news.workers
            job.lost = job.lost or news.lost
            if job.workers_left <= 0:
                self._ended(job_id, job)

    def _ended(self, job_id: int, job: _Pending) -> None:
        del self._pending[job_id]
        if job.lost:
            self.known.discard(job.keys)
        reading = self._reading.get(job.request_id)
        if reading is not None:
            reading.discard(job_id)
            if not reading:
                del self._reading[job.request_id]

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not agree."""
        for request_id, job_ids in self._reading.items():
            if not job_ids or not job_ids <= self._pending.keys():
                raise AssertionError("a request waits for a store job that does not exist")
            if any(self._pending[job_id].request_id != request_id for job_id in job_ids):
                raise AssertionError("a request waits for another's store job")
