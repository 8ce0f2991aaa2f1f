"""What may be asked of the store, and its life from start to close."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from types import MappingProxyType

from kvstore.clock import Clock
from kvstore.config import StoreConfig
from kvstore.core.actions import RememberLayout
from kvstore.core.catalog import Layout
from kvstore.core.limits import Counters, Limits
from kvstore.core.planner import Planner
from kvstore.core.sessions import Session
from kvstore.core.space import Space
from kvstore.device.vram import Vram
from kvstore.errors import BadRequest, Draining, TierError
from kvstore.listing import Listing
from kvstore.store.costs import Costs
from kvstore.store.directory import Directory
from kvstore.store.extents import Extents
from kvstore.store.figures import store_stats, transfer_stats
from kvstore.store.loop import Loop, StoreObserver
from kvstore.store.movement import MAX_RUNNING, Movement
from kvstore.store.patience import ended_within
from kvstore.store.recovery import recover
from kvstore.store.suspicions import Suspicions
from kvstore.store.upkeep import Upkeep
from kvstore.store.vram import Gpu, Gpus, VramHandout
from kvstore.store.waiting import Waiting
from kvstore.store.wear import Wear
from kvstore.tiers.base import MemoryTier, StorageTier
from kvstore.tiers.vram import VramArena
from kvstore.types import (
    NO_HINTS,
    SESSION_ID_BYTES,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    Hints,
    Landing,
    LayoutSpec,
    LeaseGrant,
    Segment,
    SessionState,
    SlotGrant,
    StoreStats,
    Tier,
    TransferStats,
    VramStats,
)

log = logging.getLogger(__name__)

NO_SLOTS = SlotGrant(0, [], 0)
CLOSE_S = 10.0
"""More than closing takes on a drive that answers; giving up costs a longer start."""
LOOKED_AT_A_STEP = 1000
"""Keys looked up before others get their turn: one to two milliseconds."""


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
        costs: Path | None = None,
        vram: Sequence[Vram] = (),
        vram_refused: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Takes over the tiers: they are closed with the store. `costs`: the file in which
        what was learned of this machine is kept. `vram`: GPUs whose memory is used.
        `vram_refused`: of others that were to be, why it is not."""
        self.dram = dram
        self.epoch = secrets.token_bytes(8)
        self._nvme = nvme
        self._clock = clock
        self._started_ns = clock.now_ns()
        self._draining = False
        self._planner = Planner(
            Limits(
                lease_ms=config.lease_ms,
                reservation_ms=config.reservation_ms,
                max_sessions=config.max_sessions,
                max_leases=config.max_leases,
                max_reservations=config.max_reservations,
                max_layouts=config.max_layouts,
                max_running=MAX_RUNNING,
                prefetch_share=config.prefetch_share,
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
            weight=lambda tenant: config.shares.get(tenant, 1.0),
            nvme_bytes_per_day=config.nvme_bytes_per_day,
        )
        capacity = dram.usable_bytes + (0 if nvme is None else nvme.usable_bytes)
        self._listing = Listing(capacity, self.epoch, clock)
        self._loop = Loop(self._planner, clock, executor, observer)
        self._waiting = Waiting(self._loop)
        self._directory = Directory(self._loop, self._listing)
        self._extents = Extents(self._loop, dram, nvme)
        self._gpus = Gpus(
            self._loop,
            [
                Gpu(
                    self._loop,
                    dram,
                    VramArena(each, dram.extent_bytes),
                    config.vram_capacity_bytes,
                    config.vram_reserve_bytes,
                    first_extent=1 + secrets.randbits(30),
                    straight_from=nvme if config.vram_gpudirect else None,
                    reads=MAX_RUNNING,
                )
                for each in vram
            ],
            vram_refused,
        )
        self._movement = Movement(self._loop, dram, nvme, self._extents, self._gpus)
        self._suspicions = Suspicions(self._loop, dram)
        self._wear = None if nvme is None else Wear(self._loop, nvme)
        self._weighs = config.nvme_bytes_per_day > 0
        self._upkeep = Upkeep(self._loop, nvme, self._movement, self._listing, self._wear)
        self._costs = None if costs is None else Costs(self._loop, costs)
        self._loop.handle(RememberLayout, self._remember)

    # Life

    async def start(self) -> None:
        """Take over what the NVMe tier holds, then begin to work."""
        if self._costs is not None:
            self._costs.recall()
            self._loop.spawn(self._costs.work())
        if self._nvme is not None:
            await recover(self._loop, self._nvme, self._directory)
        if self._wear is not None and self._weighs:
            self._wear.ask_before_moving()
        self._loop.execute()
        self._loop.spawn(self._upkeep.work())
        for tier in (Tier.DRAM, Tier.NVME):
            self._loop.spawn(self._extents.work(tier))
        self._gpus.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work; write what is in DRAM only to NVMe, as far as time allows."""
        self._draining = True
        if self._nvme is None or not self._planner.residency.nvme_on:
            return
        ticket = self._planner.flush(None, drop=False)
        await self._waiting.wait(ticket, timeout_s)
        await self._movement.sync()

    async def close(self) -> bool:
        """Stop working and close the tiers. Copies under way are waited for, as long as a
        drive or a GPU may take to answer. False when it did not: then threads are still
        waiting for it, in memory that is left as it is, and the process should end without
        them."""
        await self._loop.close()
        self._listing.close()
        # First, for what is read straight ends in GPUs' memory.
        answered = ended_within(CLOSE_S, self._close_nvme)
        if not answered:
            log.error(
                "the NVMe tier does not answer and was left as it is: what was synced is found "
                "again at the next start, as after a crash"
            )
        if not ended_within(CLOSE_S, self._gpus.close):
            log.error("a GPU does not answer; the memory there goes with the process")
            return False
        if answered:
            self.dram.close()
        return answered

    def _close_nvme(self) -> None:
        self._loop.wait_for_threads()
        if self._costs is not None:
            self._costs.keep()
        if self._nvme is not None:
            try:
                self._nvme.close()
            except TierError as error:
                log.error("the NVMe tier did not close cleanly: %s", error)

    def progress_ns(self) -> int:
        """When housekeeping last came round; it does so ten times a second."""
        return self._upkeep.ticked_ns

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
        self._gpus.session_ended(session)
        self._loop.execute()

    def extent_fd(self, session: Session, extent: int) -> int:
        """The memfd of an extent of the session's tenant. It stays the tier's."""
        known = self._planner.residency.dram.space.owner_of(extent) == session.tenant
        if not (known and self._extents.there(Tier.DRAM, [extent * self.extent_bytes])):
            raise BadRequest(f"there is no extent {extent}")
        return self.dram.extent_fd(extent)

    def open_vram(
        self, session: Session, gpu: str, layout_ids: Sequence[bytes], reader: bytes = b""
    ) -> VramHandout:
        """The table of what that GPU's memory has copies of (`device.mirrors`), for a process
        that reads blocks of these layouts there, for who acquires as `reader`, in place of whom
        it said so before. Raises `BadRequest` where the store has no memory on it,
        `UnknownLayout`."""
        return self._gpus.open(session, gpu, layout_ids, reader)

    def vram_extent(self, session: Session, gpu: str, extent: int) -> VramHandout:
        """An extent of the session's tenant there."""
        return self._gpus.extent_fd(session, gpu, extent)

    def directory_fd(self) -> int:
        """The memfd of the directory (`local.directory`). It stays the store's."""
        return self._listing.fd

    def tenant_secret(self, session: Session) -> bytes:
        """What the session's tenant's blocks are named with (`naming`)."""
        return self._planner.catalog.secret(session.tenant)

    # Calls

    def register_layout(self, tenant: str, spec: LayoutSpec) -> bytes:
        layout_id = self._planner.register_layout(tenant, spec)
        self._loop.execute()
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
        self,
        session: Session,
        chains: Sequence[ChainQuery],
        wait_ms: int,
        hints: Hints = NO_HINTS,
        reader: bytes = b"",
    ) -> list[LeaseGrant]:
        """See the planner. Waits at most `wait_ms` for blocks to come up."""
        self._refuse_when_draining()
        now_ns = self._clock.now_ns()
        ticket = self._planner.acquire(
            session, chains,
            wait=wait_ms > 0, now_ns=now_ns, deadline_ns=now_ns + wait_ms * 1_000_000,
            hints=hints, reader=reader,
        )  # fmt: skip
        await self._waiting.wait(ticket, wait_ms / 1000)
        assert ticket.answer is not None
        return ticket.answer

    def renew(self, session: Session, lease_ids: Sequence[int]) -> int:
        return self._planner.renew(session, lease_ids, self._clock.now_ns())

    async def report_damage(self, tenant: str, addresses: Sequence[int]) -> None:
        """A client says that what it copied from there was damaged. What the store then
        finds damaged itself leaves memory."""
        await self._suspicions.look(tenant, addresses)

    def release(self, session: Session, lease_ids: Sequence[int]) -> None:
        self._planner.release(session, lease_ids)
        self._loop.execute()

    async def reserve(
        self,
        session: Session,
        layout_id: bytes,
        count: int,
        wait_ms: int,
    ) -> SlotGrant:
        """See the planner. Waits at most `wait_ms` for space, and until the slots' memory
        is there."""
        self._refuse_when_draining()
        ticket = self._planner.reserve(
            session, layout_id, count, wait=wait_ms > 0, now_ns=self._clock.now_ns()
        )
        await self._waiting.wait(ticket, wait_ms / 1000)
        assert ticket.answer is not None
        return await self._with_memory(session, ticket.answer)

    def land(
        self,
        session: Session,
        layout_id: bytes,
        slots: Sequence[int],
        not_on: Collection[str] = (),
    ) -> list[Landing]:
        """See the planner. Whoever looks for what was there before finds it no more by the time
        that this returns."""
        now_ns = self._clock.now_ns()
        landings = self._planner.land(session, layout_id, slots, not_on=not_on, now_ns=now_ns)
        self._loop.execute()
        return landings

    async def commit(
        self,
        session: Session,
        layout_id: bytes,
        segments: Sequence[Segment],
        reserve: int,
        landed: Sequence[Landing] = (),
    ) -> CommitAnswer:
        """See the planner. `reserve`: slots to reserve in the same call. What is committed
        is published at once; then it waits until the slots' memory is there."""
        answer = self._planner.commit(
            session,
            layout_id,
            segments,
            reserve=0 if self._draining else reserve,
            now_ns=self._clock.now_ns(),
            landed=landed,
        )
        self._loop.execute()
        return answer._replace(slots=await self._with_memory(session, answer.slots))

    async def _with_memory(self, session: Session, grant: SlotGrant) -> SlotGrant:
        """The grant, once its memory is there; nothing where there is none to be had, or
        not before the grant is over."""
        try:
            await self._extents.opened(Tier.DRAM, grant.addresses)
        except TierError:
            self._give_back(session, grant)
            return NO_SLOTS
        except asyncio.CancelledError:
            self._give_back(session, grant)
            raise
        if grant.addresses and self._clock.now_ns() >= grant.expires_ns:
            self._give_back(session, grant)
            return NO_SLOTS
        return grant

    def _give_back(self, session: Session, grant: SlotGrant) -> None:
        self.abort(session, range(grant.first_slot, grant.first_slot + len(grant.addresses)))

    def abort(self, session: Session, slot_ids: Sequence[int]) -> None:
        self._planner.abort(session, slot_ids)
        self._loop.execute()

    def lease_view(self, session: Session, lease_id: int, index: int) -> memoryview:
        """A leased block's bytes, `block_bytes` of them; not to be written. Raises `BadRequest`
        for one that is in a GPU's memory alone."""
        lease = self._planner.lease(session, lease_id)
        if not 0 <= index < len(lease.replicas):
            raise BadRequest(f"the lease has no block {index}")
        replica = lease.replicas[index]
        if replica.tier is not Tier.DRAM:
            raise BadRequest("the block is in a GPU's memory alone")
        return self.dram.view(replica.address, replica.block.layout.block_bytes).toreadonly()

    def slot_view(self, session: Session, slot_id: int) -> memoryview:
        """A reserved slot, `block_bytes` of it, to be written."""
        replica = self._planner.slot(session, slot_id)
        return self.dram.view(replica.address, replica.block.layout.block_bytes)

    async def prefetch(
        self, tenant: str, chains: Sequence[ChainQuery], within_ms: int = 0,
        session: Session | None = None,
    ) -> int:  # fmt: skip
        """Blocks that are on their way because of it. What there is no room for now is tried
        again within `within_ms`, and for as long as `session` lasts."""
        self._refuse_when_draining()
        ticket = self._planner.prefetch(
            tenant, chains,
            within_ns=within_ms * 1_000_000, now_ns=self._clock.now_ns(), session=session,
        )  # fmt: skip
        await self._waiting.wait(ticket, None)
        assert ticket.answer is not None
        return ticket.answer

    def hint(
        self, tenant: str, session: bytes, state: SessionState, expected_ms: float | None
    ) -> None:
        """What a session does next, as its caller says."""
        self._planner.hint(tenant, session, state, expected_ms)

    async def clear(self, tenant: str) -> int:
        """Blocks forgotten. What is not in use stays forgotten across a crash."""
        ticket = self._planner.clear(tenant)
        await self._waiting.wait(ticket, None)
        await self._movement.all_forgotten()
        await self._movement.sync()
        assert ticket.answer is not None
        return ticket.answer

    async def flush(self, tenant: str, drop: bool) -> int:
        """Blocks written. Raises `NoLowerTier`."""
        ticket = self._planner.flush(tenant, drop=drop)
        await self._waiting.wait(ticket, None)
        await self._movement.sync()
        assert ticket.answer is not None
        return ticket.answer

    def counters(self) -> Counters:
        return self._planner.counters

    def stats(self, tenant: str | None = None) -> StoreStats:
        uptime_s = (self._clock.now_ns() - self._started_ns) / 1e9
        return store_stats(
            self._planner, self._movement.moved_bytes, uptime_s, tenant,
            self._loop.nvme_off_because, self._gpus.stats(),
        )  # fmt: skip

    def vram_stats(self) -> tuple[VramStats, ...]:
        return self._gpus.stats()

    def transfer_stats(self) -> TransferStats:
        return transfer_stats(self._planner)

    def check_integrity(self) -> None:
        """See the planner. For tests and idle moments: O(blocks)."""
        self._planner.check_integrity()

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise Draining("the server is shutting down")

    def _remember(self, action: RememberLayout) -> None:
        self._note_limit(action.layout)
        self._loop.spawn(self._movement.remember(action.layout))

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
