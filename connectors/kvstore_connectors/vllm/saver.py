"""Copies finished blocks out of the engine's KV cache into the store, in a thread of its
own with helpers.

A job may be cancelled at any moment, because its blocks are about to be
overwritten, and cancelling never waits for the thread. That is sound because a
block is published only if its job was still uncancelled after its bytes had been
copied and hashed: then the copy was finished before anyone was allowed to write.
A copy that raced with a cancellation is thrown away.

The copies are the device's (`kvstore.device`); they begin after what the engine had launched
when the job was ordered, which computes the blocks. What is handed over to another vLLM is copied
into GPUs' memory too (`landing`).

One call to the server publishes all that was copied since the last, of whichever
jobs, and brings the slots for what comes next (`slots`).

Jobs wait for nobody: when more is queued than `MAX_QUEUED_BYTES`, when there is no
server, or when nothing has got on for `STUCK_S`, they are dropped and counted, for
their blocks are kept from vLLM meanwhile. A lost store is a later miss, no more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvstore.device.flight import CHUNK_BYTES, Flight
from kvstore.errors import DeviceStuck, KVStoreError, Unavailable
from kvstore.types import CommitOutcome, Landing, Segment
from kvstore_connectors.vllm.landing import LandingZone, Places
from kvstore_connectors.vllm.link import is_loss
from kvstore_connectors.vllm.metadata import JobReport
from kvstore_connectors.vllm.shared import LOOK_S
from kvstore_connectors.vllm.slots import Slot, SlotsAhead
from kvstore_connectors.vllm.stats import ConnectorStats
from kvstore_connectors.vllm.threads import outlive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvstore.client.lease import Layout
    from kvstore.device.base import Blocks, Device, Event
    from kvstore_connectors.vllm.link import Attached, StoreLink
    from kvstore_connectors.vllm.metadata import StoreJob

logger = init_logger("vllm.kvstore")

MAX_QUEUED_BYTES = 2 << 30
COMMIT_BYTES = 32 << 20
COMMIT_BLOCKS = 1024
"""Copied and committed at a time, and reserved ahead."""

IDLE_S = 1.0
"""Without a job for this long, the slots reserved ahead are given back."""
STUCK_S = 2.0


@dataclass(slots=True, eq=False)
class _Save:
    """`taken`: blocks of the job that the thread has taken up."""

    job: StoreJob
    ready: Event
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


class _Group:
    """One stored group: its blocks, what is queued of it, and its slots at hand."""

    def __init__(self, number: int, blocks: Blocks) -> None:
        self.number = number
        self.blocks = blocks
        self.chunk = max(1, min(COMMIT_BLOCKS, COMMIT_BYTES // blocks.block_bytes))
        self.slots = SlotsAhead(self.chunk)
        self.queue: deque[_Save] = deque()


class Saver:
    """Runs `StoreJob`s; all methods but `close` are cheap and never wait."""

    def __init__(
        self,
        link: StoreLink,
        device: Device,
        blocks: Sequence[Blocks],
        on_done: Callable[[], None],
    ) -> None:
        """`link` has a layout for each stored group, `blocks` are its blocks on `device`.
        `on_done` is called, from a thread, when `take_reports` has news."""
        self._link = link
        self._device = device
        self._stream = device.stream()
        self._groups = [_Group(number, each) for number, each in enumerate(blocks)]
        self._landing = LandingZone(device)
        self._on_done = on_done
        self._condition = threading.Condition()
        self._queued_bytes = 0
        self._saves: dict[int, _Save] = {}
        self._reports: dict[int, JobReport] = {}
        self._got_on_s = time.monotonic()
        self._closing = False
        self.stats = ConnectorStats()
        self._thread = threading.Thread(
            target=outlive, args=(self._run, self._count_error), name="kvstore-save", daemon=True
        )
        self._thread.start()

    def submit(self, job: StoreJob) -> None:
        """Queue a job whose blocks are computed, or drop it at once."""
        save = _Save(job, self._device.computed())
        with self._condition:
            if not self._saves:
                self._got_on_s = time.monotonic()
            self._saves[job.job_id] = save
            nbytes = self._nbytes(job)
            behind = self._queued_bytes and self._queued_bytes + nbytes > MAX_QUEUED_BYTES
            if behind or not self._link.up:
                self._drop(save)
                return
            self._groups[job.group].queue.append(save)
            self._queued_bytes += nbytes
            self._condition.notify()

    def _nbytes(self, job: StoreJob) -> int:
        return len(job.keys) * self._groups[job.group].blocks.block_bytes

    def cancel(self, job_ids: Iterable[int]) -> None:
        """From the return of this call on, nothing read of these jobs' blocks is published."""
        with self._condition:
            for job_id in job_ids:
                save = self._saves.get(job_id)
                if save is not None:
                    self._drop(save)

    def cancel_all(self) -> None:
        self.cancel(list(self._saves))

    @property
    def busy(self) -> bool:
        """Whether some job has not been reported."""
        return bool(self._saves)

    def has_reports(self) -> bool:
        return bool(self._reports)

    def take_reports(self) -> dict[int, JobReport]:
        """Jobs that ended since the last call."""
        if not self._saves and not self._reports:
            return {}
        with self._condition:
            if time.monotonic() - self._got_on_s > STUCK_S:
                for save in list(self._saves.values()):
                    self._drop(save)
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
        if not self._thread.is_alive():
            self._landing.close()
            self._stream.close()

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
        del self._saves[save.job.job_id]
        self._reports[save.job.job_id] = JobReport(workers=1, lost=lost)

    def _next_group(self) -> _Group | None:
        """The one whose next job was ordered first."""
        waiting = [group for group in self._groups if group.queue]
        return min(waiting, key=lambda group: group.queue[0].job.job_id, default=None)

    def _take(self) -> tuple[_Group, list[_Part]]:
        """What is queued of one group, up to a chunk."""
        group = self._next_group()
        assert group is not None
        parts: list[_Part] = []
        room = group.chunk
        while group.queue and room:
            save = group.queue[0]
            start = save.taken
            save.taken = stop = min(start + room, len(save.job.keys))
            self._queued_bytes -= (stop - start) * group.blocks.block_bytes
            if stop == len(save.job.keys):
                group.queue.popleft()
            if not save.cancelled:
                parts.append(_Part(save, start, stop))
                room -= stop - start
        return group, parts

    # In the thread.

    def _run(self) -> None:
        while self._wait_for_work():
            self._landing.look()
            self._work()

    def _work(self) -> None:
        with self._condition:
            group, parts = self._take()
        started_s = time.monotonic()
        stored = False
        try:
            stored = self._save(group, parts)
        except KVStoreError as error:
            logger.debug("A store to the KV store failed: %s", error)
        finally:
            with self._condition:
                self._got_on_s = time.monotonic()
                self.stats.add(store_seconds=self._got_on_s - started_s)
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
        idle_until_s = time.monotonic() + IDLE_S
        while True:
            with self._condition:
                at_hand = any(len(group.slots) for group in self._groups)
                pause_s = max(0.0, idle_until_s - time.monotonic()) if at_hand else None
                if self._landing.open:
                    pause_s = LOOK_S if pause_s is None else min(LOOK_S, pause_s)
                self._condition.wait_for(lambda: self._closing or self._next_group(), pause_s)
                if self._closing:
                    return False
                if self._next_group():
                    return True
            self._landing.look()
            if at_hand and time.monotonic() >= idle_until_s:
                with self._link.borrow() as attached:
                    for group in self._groups:
                        group.slots.give_back(attached)

    def _save(self, group: _Group, parts: list[_Part]) -> bool:
        """Whether the blocks that got a slot are in the store now."""
        if not parts:
            return True
        with self._link.borrow() as attached:
            if attached is None:
                return False
            try:
                self._save_chunk(attached, group, parts)
            except KVStoreError as error:
                if is_loss(error):
                    self._link.failed(attached, error)
                raise
            return True

    def _save_chunk(self, attached: Attached, group: _Group, parts: list[_Part]) -> None:
        layout = attached.layouts[group.number]
        present = sum(_skip_present(attached, layout, part) for part in parts)
        wanted = sum(part.stop - part.start for part in parts)
        slots = group.slots.take(attached, layout, wanted)
        denied = wanted - len(slots)
        try:
            landed = self._copy(attached, layout, group, parts, slots)
        except DeviceStuck as error:
            # What may be written yet is given back by nobody but the end of the session, which
            # does not make it another's (`landing`).
            self._link.failed(attached, error)
            raise
        except BaseException:
            group.slots.drop(attached, [slot for part in parts for slot in part.slots] + slots)
            raise
        # What was left over, and what a cancelled job wrote.
        group.slots.put_back(slots)
        outcomes = self._commit(attached, layout, group, parts, landed)
        stored = outcomes.count(CommitOutcome.STORED)
        with self._condition:
            self.stats.add(
                stored_blocks=stored,
                stored_bytes=stored * group.blocks.block_bytes,
                denied_blocks=denied,
                present_blocks=present + len(outcomes) - stored,
                landed_blocks=sum(len(each.addresses) for each in landed),
            )

    def _copy(
        self,
        attached: Attached,
        layout: Layout,
        group: _Group,
        parts: list[_Part],
        slots: list[Slot],
    ) -> list[Landing]:
        """Fill slots, taken from the end of `slots`, with the blocks of the parts; where else
        they have been written."""
        places: list[tuple[_Part, int]] = []
        for part in parts:
            for index in range(min(part.stop - part.start, len(slots))):
                part.slots.append(slots.pop())
                part.checksums.append(0)
                places.append((part, index))
        taken = [part.slots[index] for part, index in places]
        granted = self._places_to_land(attached, layout, group, places)

        blocks = group.blocks
        step = max(1, CHUNK_BYTES // blocks.block_bytes)

        def keep(indexes: list[int], checksums: list[int]) -> None:
            for place, checksum in zip(indexes, checksums, strict=True):
                part, index = places[place]
                part.checksums[index] = checksum

        def fill(views: list[memoryview]) -> dict[str, list[int]]:
            for part in parts:
                self._stream.wait_event(part.save.ready)
            landing = self._landing.writing(self._stream, blocks, granted)
            with landing as landed, Flight() as flight:
                for start in range(0, len(places), step):
                    if attached.dropped or self._closing:
                        raise Unavailable("the connection was given up")
                    indexes, block_ids = [], []
                    for place, (part, index) in enumerate(places[start : start + step], start):
                        if not part.save.cancelled:
                            indexes.append(place)
                            block_ids.append(part.save.job.block_ids[part.start + index])
                    slots = [views[place] for place in indexes]
                    copies = self._stream.save(blocks, block_ids, slots)
                    flight.add(copies, partial(keep, indexes))
            return landed

        if not taken:
            return []
        ids, addresses = [slot.id for slot in taken], [slot.address for slot in taken]
        landed = attached.client.write_slots(ids, addresses, blocks.block_bytes, fill)
        return [Landing(gpu, addresses) for gpu, addresses in landed.items()]

    def _places_to_land(
        self,
        attached: Attached,
        layout: Layout,
        group: _Group,
        places: Sequence[tuple[_Part, int]],
    ) -> list[Places]:
        """Where else those blocks are to be written that are handed over."""
        handed = [(p, i) for p, i in places if p.save.job.handed_over and not p.save.cancelled]
        if not handed or not group.blocks.within or not self._landing.possible:
            return []
        slots = [part.slots[index].id for part, index in handed]
        block_ids = [part.save.job.block_ids[part.start + index] for part, index in handed]
        granted = self._landing.ask(attached, layout, slots, block_ids)
        there = {block_id for each in granted for block_id in each.block_ids}
        with self._condition:
            self.stats.add(not_landed_blocks=len(block_ids) - len(there))
        return granted

    def _commit(
        self,
        attached: Attached,
        layout: Layout,
        group: _Group,
        parts: list[_Part],
        landed: list[Landing],
    ) -> list[CommitOutcome]:
        """Publish what was copied of jobs that are still wanted."""
        segments: list[Segment] = []
        written: list[Slot] = []
        for part in parts:
            # Not before here: see the module's first paragraph.
            if part.save.cancelled:
                group.slots.put_back(part.slots)
            else:
                segments += _segments(part)
                written += part.slots
        if not segments:
            return []
        try:
            answer = attached.client.commit(
                layout, segments, ahead=group.slots.to_reserve, landed=landed
            )
        except BaseException:
            group.slots.drop(attached, written)
            raise
        group.slots.add(attached, answer.slots)
        return answer.outcomes


def _skip_present(attached: Attached, layout: Layout, part: _Part) -> int:
    """Pass over the blocks that are there already, as far as can be seen."""
    seen = attached.client.peek([layout.id], part.save.job.keys[part.start : part.stop])
    held = 0 if seen is None else seen.held
    part.start += held
    return held


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
                    job.reuse,
                )
            )
            begin = end
    return segments
