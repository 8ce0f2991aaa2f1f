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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvstore.types import NO_REUSE, Reuse
from kvstore_connectors.vllm.metadata import JobReport, StoreJob

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

MAX_KNOWN_KEYS = 1 << 18


class KnownKeys:
    """The keys most recently seen in the store: at most `capacity`, and the latest half of
    that for sure.

    Keys come into the one set; when it is half the capacity it takes the place of the
    other, which is forgotten. So all that is done here is done to many keys at a time.
    """

    def __init__(self, capacity: int = MAX_KNOWN_KEYS) -> None:
        self._half = capacity // 2
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._young or key in self._old

    def __len__(self) -> int:
        return len(self._young | self._old)

    def add(self, keys: Iterable[bytes]) -> None:
        self._young.update(keys)
        if len(self._young) >= self._half:
            self._old, self._young = self._young, set()

    def take(self, keys: list[bytes]) -> list[int] | None:
        """Add keys, one at least; the places of those that were not known, None for all."""
        young, old = self._young, self._old
        # What is known of a prompt is a front of it, mostly; of a new one it is nothing.
        first, last = keys[0], keys[-1]
        new = None
        if first in young or last in young or first in old or last in old:
            new = [at for at, key in enumerate(keys) if key not in young and key not in old]
        young.update(keys)
        if len(young) >= self._half:
            self._old, self._young = young, set()
        return new

    def discard(self, keys: Iterable[bytes]) -> None:
        self._young.difference_update(keys)
        self._old.difference_update(keys)

    def clear(self) -> None:
        self._young.clear()
        self._old.clear()


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


@dataclass(slots=True)
class _Pending:
    job: StoreJob
    workers_left: int
    pinned: bool
    cancelled: bool = False
    lost: bool = False


class StoreOrders:
    """Jobs ordered and not yet reported by every worker."""

    def __init__(self, workers: int, groups: int, evicted: Callable[[int, bytes], bool]) -> None:
        """`workers`: how many report on each job. `groups`: how many are stored.
        `evicted(group, key)`: whether it can be seen that the store has not got a block."""
        self._workers = workers
        self._evicted = evicted
        self._next_job = 1
        self._pending: dict[int, _Pending] = {}
        # Jobs that are not cancelled.
        self._of_request: dict[str, set[int]] = {}
        # First blocks of jobs: others may have ordered what follows them.
        self._under_way: set[bytes] = set()
        self.known = [KnownKeys(MAX_KNOWN_KEYS // groups) for _ in range(groups)]
        self.pins: Pins | None = None

    def __len__(self) -> int:
        return len(self._pending)

    def order(
        self,
        request_id: str,
        group: int,
        keys: list[bytes],
        parents: list[bytes],
        block_ids: list[int],
        reuse: Reuse = NO_REUSE,
        kept: bool = False,
    ) -> StoreJob | None:
        """A job for those of the blocks, one at least, that are not known to be in the
        store. The lists become its own. `kept`: by the request, as long as it lives."""
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
        job = StoreJob(self._next_job, request_id, group, block_ids, keys, parents, reuse)
        self._next_job += 1
        if not kept:
            self.pins.hold(block_ids)
        self._pending[job.job_id] = _Pending(job, self._workers, not kept)
        self._under_way.add(keys[0])
        jobs = self._of_request.get(request_id)
        if jobs is None:
            self._of_request[request_id] = {job.job_id}
        else:
            jobs.add(job.job_id)
        return job

    def _is_gone(self, group: int, keys: list[bytes], known: int) -> bool:
        """Whether the store has evicted some of the first `known` of the keys, as far as can
        be seen. What is under way cannot be seen yet."""
        return keys[0] not in self._under_way and self._evicted(group, keys[known - 1])

    def requests(self) -> Iterable[str]:
        """Those whose blocks are still read."""
        return self._of_request

    def ends(self, request_id: str) -> None:
        """The request is about to let go of its blocks."""
        for job_id in self._of_request.get(request_id, ()):
            pending = self._pending[job_id]
            if not pending.pinned:
                assert self.pins is not None
                self.pins.hold(pending.job.block_ids)
                pending.pinned = True

    def cancel(self, request_ids: Iterable[str]) -> list[int]:
        """The requests' blocks may be reused at once; the jobs that must not publish them.

        Covers requests that have ended meanwhile, too.
        """
        cancelled: list[int] = []
        for request_id in request_ids:
            cancelled += self._of_request.get(request_id, ())
        for job_id in cancelled:
            pending = self._pending[job_id]
            self.known[pending.job.group].discard(pending.job.keys)
            pending.cancelled = True
            self._let_go(pending)
        return cancelled

    def forget(self) -> None:
        """Nothing is known of the store any more."""
        for known in self.known:
            known.clear()

    def reported(self, jobs: Mapping[int, JobReport]) -> None:
        for job_id, news in jobs.items():
            pending = self._pending.get(job_id)
            if pending is None:
                continue
            pending.workers_left -= news.workers
            pending.lost = pending.lost or news.lost
            if pending.workers_left > 0:
                continue
            del self._pending[job_id]
            self._under_way.discard(pending.job.keys[0])
            if not pending.cancelled:
                # Of a cancelled job this was done then; they may be under way again.
                if pending.lost:
                    self.known[pending.job.group].discard(pending.job.keys)
                self._let_go(pending)

    def _let_go(self, pending: _Pending) -> None:
        job = pending.job
        if pending.pinned:
            assert self.pins is not None
            self.pins.let_go(job.block_ids)
            pending.pinned = False
        jobs = self._of_request[job.request_id]
        jobs.discard(job.job_id)
        if not jobs:
            del self._of_request[job.request_id]

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not agree."""
        read = {job_id for job_id, pending in self._pending.items() if not pending.cancelled}
        counted = [job_id for jobs in self._of_request.values() for job_id in jobs]
        if read != set(counted) or len(counted) != len(read):
            raise AssertionError("the jobs that are not cancelled are not those of the requests")
        for request_id, jobs in self._of_request.items():
            if not jobs or any(self._pending[each].job.request_id != request_id for each in jobs):
                raise AssertionError("a request is charged with another's store job")
