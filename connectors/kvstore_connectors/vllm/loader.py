"""Copies leased slots into the engine's KV cache, in a thread of its own with helpers.

The copies are the device's (`kvstore.device`); they begin after what the engine had launched
when the load was ordered, for until then a block's last owner may be using it.

A block counts as loaded only when the checksum of its slot, taken after the copy,
is the one the lease named, and the clock, read after that, is before the lease's
end: whatever might have happened to the slot meanwhile shows in one of the two.
Of a model with one KV cache group, what follows the first block that fails is reported
as failed, and vLLM computes it. Of others it is the whole request: what was loaded of
one group is of no use without the rest. The server is told which slots were damaged, so
that nobody is given them again.

What the store has in the GPU's memory is copied from there (`nearby`), the rest from the slots.
A block that is in that memory alone (`GPU_ONLY`) has no slot: where it is gone, or changed while
it was copied, the load ends before it, and nothing was damaged.

A prompt that another vLLM computes is loaded while it is being stored (`Arrivals`): the
thread looks into the server's directory for what has come, leases and copies it, and does
other loads in between. It waits as long as more keeps coming.

Once a request's blocks are reported, in whatever way, no thread touches them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvstore.device.flight import CHUNK_BYTES, Flight
from kvstore.errors import KVStoreError
from kvstore.types import GPU_ONLY, ChainQuery
from kvstore_connectors.vllm.link import is_loss
from kvstore_connectors.vllm.nearby import Nearby
from kvstore_connectors.vllm.shared import LOOK_S
from kvstore_connectors.vllm.stats import ConnectorStats
from kvstore_connectors.vllm.threads import outlive

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from kvstore.device.base import Blocks, Device, Event
    from kvstore_connectors.vllm.link import Attached, StoreLink
    from kvstore_connectors.vllm.metadata import Arrivals, LoadJob

logger = init_logger("vllm.kvstore")

LOOK_EVERY_S = 0.0005
"""For what is to come: a look takes microseconds."""

LOOK_FOR_SERVER_S = 1.0
"""The scheduler may have found a server that has started anew a moment before the worker."""

ACQUIRE_WAIT_MS = 100
"""What has just been stored is in DRAM, but for one that is under pressure."""


@dataclass(slots=True)
class LoadResults:
    """`finished`: requests whose load has ended. Of those, `failed`: the ones of which
    nothing counts as loaded; `failed_blocks`: blocks of the others that do not."""

    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Load:
    """`good`: blocks of the job's front, part after part, that are loaded and right.
    `damaged`: addresses of slots whose bytes were wrong. `attached`: what it was begun
    with. `until_s`: when to stop waiting for more."""

    job: LoadJob
    ready: Event
    submitted_s: float
    good: int = 0
    nbytes: int = 0
    damaged: list[int] = field(default_factory=list)
    attached: Attached | None = None
    until_s: float = 0.0
    unwanted: bool = False


@dataclass(slots=True)
class _Blocks:
    """Blocks of one group, with one shard's addresses and checksums of them."""

    group: int
    block_ids: Sequence[int]
    addresses: Sequence[int]
    checksums: Sequence[int]
    expires_ns: int


class Loader:
    """Runs `LoadJob`s; `submit`, `give_up` and `take_results` are cheap and never wait."""

    def __init__(
        self,
        link: StoreLink,
        device: Device,
        blocks: Sequence[Blocks],
        shard: int,
        on_done: Callable[[], None],
        *,
        expects: bool = True,
        reader: bytes = b"",
    ) -> None:
        """`link` has a layout for each stored group, `blocks` are its blocks on `device`.
        `shard`: which of a load's addresses are for them. `on_done` is called, from a thread,
        when `take_results` has news. `expects`: whether there will be loads. `reader`: see
        `reader_of`."""
        self._link = link
        self._device = device
        self._stream = device.stream()
        self._blocks = blocks
        self._nearby = Nearby(device.vram if expects else None, blocks, reader)
        self._shard = shard
        self._on_done = on_done
        self._condition = threading.Condition()
        self._queue: deque[_Load] = deque()
        # Those of which more is to come. Only the thread changes it.
        self._arriving: list[_Load] = []
        # By request: what `give_up` may end.
        self._waiting: dict[str, _Load] = {}
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
        load = _Load(job, self._device.computed(), time.monotonic())
        with self._condition:
            self._queue.append(load)
            if job.arrivals is not None:
                self._waiting[job.request_id] = load
            self._unreported += 1
            self._condition.notify()

    def give_up(self, request_ids: Collection[str]) -> None:
        """Do not wait for what is still to come of these, and report them soon."""
        if request_ids and self._waiting:
            with self._condition:
                for request_id in request_ids:
                    load = self._waiting.get(request_id)
                    if load is not None:
                        load.unwanted = True

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
        if not self._thread.is_alive():
            self._nearby.close()
            self._stream.close()

    def _run(self) -> None:
        while True:
            with self._condition:
                pause_s = LOOK_EVERY_S if self._arriving else None
                if pause_s is None and self._nearby.possible:
                    pause_s = LOOK_S
                self._condition.wait_for(lambda: self._closing or self._queue, pause_s)
                if self._closing:
                    return
                load = self._queue.popleft() if self._queue else None
            if load is not None:
                self._get_on(load)
            for waiting in list(self._arriving):
                self._get_on(waiting)
            self._nearby.look(self._link)

    def _count_error(self) -> None:
        with self._condition:
            self.stats.add(thread_errors=1)

    def _get_on(self, load: _Load) -> None:
        ended = True
        try:
            ended = self._load(load)
        except KVStoreError as error:
            logger.debug("A load from the KV store failed: %s", error)
        finally:
            if ended:
                if load in self._arriving:
                    self._arriving.remove(load)
                self._report(load)
                if load.damaged:
                    self._tell_of_damage(load)
            elif load not in self._arriving:
                self._arriving.append(load)

    def _tell_of_damage(self, load: _Load) -> None:
        """Whoever waited for the load does not wait for this."""
        try:
            with self._link.borrow() as attached:
                if attached is not None and attached.epoch == load.job.epoch:
                    attached.client.report_damage(load.damaged)
        except KVStoreError as error:
            logger.debug("The KV store was not told of damaged blocks: %s", error)

    def _load(self, load: _Load) -> bool:
        """Whether that was all, for better or worse."""
        job = load.job
        with self._link.borrow() as attached:
            if attached is None or attached.epoch != job.epoch:
                late = time.monotonic() - load.submitted_s > LOOK_FOR_SERVER_S
                begun = load.attached is not None
                return begun or load.unwanted or late or not self._link.seeks(job.epoch)
            if load.attached is None:
                load.attached = attached
                if not self._load_parts(attached, load) or job.arrivals is None:
                    return True
                load.until_s = time.monotonic() + job.arrivals.patience_s
            # Layouts may have changed, and with them what the keys mean.
            return load.attached is not attached or self._follow(attached, load, job.arrivals)

    def _load_parts(self, attached: Attached, load: _Load) -> bool:
        """Whether all that was leased is loaded and right."""
        for part in load.job.parts:
            addresses, checksums = part.addresses[self._shard], part.checksums[self._shard]
            expires_ns = load.job.expires_ns
            blocks = _Blocks(part.group, part.block_ids, addresses, checksums, expires_ns)
            if not self._fill(attached, load, blocks):
                return False
        return True

    def _follow(self, attached: Attached, load: _Load, arrivals: Arrivals | None) -> bool:
        """Load what has come since. Whether nothing more is to be waited for."""
        assert arrivals is not None
        done = load.good - sum(len(part.block_ids) for part in load.job.parts)
        if load.unwanted:
            return True
        layout_ids = [attached.layouts[arrivals.group].id]
        seen = attached.client.peek(layout_ids, arrivals.keys[done:])
        if seen is not None and seen.held:
            chain = ChainQuery(layout_ids, arrivals.keys[done : done + seen.held], arrivals.reuse)
            came = self._load_chain(attached, load, chain, arrivals.block_ids[done:])
            if came is None:
                return True
            done += came
            if came:
                load.until_s = time.monotonic() + arrivals.patience_s
        if done == len(arrivals.keys):
            return True
        if time.monotonic() < load.until_s:
            return False
        with self._condition:
            self.stats.add(handover_timeouts=1)
        return True

    def _load_chain(
        self, attached: Attached, load: _Load, chain: ChainQuery, block_ids: list[int]
    ) -> int | None:
        """How many blocks of a chain were there and are loaded; None where one is not right."""
        try:
            (grant,) = attached.client.acquire_many([chain], ACQUIRE_WAIT_MS)
            if not grant.held:
                return 0
            try:
                group = load.job.arrivals.group if load.job.arrivals else 0
                blocks = _Blocks(
                    group, block_ids[: grant.held], grant.addresses, grant.checksums,
                    grant.expires_ns,
                )  # fmt: skip
                return grant.held if self._fill(attached, load, blocks) else None
            finally:
                attached.client.release([grant.lease_id])
        except KVStoreError as error:
            if is_loss(error):
                self._link.failed(attached, error)
            raise

    def _fill(self, attached: Attached, load: _Load, blocks: _Blocks) -> bool:
        """Whether all of these are loaded and right."""
        target, client = self._blocks[blocks.group], attached.client
        self._stream.wait_event(load.ready)
        near = self._nearby.fill(
            self._stream, attached, target, blocks.block_ids, blocks.addresses, blocks.checksums
        )
        if near and time.clock_gettime_ns(time.CLOCK_MONOTONIC) >= blocks.expires_ns:
            near = set()
        left = [index for index in range(len(blocks.block_ids)) if index not in near]
        gone = [at for at, index in enumerate(left) if blocks.addresses[index] >= GPU_ONLY]
        # What follows a block that cannot be had is not loaded.
        stop = gone[0] if gone else len(left)
        step = max(1, CHUNK_BYTES // target.block_bytes)
        done, right = 0, True

        def arrived(checksums: list[int]) -> None:
            nonlocal done, right
            if not right or time.clock_gettime_ns(time.CLOCK_MONOTONIC) >= blocks.expires_ns:
                right = False
                return
            indexes = left[done : done + len(checksums)]
            same = [each == blocks.checksums[i] for i, each in zip(indexes, checksums, strict=True)]
            if all(same):
                done += len(same)
                return
            right = False
            done += same.index(False)
            damaged = [blocks.addresses[i] for i, ok in zip(indexes, same, strict=True) if not ok]
            load.damaged += damaged
            with self._condition:
                self.stats.add(damaged_blocks=len(damaged))

        with Flight() as flight:
            for start in range(0, stop, step):
                # Nor what follows a bad one.
                if not right or self._closing:
                    break
                part = left[start : min(start + step, stop)]
                slots = [
                    client.slot(blocks.addresses[i], target.block_bytes, epoch=load.job.epoch)
                    for i in part
                ]
                block_ids = [blocks.block_ids[i] for i in part]
                flight.add(self._stream.load(target, block_ids, slots), arrived)
        good = left[done] if done < len(left) else len(blocks.block_ids)
        if client.epoch != load.job.epoch:
            good = 0
        load.good += good
        load.nbytes += good * target.block_bytes
        if near or gone:
            loaded = [index for index in near if index < good]
            straight = sum(blocks.addresses[index] >= GPU_ONLY for index in loaded)
            with self._condition:
                self.stats.add(
                    vram_blocks=len(loaded), straight_blocks=straight, straight_misses=len(gone)
                )
        return good == len(blocks.block_ids)

    def _report(self, load: _Load) -> None:
        job = load.job
        block_ids = job.parts[0].block_ids if job.parts else []
        if job.arrivals is not None:
            block_ids = block_ids + job.arrivals.block_ids
        whole = len(block_ids) + sum(len(part.block_ids) for part in job.parts[1:])
        failed = load.good < whole or not whole
        with self._condition:
            self._waiting.pop(job.request_id, None)
            self._results.finished.add(job.request_id)
            if failed and len(self._blocks) == 1 and whole:
                self._results.failed_blocks.update(block_ids[load.good :])
            elif failed:
                self._results.failed.add(job.request_id)
            self.stats.add(
                loaded_blocks=load.good,
                loaded_bytes=load.nbytes,
                load_seconds=time.monotonic() - load.submitted_s,
                failed_loads=failed,
            )
        self._on_done()
