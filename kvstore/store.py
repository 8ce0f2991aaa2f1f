"""The store: the planner, put to work on real tiers.

One asyncio loop runs everything that decides; worker threads run everything that
moves bytes or waits for a disk. So the planner needs no locks, and the loop never
waits for a tier.

    a call -> planner event -> planner actions -> [threads] -> planner event -> ...

What is asked of the planner is carried out before the call returns (`_execute`),
so the two never drift apart. A tier that fails is switched off and the others go
on. Everything that waits is bounded in time by its caller.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import xxhash

from kvstore.clock import Clock
from kvstore.config import StoreConfig
from kvstore.core.actions import (
    Action,
    Answer,
    CloseExtent,
    Copy,
    Forget,
    OpenExtent,
    Publish,
    RememberLayout,
)
from kvstore.core.catalog import Layout, Replica
from kvstore.core.limits import Counters, Limits
from kvstore.core.planner import Planner
from kvstore.core.sessions import Session
from kvstore.core.space import Space
from kvstore.core.tickets import Ticket
from kvstore.errors import (
    BadRequest,
    CorruptBlock,
    Draining,
    TierError,
    TierFailed,
    TierFull,
)
from kvstore.listing import Listing
from kvstore.tiers.base import BlockHeader, MemoryTier, Recovered, StorageTier
from kvstore.types import (
    SESSION_ID_BYTES,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    LayoutSpec,
    LeaseGrant,
    Segment,
    SlotGrant,
    StoreStats,
    Tier,
    TierStats,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.1
WARNING_EVERY_NS = 1_000_000_000
SYNC_S = 2.0
"""How much of what was written to NVMe a crash may cost, at most, in time."""
MAX_RUNNING = 4
"""Copies between tiers at a time; the executor should have as many threads and
a few more for the tier's other work."""
LISTED_A_STEP = 1000
"""Blocks found at the start that go into the directory before others get their turn."""
LOOKED_AT_A_STEP = 1000
"""Keys looked up before others get their turn: one to two milliseconds."""

__all__ = ["MAX_RUNNING", "Session", "Store", "StoreObserver"]


class StoreObserver(Protocol):
    """What the store tells those who count. Called on the loop; must not block."""

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None: ...
    def evicted(self, tier: str, reason: str, blocks: int) -> None: ...
    def io_error(self, op: str, errno_name: str) -> None: ...
    def corrupt(self, tier: str) -> None: ...
    def tier_off(self, tier: str) -> None: ...


class Store:
    def __init__(
        self,
        *,
        config: StoreConfig,
        clock: Clock,
        dram: MemoryTier,
        nvme: StorageTier | None,
        tenant_key: Callable[[str], bytes],
        executor: Executor,
        observer: StoreObserver,
    ) -> None:
        """Takes over the tiers: they are closed with the store."""
        self.dram = dram
        self.epoch = secrets.token_bytes(8)
        self._nvme = nvme
        self._clock = clock
        self._executor = executor
        self._observer = observer
        self._planner = Planner(
            Limits(
                lease_ms=config.lease_ms,
                reservation_ms=config.reservation_ms,
                max_sessions=config.max_sessions,
                max_leases=config.max_leases,
                max_reservations=config.max_reservations,
                max_layouts=config.max_layouts,
                max_running=MAX_RUNNING,
            ),
            tenant_key=tenant_key,
            eviction=config.eviction,
            dram=Space(
                dram.usable_bytes,
                dram.extent_bytes,
                max_slots=config.max_blocks,
                first_extent=1 + secrets.randbits(30),
            ),
            nvme=None
            if nvme is None
            else Space(nvme.usable_bytes, nvme.extent_bytes, max_slots=config.max_blocks),
            nvme_slot_bytes=None if nvme is None else nvme.slot_bytes,
            first_id=1 + secrets.randbits(48),
        )
        capacity = dram.usable_bytes + (0 if nvme is None else nvme.usable_bytes)
        self._listing = Listing(capacity, self.epoch, clock)
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # NVMe extents are opened and closed one after the other, so that their
        # sum stays within the capacity; copies wait for the extent they need.
        self._extent_work: asyncio.Queue[OpenExtent | CloseExtent] = asyncio.Queue()
        self._opening: dict[int, asyncio.Future[None]] = {}
        self._started_ns = clock.now_ns()
        self._ticked_ns = self._started_ns
        self._forgets: set[asyncio.Task[None]] = set()
        self._unsynced = False
        self._at_chores = False
        self._draining = False
        self._failed_copies = 0
        self._next_warning_ns = 0
        self._closed = False
        self._bytes = {tier: [0, 0] for tier in Tier}
        self._evictions = dict.fromkeys(Tier, 0)

    # Life

    async def start(self) -> None:
        """Take over what the NVMe tier holds, then begin to work."""
        if self._nvme is not None:
            await self._restore(self._nvme)
        self._execute()
        self._spawn(self._keep_house())
        self._spawn(self._work_on_extents())

    async def _restore(self, nvme: StorageTier) -> None:
        layouts = []
        for tenant, fields in nvme.recovered_layouts():
            try:
                layouts.append((tenant, LayoutSpec(**fields)))  # type: ignore[arg-type]
            except (TypeError, BadRequest):
                log.warning("a layout found on NVMe is not one; its blocks are dropped")
        # In a thread: nobody else uses the planner yet, and probes want answers.
        await self._in_thread(lambda: self._take_over(nvme, layouts))
        await self._list_all()
        log.info("found %d blocks on NVMe", len(self._planner.catalog))

    def _take_over(self, nvme: StorageTier, layouts: list[tuple[str, LayoutSpec]]) -> None:
        extents, refused = self._planner.restore(
            layouts, nvme.recovered_extents(), self._until_closed(nvme.recovered_blocks())
        )
        for header, address in refused:
            assert isinstance(header, BlockHeader)
            nvme.forget(address, header)
        for extent in extents:
            nvme.close_extent(extent)
        if refused or extents:
            log.warning(
                "%d extents and %d other blocks found on NVMe do not fit; they are dropped",
                len(extents), len(refused),
            )  # fmt: skip

    def _until_closed(self, found: Iterable[Recovered]) -> Iterator[Recovered]:
        """A start that is called off ends: nobody waits for millions of blocks."""
        for block in found:
            if self._closed:
                raise Draining("the server was stopped while it started")
            yield block

    async def _list_all(self) -> None:
        """List what was found, a part at a time: probes still want answers."""
        found = ((block.stored_key, False, True) for block in self._planner.catalog)
        while part := list(islice(found, LISTED_A_STEP)):
            self._listing.change(part)
            if self._listing.needs_growth and (growing := self._grow_listing()):
                await growing
            await asyncio.sleep(0)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work; write what is in DRAM only to NVMe, as far as time allows."""
        self._draining = True
        if self._nvme is None or not self._planner.residency.nvme_on:
            return
        ticket = self._planner.flush(None, drop=False)
        self._execute()
        await self._wait(ticket, timeout_s)
        await self._sync()

    async def close(self) -> None:
        """Stop working and close the tiers. Copies under way are waited for."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._executor.shutdown(wait=True)
        self._listing.close()
        if self._nvme is not None:
            try:
                self._nvme.close()
            except TierError as error:
                log.error("the NVMe tier did not close cleanly: %s", error)
        self.dram.close()

    def progress_ns(self) -> int:
        """When housekeeping last came round; it does so ten times a second."""
        return self._ticked_ns

    @property
    def extent_bytes(self) -> int:
        return self.dram.extent_bytes

    # Sessions

    def open_session(self, tenant: str, *, local: bool) -> Session:
        """Raises `TooMany`, `Draining`."""
        self._refuse_when_draining()
        session_id = secrets.token_bytes(SESSION_ID_BYTES)
        return self._planner.open_session(session_id, tenant, local=local)

    def session(self, session_id: bytes) -> Session:
        """Raises `NoSession`."""
        return self._planner.session(session_id)

    def close_session(self, session: Session) -> None:
        """Give back all it held. Idempotent."""
        self._planner.close_session(session)
        self._execute()

    def extent_fd(self, session: Session, extent: int) -> int:
        """The memfd of an extent of the session's tenant. It stays the tier's."""
        if self._planner.residency.dram.space.owner_of(extent) != session.tenant:
            raise BadRequest(f"there is no extent {extent}")
        return self.dram.extent_fd(extent)

    def directory_fd(self) -> int:
        """The memfd of the directory (`local.directory`). It stays the store's."""
        return self._listing.fd

    def tenant_secret(self, session: Session) -> bytes:
        """What the session's tenant's blocks are named with (`naming`)."""
        return self._planner.catalog.secret(session.tenant)

    # Calls

    def register_layout(self, tenant: str, spec: LayoutSpec) -> bytes:
        layout_id = self._planner.register_layout(tenant, spec)
        self._execute()
        return layout_id

    async def lookup(self, tenant: str, chains: Sequence[ChainQuery]) -> list[ChainPresence]:
        """How much of each chain is held, at some moment of the call's."""
        answers = []
        looked_at = 0
        for chain in chains:
            answers.append(self._planner.lookup(tenant, chain))
            looked_at += len(chain.layout_ids) * (1 + len(chain.keys).bit_length())
            if looked_at >= LOOKED_AT_A_STEP:
                looked_at = 0
                await asyncio.sleep(0)
        return answers

    async def acquire(
        self, session: Session, chains: Sequence[ChainQuery], wait_ms: int
    ) -> list[LeaseGrant]:
        """See the planner. Waits at most `wait_ms` for blocks to come up."""
        self._refuse_when_draining()
        ticket = self._planner.acquire(
            session, chains, wait=wait_ms > 0, now_ns=self._clock.now_ns()
        )
        self._execute()
        await self._wait(ticket, wait_ms / 1000)
        assert ticket.answer is not None
        return ticket.answer

    def renew(self, session: Session, lease_ids: Sequence[int]) -> int:
        return self._planner.renew(session, lease_ids, self._clock.now_ns())

    def release(self, session: Session, lease_ids: Sequence[int]) -> None:
        self._planner.release(session, lease_ids)
        self._execute()

    async def reserve(
        self,
        session: Session,
        layout_id: bytes,
        count: int,
        wait_ms: int,
    ) -> SlotGrant:
        """See the planner. Waits at most `wait_ms` for space."""
        self._refuse_when_draining()
        ticket = self._planner.reserve(
            session, layout_id, count, wait=wait_ms > 0, now_ns=self._clock.now_ns()
        )
        self._execute()
        await self._wait(ticket, wait_ms / 1000)
        assert ticket.answer is not None
        return ticket.answer

    def commit(
        self,
        session: Session,
        layout_id: bytes,
        segments: Sequence[Segment],
        reserve: int,
    ) -> CommitAnswer:
        """See the planner. `reserve`: slots to reserve in the same call."""
        answer = self._planner.commit(
            session,
            layout_id,
            segments,
            reserve=0 if self._draining else reserve,
            now_ns=self._clock.now_ns(),
        )
        self._execute()
        return answer

    def abort(self, session: Session, slot_ids: Sequence[int]) -> None:
        self._planner.abort(session, slot_ids)
        self._execute()

    def lease_view(self, session: Session, lease_id: int, index: int) -> memoryview:
        """A leased block's bytes, `block_bytes` of them; not to be written."""
        lease = self._planner.lease(session, lease_id)
        if not 0 <= index < len(lease.replicas):
            raise BadRequest(f"the lease has no block {index}")
        replica = lease.replicas[index]
        return self.dram.view(replica.address, replica.block.layout.block_bytes).toreadonly()

    def slot_view(self, session: Session, slot_id: int) -> memoryview:
        """A reserved slot, `block_bytes` of it, to be written."""
        replica = self._planner.slot(session, slot_id)
        return self.dram.view(replica.address, replica.block.layout.block_bytes)

    async def prefetch(self, tenant: str, chains: Sequence[ChainQuery]) -> int:
        """Blocks that are on their way because of it."""
        self._refuse_when_draining()
        ticket = self._planner.prefetch(tenant, chains)
        self._execute()
        await self._wait(ticket, None)
        assert ticket.answer is not None
        return ticket.answer

    async def clear(self, tenant: str) -> int:
        """Blocks forgotten. What is not in use stays forgotten across a crash."""
        ticket = self._planner.clear(tenant)
        self._execute()
        await self._wait(ticket, None)
        if self._forgets:
            await asyncio.wait(self._forgets.copy())
        await self._sync()
        assert ticket.answer is not None
        return ticket.answer

    async def flush(self, tenant: str, drop: bool) -> int:
        """Blocks written. Raises `NoLowerTier`."""
        ticket = self._planner.flush(tenant, drop=drop)
        self._execute()
        await self._wait(ticket, None)
        await self._sync()
        assert ticket.answer is not None
        return ticket.answer

    def counters(self) -> Counters:
        return self._planner.counters

    def stats(self, tenant: str | None = None) -> StoreStats:
        planner, counters = self._planner, self._planner.counters
        residency = planner.residency
        tiers = [self._tier_stats(Tier.DRAM)]
        if residency.nvme is not None:
            tiers.append(self._tier_stats(Tier.NVME))
        return StoreStats(
            uptime_seconds=(self._clock.now_ns() - self._started_ns) / 1e9,
            tiers=tuple(tiers),
            sessions=planner.open_sessions,
            leases=planner.open_leases,
            reservations=planner.open_reservations,
            acquired_positions=counters.acquired_positions,
            acquired_hits=counters.acquired_hits,
            acquired_hits_dram=counters.acquired_hits_dram,
            committed_blocks=counters.committed_blocks,
            corrupt_blocks=residency.holdings.corrupt,
            tenant_blocks=0 if tenant is None else planner.catalog.tenant_blocks(tenant),
        )

    def _tier_stats(self, tier: Tier) -> TierStats:
        residency = self._planner.residency
        pool = residency.dram if tier is Tier.DRAM else residency.nvme
        assert pool is not None
        return TierStats(
            tier=tier,
            capacity_bytes=pool.space.capacity_bytes,
            used_bytes=pool.space.used_bytes,
            blocks=len(pool),
            evictions=pool.evictions,
            bytes_in=self._bytes[tier][0],
            bytes_out=self._bytes[tier][1],
            healthy=tier is Tier.DRAM or residency.nvme_on,
        )

    def check_integrity(self) -> None:
        """See the planner. For tests and idle moments: O(blocks)."""
        self._planner.check_integrity()

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise Draining("the server is shutting down")

    async def _wait(self, ticket: Ticket, timeout_s: float | None) -> None:
        """Until the ticket is answered; when time is up, it is answered as things are."""
        if ticket.answer is not None:
            return
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = answered
        try:
            await asyncio.wait((answered,), timeout=timeout_s)
            if ticket.answer is None:
                self._planner.give_up(ticket, self._clock.now_ns())
                self._execute()
            if ticket.answer is None:
                await answered
        except asyncio.CancelledError:
            self._planner.withdraw(ticket, self._clock.now_ns())
            raise
        finally:
            del self._waiters[ticket]
            self._execute()

    # Carrying out what the planner wants

    def _execute(self) -> None:
        while actions := self._planner.take_actions():
            forgets = [action.replica for action in actions if isinstance(action, Forget)]
            if forgets:
                task = self._spawn(self._forget(forgets))
                self._forgets.add(task)
                task.add_done_callback(self._forgets.discard)
            for action in actions:
                if not isinstance(action, Forget):
                    self._execute_one(action)
        self._count_evictions()
        if self._planner.chores and not self._at_chores:
            self._at_chores = True
            self._spawn(self._do_chores())

    async def _do_chores(self) -> None:
        try:
            while self._planner.chores:
                # Threads that forget take turns with the loop: no more than one at a time.
                if self._forgets:
                    await asyncio.wait(self._forgets)
                await asyncio.sleep(0)
                self._planner.chores.go_on()
                self._execute()
        finally:
            self._at_chores = False

    def _execute_one(self, action: Action) -> None:
        match action:
            case Answer(ticket):
                waiter = self._waiters.get(ticket)
                if waiter is not None and not waiter.done():
                    waiter.set_result(None)
            case Copy():
                self._spawn(self._copy(action))
            case OpenExtent(Tier.DRAM, extent, _):
                try:
                    self.dram.open_extent(extent)
                except TierError as error:
                    log.error("no memory for the DRAM tier, it stays at its size: %s", error)
                    self._planner.extent_failed(Tier.DRAM, extent)
            case CloseExtent(Tier.DRAM, extent):
                self.dram.close_extent(extent)
            case OpenExtent(Tier.NVME, extent, _):
                self._opening[extent] = asyncio.get_running_loop().create_future()
                self._extent_work.put_nowait(action)
            case CloseExtent():
                self._extent_work.put_nowait(action)
            case Publish(changes):
                self._listing.change(changes)
                if self._listing.needs_growth:
                    self._grow_listing()
            case RememberLayout(layout):
                self._note_limit(layout)
                self._spawn(self._remember(layout))

    def _note_limit(self, layout: Layout) -> None:
        residency = self._planner.residency
        for pool, space_class in (
            (residency.dram, layout.dram_class),
            (residency.nvme, layout.nvme_class),
        ):
            if pool is None or space_class is None:
                continue
            room = pool.space.capacity_bytes // space_class.slot_bytes
            if room > pool.space.max_slots:
                log.warning(
                    "%s has room for %d blocks of %d bytes, but server.max_blocks allows %d",
                    pool.tier.label, room, layout.block_bytes, pool.space.max_slots,
                )  # fmt: skip

    def _grow_listing(self) -> asyncio.Task[None] | None:
        try:
            growing = self._listing.grow()
        except OSError as error:
            # Lookups miss what the table has no room for; nothing else suffers.
            log.error("the directory cannot grow: %s", error.strerror)
            return None
        return self._spawn(growing)

    def _count_evictions(self) -> None:
        residency = self._planner.residency
        for pool in (residency.dram, residency.nvme):
            if pool is not None and pool.evictions != self._evictions[pool.tier]:
                dropped = pool.evictions - self._evictions[pool.tier]
                self._evictions[pool.tier] = pool.evictions
                self._observer.evicted(pool.tier.label, "space", dropped)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # A bug. Liveness fails by itself when it was the housekeeping that ended.
            self._observer.io_error("task", type(error).__name__)
            log.error("a background task ended with an error", exc_info=error)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _copy(self, copy: Copy) -> None:
        """One copy between tiers, reported to the planner however it ends."""
        began_ns = self._clock.now_ns()
        source, target = copy.source.tier, copy.target.tier
        corrupt = full = False
        failure: Exception | None = None
        try:
            if target is Tier.NVME:
                await self._opened(copy.target)
            await self._in_thread(partial(self._move, copy))
        except CorruptBlock as error:
            failure, corrupt = error, True
            self._observer.corrupt(source.label)
        except TierFull as error:
            failure, full = error, True
        except TierFailed as error:
            failure = error
            self._tier_failed(error, "read" if source is Tier.NVME else "write")
        except Exception as error:  # noqa: BLE001
            # The outermost point of a background task: whoever waits for this copy
            # must hear of its end, even of one nobody foresaw.
            failure = error
            self._observer.io_error("copy", type(error).__name__)
        now_ns = self._clock.now_ns()
        nbytes = copy.target.block.layout.block_bytes
        if failure is None:
            self._bytes[source][1] += nbytes
            self._bytes[target][0] += nbytes
            self._unsynced |= target is Tier.NVME
            kind = "write_back" if target is Tier.NVME else "demand"
            seconds = (now_ns - began_ns) / 1e9
            self._observer.transfer_done(source.label, target.label, kind, nbytes, seconds)
            self._planner.transfer_done(copy, now_ns)
        else:
            self._failed_copies += 1
            if now_ns >= self._next_warning_ns:
                # A client that commits wrong checksums could fill the disk with these.
                self._next_warning_ns = now_ns + WARNING_EVERY_NS
                text = "a copy from %s to %s failed (%d so far): %s"
                log.warning(text, source.label, target.label, self._failed_copies, failure)
            self._planner.transfer_failed(copy, now_ns, source_corrupt=corrupt, full=full)
        self._execute()

    async def _opened(self, target: Replica) -> None:
        assert self._nvme is not None
        opening = self._opening.get(target.address // self._nvme.extent_bytes)
        if opening is not None:
            await asyncio.shield(opening)

    def _move(self, copy: Copy) -> None:
        """Runs in a worker thread. Both replicas stay where they are meanwhile."""
        assert self._nvme is not None
        block = copy.target.block
        layout = block.layout
        header = _header(copy.target)
        in_dram = copy.source if copy.source.tier is Tier.DRAM else copy.target
        slot = self.dram.view(in_dram.address, layout.dram_class.slot_bytes)
        if copy.target.tier is Tier.DRAM:
            self._nvme.read(copy.source.address, header, slot)
            return
        # A client wrote this slot and said what its checksum is. What does not
        # agree must not become durable.
        if xxhash.xxh3_64_intdigest(slot[: header.length]) != header.checksum:
            raise CorruptBlock("a block in DRAM is not what was committed")
        self._nvme.write(copy.target.address, header, slot)

    async def _forget(self, replicas: list[Replica]) -> None:
        assert self._nvme is not None
        nvme = self._nvme
        entries = [(replica.address, _header(replica)) for replica in replicas]

        def strike() -> None:
            for address, header in entries:
                nvme.forget(address, header)

        try:
            await self._in_thread(strike)
        except TierFailed as error:
            self._tier_failed(error, "forget")
        self._unsynced = True
        for replica in replicas:
            self._planner.forgotten(replica)
        self._execute()

    async def _remember(self, layout: Layout) -> None:
        if self._nvme is None:
            return
        nvme, spec = self._nvme, asdict(layout.spec)
        try:
            await self._in_thread(
                partial(nvme.remember_layout, layout.tenant, layout.layout_id, spec)
            )
        except TierFull as error:
            log.warning("a layout cannot be kept across restarts: %s", error)
        except TierFailed as error:
            self._tier_failed(error, "index")
        self._unsynced = True

    async def _work_on_extents(self) -> None:
        while True:
            action = await self._extent_work.get()
            assert self._nvme is not None
            nvme = self._nvme
            try:
                if isinstance(action, OpenExtent):
                    await self._in_thread(
                        partial(nvme.open_extent, action.extent, action.slot_bytes)
                    )
                else:
                    await self._in_thread(partial(nvme.close_extent, action.extent))
            except TierError as error:
                if isinstance(action, OpenExtent):
                    log.error("the NVMe tier cannot grow, it stays at its size: %s", error)
                    self._planner.extent_failed(Tier.NVME, action.extent)
                if isinstance(error, TierFailed):
                    self._tier_failed(error, "extent")
                outcome: TierError | None = error
            else:
                outcome = None
            if isinstance(action, OpenExtent):
                opening = self._opening[action.extent]
                if outcome is None:
                    del self._opening[action.extent]
                    opening.set_result(None)
                else:
                    # It stays: copies into this extent may yet begin.
                    opening.set_exception(outcome)
                    # Where no copy waits for it, nobody retrieves it.
                    opening.exception()
            self._execute()

    async def _sync(self) -> None:
        if self._nvme is None or not self._planner.residency.nvme_on:
            return
        self._unsynced = False
        try:
            await self._in_thread(self._nvme.sync)
        except TierFull as error:
            log.warning("the NVMe index is full: %s", error)
        except TierFailed as error:
            self._tier_failed(error, "sync")

    def _tier_failed(self, error: TierFailed, op: str) -> None:
        self._observer.io_error(op, errno.errorcode.get(error.errno, "OTHER"))
        if self._planner.residency.nvme_on:
            log.error("the NVMe tier failed and is switched off until a restart: %s", error)
            self._observer.tier_off(Tier.NVME.label)
            self._planner.tier_failed(self._clock.now_ns())
            self._execute()

    async def _keep_house(self) -> None:
        loop = asyncio.get_running_loop()
        synced_at = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            self._planner.tick(self._clock.now_ns())
            self._execute()
            self._ticked_ns = self._clock.now_ns()
            self._listing.beat()
            if self._unsynced and loop.time() - synced_at >= SYNC_S:
                synced_at = loop.time()
                self._spawn(self._sync())


def _header(replica: Replica) -> BlockHeader:
    block = replica.block
    layout = block.layout
    return BlockHeader(
        block.stored_key,
        block.parent,
        layout.layout_id,
        layout.tenant,
        layout.block_bytes,
        block.checksum or 0,
    )
