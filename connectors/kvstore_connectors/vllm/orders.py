"""Orders to store: which blocks, of which request, and whether they are still read.

Only full blocks of prompts are stored, in the step that completes them, and not if
they are known to be in the store. That knowledge is a bounded memory of keys; it may be
wrong, so a look at the store's directory has the last word.

Nobody may reuse the blocks of a job before every worker has reported it. A request keeps
blocks of full attention as long as it lives; they are pinned in vLLM's pool when it ends,
which few jobs outlast. Others are pinned at once, for a sliding window moves on with every
step. A job that is cancelled lets go of its blocks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from kvstore.types import Reuse
from kvstore_connectors.vllm.metadata import JobReport, StoreJob

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

MAX_KNOWN_KEYS = 1 << 18
_NOBODY = JobReport(0, lost=False)


class KnownKeys:
    """The keys most recently seen in the store: at most `capacity`, and the latest half of
    that for sure.

    Keys come into the one set, `young`; when it is half the capacity it takes the place of
    the other, `old`, which is forgotten. So all that is done here is done to many keys at a
    time. Those who look for one key may look into both themselves.
    """

    def __init__(self, capacity: int = MAX_KNOWN_KEYS) -> None:
        self._half = capacity // 2
        self.young: set[bytes] = set()
        self.old: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self.young or key in self.old

    def __len__(self) -> int:
        return len(self.young | self.old)

    def add(self, keys: Iterable[bytes]) -> None:
        self.young.update(keys)
        if len(self.young) >= self._half:
            self.old, self.young = self.young, set()

    def take(self, keys: list[bytes]) -> list[int] | None:
        """Add keys, one at least; the places of those that were not known, None for all."""
        young, old = self.young, self.old
        # What is known of a prompt is a front of it, mostly; of a new one it is nothing.
        first, last = keys[0], keys[-1]
        new = None
        if first in young or last in young or first in old or last in old:
            new = [at for at, key in enumerate(keys) if key not in young and key not in old]
        young.update(keys)
        if len(young) >= self._half:
            self.old, self.young = young, set()
        return new

    def discard(self, keys: Iterable[bytes]) -> None:
        self.young.difference_update(keys)
        self.old.difference_update(keys)

    def clear(self) -> None:
        self.young.clear()
        self.old.clear()


class Pins(Protocol):
    """Keeps blocks from being reused; each is let go of as often as it was held."""

    def hold(self, block_ids: Sequence[int]) -> None: ...
    def let_go(self, block_ids: Sequence[int]) -> None: ...


class PoolPins:
    """Blocks of vLLM's pool, pinned like those of a request."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def hold(self, block_ids: Sequence[int]) -> None:
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])

    def let_go(self, block_ids: Sequence[int]) -> None:
        # The last first, as vLLM does: the front of a prompt is to stay longest.
        self._pool.free_blocks(self._pool.blocks[block_id] for block_id in reversed(block_ids))


class StoreOrders:
    """Jobs ordered and not yet reported by every worker."""

    def __init__(self, workers: int, groups: int, evicted: Callable[[int, bytes], bool]) -> None:
        """`workers`: how many report on each job. `groups`: how many are stored.
        `evicted(group, key)`: whether it can be seen that the store has not got a block."""
        self._workers = workers
        self._evicted = evicted
        self._next_job = 1
        self.pending: dict[int, StoreJob] = {}
        """Jobs, by their numbers. Read only."""
        # Of them, those that some workers have reported, that are cancelled, and whose blocks
        # are pinned: none, mostly.
        self._partly: dict[int, JobReport] = {}
        self._cancelled: set[int] = set()
        self._pinned: set[int] = set()
        self.of_request: dict[str, set[int]] = {}
        """Jobs that are not cancelled, by the requests whose blocks they read."""
        # First blocks of jobs: others may have ordered what follows them.
        self._under_way: set[bytes] = set()
        self.known = [KnownKeys(MAX_KNOWN_KEYS // groups) for _ in range(groups)]
        self.pins: Pins | None = None

    def order(
        self,
        request_id: str,
        group: int,
        keys: list[bytes],
        parents: list[bytes],
        block_ids: list[int],
        said: Reuse | None = None,
        kept: bool = False,
        handed_over: bool = False,
    ) -> StoreJob | None:
        """A job for those of the blocks, one at least, that are not known to be in the
        store. The lists become its own. `kept`: by the request, as long as it lives.
        `said`, `handed_over`: see `StoreJob`."""
        if self.pins is None:
            return None
        # As if they were there: another request must not store them too.
        new = self.known[group].take(keys)
        if new is not None and not self._is_gone(group, keys, len(keys) - len(new)):
            if not new:
                return None
            block_ids = [block_ids[index] for index in new]
            keys = [keys[index] for index in new]
            parents = [parents[index] for index in new]
        job = StoreJob(
            self._next_job, request_id, group, block_ids, keys, parents, said, handed_over
        )
        self._next_job += 1
        if not kept:
            self.pins.hold(block_ids)
            self._pinned.add(job.job_id)
        self.pending[job.job_id] = job
        self._under_way.add(keys[0])
        jobs = self.of_request.get(request_id)
        if jobs is None:
            self.of_request[request_id] = {job.job_id}
        else:
            jobs.add(job.job_id)
        return job

    def _is_gone(self, group: int, keys: list[bytes], known: int) -> bool:
        """Whether the store has evicted some of the first `known` of the keys, as far as can
        be seen. What is under way cannot be seen yet."""
        return keys[0] not in self._under_way and self._evicted(group, keys[known - 1])

    def ends(self, request_id: str) -> None:
        """The request is about to let go of its blocks."""
        for job_id in self.of_request.get(request_id, ()):
            if job_id not in self._pinned:
                assert self.pins is not None
                self.pins.hold(self.pending[job_id].block_ids)
                self._pinned.add(job_id)

    def cancel(self, request_ids: Iterable[str]) -> list[int]:
        """The requests' blocks may be reused at once; the jobs that must not publish them.

        Covers requests that have ended meanwhile, too.
        """
        cancelled: list[int] = []
        for request_id in request_ids:
            cancelled += self.of_request.get(request_id, ())
        for job_id in cancelled:
            job = self.pending[job_id]
            self.known[job.group].discard(job.keys)
            self._cancelled.add(job_id)
            self._let_go(job)
        return cancelled

    def forget(self) -> None:
        """Nothing is known of the store any more."""
        for known in self.known:
            known.clear()

    def reported(self, jobs: Mapping[int, JobReport]) -> None:
        for job_id, news in jobs.items():
            job = self.pending.get(job_id)
            if job is None:
                continue
            if news.workers < self._workers:
                before = self._partly.pop(job_id, _NOBODY)
                news = JobReport(before.workers + news.workers, before.lost or news.lost)
                if news.workers < self._workers:
                    self._partly[job_id] = news
                    continue
            del self.pending[job_id]
            self._under_way.discard(job.keys[0])
            if job_id in self._cancelled:
                # The rest was done then; its blocks may be under way again.
                self._cancelled.remove(job_id)
                continue
            if news.lost:
                self.known[job.group].discard(job.keys)
            self._let_go(job)

    def _let_go(self, job: StoreJob) -> None:
        if job.job_id in self._pinned:
            assert self.pins is not None
            self._pinned.remove(job.job_id)
            self.pins.let_go(job.block_ids)
        jobs = self.of_request[job.request_id]
        jobs.remove(job.job_id)
        if not jobs:
            del self.of_request[job.request_id]

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not agree."""
        read = self.pending.keys() - self._cancelled
        counted = [job_id for jobs in self.of_request.values() for job_id in jobs]
        if read != set(counted) or len(counted) != len(read):
            raise AssertionError("the jobs that are not cancelled are not those of the requests")
        if not self.pending.keys() >= self._cancelled | self._pinned | self._partly.keys():
            raise AssertionError("something is kept of a job that is over")
        for request_id, jobs in self.of_request.items():
            if not jobs or any(self.pending[each].request_id != request_id for each in jobs):
                raise AssertionError("a request is charged with another's store job")
