"""The whole store on a disk that fails, and a model that knows what may be answered.

Real: planner, store, NVMe tier, log, recovery, and LMDB. Simulated: the disk under the
segments (`tiers.faulty`), time and threads (`virtual`). LMDB's file is real; a crash
takes it back to the last commit that was synced or one later, and at times it is
lost, or comes back as it was long before. (That LMDB itself survives a crash is its
own promise, and is tried with real processes elsewhere.)

What a get may answer, after any of it: nothing, or the bytes last stored under that
name, by that tenant, in that layout. After a restart also bytes stored before those,
as nobody promised that their removal was durable; but nothing from before a clear.

Memory fails too: now and then a bit of a leased block flips. Who reads it tells by the
checksum and says so, and at times lies; once that is answered nobody is given it again.

Most machines have GPUs, which blocks are copied to, handed over on, and read into straight, and
whose memory others take while it is used (`crashing_gpu`). What a lease says is there only, and is
not, is a miss; what is there is right. Workers die (`crashing_workers`): with leases, while they
wait, while they write, before what is handed over to them is there and after it.

What lives on to its end leaves nothing behind: no lease, no pin, no place in any tier. Nobody
waits for longer than they said, or for ever.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import xxhash

from kvstore.config import StoreConfig
from kvstore.core.lifecycle import State
from kvstore.errors import DataUnusable, KVStoreError, ReservationExpired
from kvstore.naming import namer
from kvstore.store import Store
from kvstore.tiers.faulty import Crash, FaultyDisk, MemoryDisk, SeededFaults
from kvstore.tiers.memory import HeapMemory
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_index import Index
from kvstore.tiers.nvme_segment import Geometry
from kvstore.types import (
    GPU_ONLY,
    ChainQuery,
    CommitOutcome,
    Landing,
    LayoutSpec,
    LeaseGrant,
    Segment,
    Tier,
)
from tests.simulation.crashing_ends import held_by_nobody, left_in_tiers, used_by_nobody
from tests.simulation.crashing_gpu import CrashingGpu, is_slow
from tests.simulation.crashing_handovers import RESERVATION_S, HandOver
from tests.simulation.crashing_workers import Worker
from tests.simulation.virtual import NoExecutor, VirtualLoop

OPERATIONS = 2000
"""Blocks put and asked for in the lives of one seed, at least."""

EXTENT = 64 << 10
CAPACITY = 4 << 20
DRAM_SLOTS = 24
DRAM_EXTENT = 4 * 12288
VRAM = 16 * DRAM_EXTENT
LEASE_S = 60.0
SLACK_S = 0.01
"""What a call may take longer than its caller said."""
PATIENCE_S = 900.0
"""More than anything takes that waits for drives which hang, one time after the other."""
MAX_BLOCKS = 4096
CLIENTS = 3
CHAINS = 5
CHAIN = 16
SECRET = b"s" * 32

SPECS = (LayoutSpec("m", "bf16", 16, 3000), LayoutSpec("big", "bf16", 16, 9000))
TENANTS = ("a", "b")

Name = tuple[str, int, bytes]
"""(tenant, number of the layout, key)"""

CALM: dict[str, dict[str, float]] = {}
WILD: dict[str, dict[str, float]] = {
    "pwritev": {
        "short": 0.02,
        "lost": 0.004,
        "misdirected": 0.002,
        "flip": 0.004,
        "error": 0.0005,
        "full": 0.001,
    },
    "preadv": {"short": 0.02, "misdirected": 0.004, "flip": 0.01, "error": 0.0005},
    "fdatasync": {"lost": 0.01, "error": 0.001},
    "create": {"full": 0.02},
    "sync_names": {"lost": 0.02},
}


T = TypeVar("T")


class Wrong(AssertionError):
    """The store answered what it must not."""


class CrashingIndex(Index):
    """The index, with the files that a crash may leave of it."""

    def note(self, images: list[bytes], *, synced: bool = False) -> None:
        """Remember the file as it is: a crash leaves it so or, unsynced, as before."""
        image = (Path(self._env.path()) / "data.mdb").read_bytes()
        images[:] = [image] if synced else [*images[-1:], image]


class Seen:
    """A `StoreObserver` that counts."""

    def __init__(self) -> None:
        self.corrupt_blocks = dict.fromkeys((tier.label for tier in Tier), 0)
        self.faults: list[str] = []

    def transfer_done(self, src: str, dst: str, kind: str, nbytes: int, seconds: float) -> None: ...
    def evicted(self, tier: str, reason: str, blocks: int) -> None: ...
    def corrupt(self, tier: str) -> None:
        self.corrupt_blocks[tier] += 1

    def io_error(self, op: str, errno_name: str) -> None:
        if op in ("copy", "task", "vram") and not errno_name.startswith("Device"):
            self.faults.append(errno_name)

    def tier_off(self, tier: str) -> None: ...
    def coded(self, codec: str, src: str, dst: str) -> None: ...
    def straight_refused(self, gpu: str, reason: str) -> None: ...


class Held(NamedTuple):
    """What a get of one name may answer."""

    current: int | None
    """The version last stored; None where that is not known."""
    others: frozenset[int]
    """Versions that a restart may bring back."""


class Life:
    """One seed: a machine that crashes and starts again until so many blocks were put
    or asked for."""

    def __init__(self, seed: int, home: Path, operations: int, *, sabotage: bool = True) -> None:
        self.rng = random.Random(seed)
        self.operations = operations
        self.done = 0
        self.seen: Counter[str] = Counter()
        """How often what happened."""
        self.trace = xxhash.xxh3_64()
        self._home = home
        self._disk = MemoryDisk()
        self._images: list[bytes] = []
        self._ancient: bytes | None = None
        self._tenants = TENANTS[: self.rng.randint(1, len(TENANTS))]
        self._specs = SPECS[: self.rng.randint(1, len(SPECS))]
        self._wild = sabotage and self.rng.random() < 0.6
        self._held: dict[Name, Held] = {}
        self._versions = 0
        self._in_flight: set[int] = set()
        """Versions whose commit has not been answered."""
        self._flipped: set[tuple[int, int]] = set()
        """Blocks in memory of which a bit flipped: address and checksum."""
        self._dropped: set[tuple[int, int]] = set()
        """Those that the store has since looked at."""
        # Apart: what GPUs and their workers do.
        self._luck = random.Random(seed)
        self._gpus: list[CrashingGpu] = []
        self._workers: list[Worker] = []
        """All that there were in a run: their copies may be under way for as long."""
        self._others: list[asyncio.Future[None]] | None = None
        """What others are at, while there are clients."""
        self._store: Store
        self._tier: NvmeTier
        self._loop: VirtualLoop

    def run(self) -> None:
        while self.done < self.operations:
            self.seen["restarts"] += 1
            self._one_run()
            self._restarted()

    # One run of the server

    def _one_run(self) -> None:
        rng = self.rng
        faults = SeededFaults(random.Random(rng.random()), WILD if self._wild else CALM)
        self._faults = faults
        ends = rng.choice(["crash", "crash", "crash", "clean", "kill"])
        if ends == "crash":
            faults.crash_after = int(rng.expovariate(1 / 500))
        gpus = self._luck.choice([0, 1, 1, 1, 2])
        # A GPU's memory is not there at once.
        lasts = int(rng.expovariate(1 / (1000 if gpus else 500)))
        self._budget = min(self.operations, self.done + lasts + 1)
        if not self._open(faults):
            self._crash()
            return
        loop = self._loop = VirtualLoop(rng, is_slow)
        self._gpus = [
            CrashingGpu(
                self._home.with_name(f"gpu{number}"), self._luck, VRAM, loop.time, self.seen
            )
            for number in range(gpus)
        ]
        asyncio.set_event_loop(loop)
        seen = Seen()
        self._store = Store(
            config=StoreConfig(
                dram_capacity_bytes=0,
                lease_ms=int(1000 * LEASE_S),
                reservation_ms=int(1000 * RESERVATION_S),
                max_blocks=MAX_BLOCKS,
                vram_capacity_bytes=VRAM // 2,
                vram_reserve_bytes=DRAM_EXTENT,
                vram_gpudirect=True,
            ),
            clock=loop,
            dram=HeapMemory(DRAM_EXTENT, DRAM_SLOTS * 4096),
            nvme=self._tier,
            tenant_key=lambda tenant: tenant.encode(),
            executor=NoExecutor(loop),  # type: ignore[arg-type]
            observer=seen,
            vram=self._gpus,
        )
        for gpu in self._gpus:
            gpu.belongs_to(self._store)
        try:
            loop.run(self._serve(ends))
            if seen.faults:
                raise Wrong(f"a fault of the store itself: {seen.faults}")
            if wrong := [what for gpu in self._gpus for what in gpu.wrong]:
                raise Wrong(f"on a GPU: {wrong}")
            for stats in self._store.vram_stats():
                self.seen["straight_blocks"] += stats.straight_blocks
                self.seen["bounced_blocks"] += stats.bounced_blocks
                self.seen["landed_hits"] += stats.landed_hits
                self.seen["copied_blocks"] += stats.copied_bytes > 0
                self.seen["extents_given_back"] += stats.extents_given_back
            self.seen["seconds"] += int(loop.time())
            self.seen["damage_found"] += seen.corrupt_blocks[Tier.NVME.label]
            self.seen["memory_damage_found"] += seen.corrupt_blocks[Tier.DRAM.label]
            self.seen["memory_damage_found"] += self._store.stats().mismatched_blocks
        except Crash:
            loop.crashed = True  # While the store was closed, which it does by itself.
        finally:
            died = loop.crashed
            loop.abandon()
            asyncio.set_event_loop(None)
            while self._workers:
                self._workers.pop().leave()
            if not self._tier._closed:
                self._store._listing.close()
                self._abandon_tier()
                for each in self._store._gpus._gpus:
                    each._arena.close_extents()
                    each._table.close()
        if died:
            self._crash()
        elif ends == "kill":
            # The machine lives: all that was written stays.
            self._images = self._images[-1:]

    def _open(self, faults: SeededFaults) -> bool:
        disk = FaultyDisk(self._disk, faults, random.Random(self.rng.random()))
        try:
            self._tier = NvmeTier.open(
                self._home, CAPACITY, EXTENT, MAX_BLOCKS, disk=disk, open_index=self._open_index
            )
        except (Crash, DataUnusable):
            return False
        return True

    def _open_index(self, path: Path, map_bytes: int) -> Index:
        index = CrashingIndex.open_trusted(path, map_bytes)
        images = self._images
        apply, begin_life, end_life, sync = (
            index.apply, index.begin_life, index.end_life, index.sync,
        )  # fmt: skip

        def noted(work: Callable[..., None], *, synced: bool = False) -> Callable[..., None]:
            def run(*args: Any) -> None:
                work(*args)
                index.note(images, synced=synced)

            return run

        index.apply = noted(apply)  # type: ignore[method-assign]
        index.end_life = noted(end_life)  # type: ignore[method-assign]
        index.sync = noted(sync, synced=True)  # type: ignore[method-assign]
        index.begin_life = begin_life  # type: ignore[method-assign]
        return index

    def _abandon_tier(self) -> None:
        self._tier._log.close()
        self._tier._index.close()
        self._tier._home.close()

    def _crash(self) -> None:
        """The machine is off. What is on its disks now?"""
        rng = self.rng
        self._disk.crash(rng)
        data = self._home / "index" / "data.mdb"
        if self._images and data.exists():
            data.write_bytes(rng.choice(self._images))
        if self._wild:
            fate = rng.random()
            if fate < 0.1:
                shutil.rmtree(self._home / "index", ignore_errors=True)
            elif fate < 0.2 and self._ancient is not None and data.exists():
                data.write_bytes(self._ancient)
            if rng.random() < 0.2:
                for file in self._disk.files.values():
                    file.flip(rng.randrange(8 * file.nbytes))
        if self._images and rng.random() < 0.2:
            self._ancient = self._images[-1]
        self._images.clear()

    def _restarted(self) -> None:
        """After a restart what was replaced may be back, and memory is new."""
        self._flipped.clear()
        self._dropped.clear()
        for name, held in self._held.items():
            if held.current is not None:
                self._held[name] = Held(None, held.others | {held.current})

    # Clients

    async def _serve(self, ends: str) -> None:
        store = self._store
        self._loop.ends_s = self._loop.time() + 100 * PATIENCE_S
        await store.start()
        self._tier.check_integrity()
        whims = [asyncio.ensure_future(self._take_and_leave(gpu)) for gpu in self._gpus]
        self._others = others = []
        await asyncio.gather(*(self._client(number) for number in range(CLIENTS)))
        self._others = None
        await asyncio.gather(*others)
        for whim in whims:
            whim.cancel()
        store.check_integrity()
        self._tier.check_integrity()
        room = sum(Geometry(EXTENT).file_bytes for _ in self._disk.files)
        if room + self._tier._index._env.info()["map_size"] > CAPACITY:
            raise Wrong("more room is taken than the capacity")
        if self._luck.random() < 0.5:
            await self._all_leave()
        if ends == "clean":
            if self.rng.random() < 0.7:
                await store.drain(5)
            await store.close()
            if any(gpu.made_bytes for gpu in self._gpus):
                raise Wrong("memory of a GPU was not given back")

    async def _take_and_leave(self, gpu: CrashingGpu) -> None:
        await asyncio.sleep(1.0)
        while True:  # noqa: ASYNC110 - It waits for nothing.
            await asyncio.sleep(gpu.whim())

    async def _client(self, number: int) -> None:
        rng = self.rng
        tenant = self._tenants[number % len(self._tenants)]
        worker = self._arrive(tenant)
        while self.done < self._budget:
            if not worker.lives:
                worker = self._arrive(tenant)
            layout = rng.randrange(len(self._specs))
            base, length = rng.randrange(CHAINS), rng.randint(1, CHAIN)
            keys = [bytes([base, i]) + bytes(30) for i in range(length)]
            what = rng.random()
            if what < 0.45:
                await self._put(worker, layout, keys)
            elif what < 0.95:
                await self._get(worker, layout, keys)
            elif what < 0.97:
                await asyncio.sleep(rng.expovariate(1 / 0.5))
            elif what < 0.99:
                await self._flush(tenant, drop=rng.random() < 0.5)
            elif rng.random() < 0.5:
                await self._clear(tenant)
            if self._gpus:
                await self._at_times(tenant)

    async def _at_times(self, tenant: str) -> None:
        """What makes more of GPUs."""
        luck = self._luck
        what = luck.random()
        if what < 0.05:
            await self._flush(tenant, drop=True)
        elif what < 0.055:
            await self._clear(tenant)
        elif what < 0.3:
            await asyncio.sleep(luck.expovariate(1 / 0.5))

    def _disturb(self, worker: Worker) -> None:
        """Somebody else does something, now."""
        assert worker.gpu is not None
        what, tenant = self._luck.randrange(4), worker.session.tenant
        if what < 2:
            worker.gpu.squeeze()
        elif self._others is not None:
            work = self._flush(tenant, drop=True) if what == 2 else self._clear(tenant)
            self._others.append(asyncio.ensure_future(work))

    def _arrive(self, tenant: str, *, reads: bool = False) -> Worker:
        """A worker, mostly of an engine that reads on a GPU."""
        store, luck = self._store, self._luck
        session = store.open_session(tenant, local=True)
        ids = [store.register_layout(tenant, spec) for spec in self._specs]
        gpu = None
        if self._gpus and (reads or luck.random() < 0.8):
            gpu = luck.choice(self._gpus)
        # At times one that is read on two GPUs under one name.
        name = b"" if gpu is None else b"on %d" % self._gpus.index(gpu)
        reader = name if luck.random() < 0.95 else b"everywhere"
        worker = Worker(store, session, ids, gpu, reader, luck)
        self._workers.append(worker)
        return worker

    async def _in_time(self, call: Awaitable[T], seconds: float) -> T:
        began_s = self._loop.time()
        answer = await call
        took_s = self._loop.time() - began_s
        if took_s > seconds + SLACK_S:
            raise Wrong(f"a call took {took_s:.3f} s instead of {seconds:g}")
        return answer

    async def _flush(self, tenant: str, *, drop: bool) -> None:
        self._meanwhile("flushed")
        await self._in_time(self._quietly(self._store.flush(tenant, drop)), PATIENCE_S)

    def _meanwhile(self, what: str) -> None:
        """Count what happens while GPUs' memory is used."""
        for gpu in self._store._gpus._gpus:
            mirrors = gpu.mirrors
            self.seen[f"{what}_under_straight_read"] += any(True for _ in mirrors.straight.coming())
            self.seen[f"{what}_under_landing"] += any(True for _ in mirrors.landings.coming())
            self.seen[f"{what}_under_gpu_lease"] += any(
                mirror.pins or mirror.source.pins for mirror in mirrors.of.values()
            )

    async def _quietly(self, call: Any) -> None:
        try:
            await call
        except KVStoreError:
            return

    async def _put(self, worker: Worker, layout: int, keys: list[bytes]) -> None:
        store, rng, session = self._store, self.rng, worker.session
        layout_id = worker.layout_ids[layout]
        self.done += len(keys)
        wait_ms = rng.choice([0, 1000])
        reserve = store.reserve(session, layout_id, len(keys), wait_ms)
        # And until the memory is there.
        grant = await self._in_time(reserve, PATIENCE_S)
        taken = keys[: len(grant.addresses)]
        if not taken or not worker.lives:
            return
        slots = range(grant.first_slot, grant.first_slot + len(taken))
        versions, sums, blocks = [], [], []
        for slot, key in zip(slots, taken, strict=True):
            self._versions += 1
            data = content(session.tenant, layout, key, self._versions)
            store.slot_view(session, slot)[:] = data
            blocks.append(data)
            versions.append(self._versions)
            sums.append(xxhash.xxh3_64_intdigest(data))
        self._in_flight.update(versions)
        hand_over = None
        landed: Sequence[Landing] = ()
        try:
            if worker.gpu is not None and self._luck.random() < 0.5:
                hand_over = HandOver(self, worker, layout, taken)
                landed = await hand_over.write(slots, blocks)
                if not worker.lives:
                    return
            segment = Segment(b"", taken, slots, sums)
            answer = await store.commit(session, layout_id, [segment], 0, landed=landed)
        except ReservationExpired:
            self.seen["too_late_to_commit"] += 1
            store.abort(session, slots)
            return
        finally:
            self._in_flight.difference_update(versions)
        for key, version, outcome in zip(taken, versions, answer.outcomes, strict=True):
            name = (session.tenant, layout, key)
            held = self._held.get(name, Held(None, frozenset()))
            if outcome is CommitOutcome.STORED:
                before = {held.current} - {None}
                self._held[name] = Held(version, held.others | before)  # type: ignore[operator]
            elif outcome is CommitOutcome.CONFLICT and held == Held(None, frozenset()):
                raise Wrong(f"{name} is there, and was never stored, or was cleared")
            elif outcome is CommitOutcome.PRESENT:
                raise Wrong(f"{name} is there with bytes that are new")
        if hand_over is not None:
            await hand_over.read()

    async def _get(self, worker: Worker, layout: int, keys: list[bytes]) -> None:
        store, luck, session = self._store, self._luck, worker.session
        self.done += len(keys)
        wait_ms = self.rng.choice([0, 50, 5000])
        dropped = frozenset(self._dropped)
        names = [(session.tenant, layout, key) for key in keys]
        asked = [self._held.get(name) for name in names]
        if worker.gpu is not None and luck.random() < 0.03:
            self.seen["died_while_waiting"] += 1
            self._loop.call_later(luck.expovariate(1 / 0.01), worker.die)
        if worker.gpu is not None and luck.random() < 0.02:
            self._loop.call_later(luck.expovariate(1 / 0.01), self._disturb, worker)
        query = ChainQuery([worker.layout_ids[layout]], keys)
        reader = luck.choice([b"", worker.reader, worker.reader, worker.reader])
        grants = await self._in_time(
            store.acquire(session, [query], wait_ms, reader=reader), wait_ms / 1000
        )
        if not worker.lives:
            return
        grant = grants[0]
        for index in range(grant.held):
            # It may tell of any moment of the call: others clear and store meanwhile.
            meanwhile = self._held.get(names[index]) != asked[index]
            data = self._data(worker, layout, grant, index)
            if data is not None and self._is_right(data, grant, index, dropped):
                held = asked[index] if meanwhile else None
                self._check(names[index], data, asked=held)
        if not grant.held:
            return
        if luck.random() < 0.3:
            await self._copy(worker, layout, grant)
        elif self.rng.random() < 0.2:
            await asyncio.sleep(self.rng.expovariate(1 / 0.01))
        if not worker.lives:
            return
        for index in range(grant.held):
            data = self._data(worker, layout, grant, index)
            if data is not None and self._is_right(data, grant, index, frozenset()):
                self._check(names[index], data, again=True)
        await self._let_memory_fail(worker, layout, grant)
        if worker.lives:
            store.release(session, [grant.lease_id])

    async def _copy(self, worker: Worker, layout: int, grant: LeaseGrant) -> None:
        """Take the time that a worker does to copy what it has leased, and die at times."""
        if worker.gpu is None:
            return
        luck, nbytes = self._luck, self._specs[layout].block_bytes
        there = [i for i in range(grant.held) if worker.find(grant, i, nbytes) is not None]
        if there and luck.random() < 0.1:
            worker.gpu.squeeze()
        for index in luck.sample(there, min(len(there), 3)):
            if luck.random() < 0.1:
                self.seen["died_with_gpu_lease"] += worker.lives
                worker.die()
            data = await worker.copy(grant, index, nbytes, self.seen)
            if data is None:
                continue
            self.seen["copied_on_gpu"] += 1
            if xxhash.xxh3_64_intdigest(data) != grant.checksums[index]:
                raise Wrong("other bytes on a GPU than the table says, in the middle of a copy")

    def _data(self, worker: Worker, layout: int, grant: LeaseGrant, index: int) -> bytes | None:
        """What is read of a block that is leased; None where a GPU has it no more."""
        data = worker.find(grant, index, self._specs[layout].block_bytes)
        if grant.addresses[index] >= GPU_ONLY:
            self.seen["gpu_hits"] += data is not None
            self.seen["gpu_misses"] += data is None
            return data
        if data is not None:
            self.seen["mirror_hits"] += 1
            if xxhash.xxh3_64_intdigest(data) != grant.checksums[index]:
                raise Wrong("other bytes on a GPU than the table says")
        return bytes(self._store.lease_view(worker.session, grant.lease_id, index))

    def _is_right(
        self, data: bytes, grant: LeaseGrant, index: int, dropped: frozenset[tuple[int, int]]
    ) -> bool:
        """As clients tell. `dropped`: what nobody may be given any more."""
        if xxhash.xxh3_64_intdigest(data) == grant.checksums[index]:
            return True
        block = grant.addresses[index], grant.checksums[index]
        if block not in self._flipped:
            raise Wrong("bytes without their checksum, and memory is well")
        if block in dropped:
            raise Wrong("damaged, looked at, and given to somebody again")
        return False

    async def _let_memory_fail(self, worker: Worker, layout: int, grant: LeaseGrant) -> None:
        """At times a bit flips, at times somebody says which blocks are damaged."""
        rng, store, session = self.rng, self._store, worker.session
        blocks = list(zip(grant.addresses, grant.checksums, strict=True))
        if rng.random() < 0.05:
            address, _ = block = rng.choice(blocks)
            if block not in self._flipped and address < GPU_ONLY and not self._is_copied(address):
                self._flipped.add(block)
                bit = rng.randrange(8 * self._specs[layout].block_bytes)
                store.dram.view(address, (bit >> 3) + 1)[bit >> 3] ^= 1 << (bit & 7)
        damaged = []
        if self._flipped:
            read = [self._data(worker, layout, grant, i) for i in range(grant.held)]
            damaged = [
                block
                for i, (block, data) in enumerate(zip(blocks, read, strict=True))
                if data is not None and not self._is_right(data, grant, i, frozenset())
            ]
        named = blocks if rng.random() < 0.02 else damaged
        if not named or rng.random() < 0.3:
            return
        suspicions, now_ns = store._suspicions, self._loop.now_ns()
        heard = (
            session.tenant not in suspicions._looking
            and suspicions._paused_ns.get(session.tenant, 0) <= now_ns
        )
        await store.report_damage(session.tenant, [address for address, _ in named])
        if heard:
            self._dropped.update(damaged)

    def _is_copied(self, address: int) -> bool:
        """To a GPU, just now: nobody would notice there."""
        written = (mirror for gpu in self._store._gpus._gpus for mirror in gpu.mirrors.written)
        return any(mirror.source.address == address for mirror in written)

    def _check(
        self,
        name: Name,
        data: bytes,
        *,
        again: bool = False,
        asked: Held | None = None,
    ) -> None:
        """`asked`: what might have been answered when it was, where that has changed."""
        version = int.from_bytes(data[:8], "little")
        self.trace.update(data[:8])
        if data != content(*name, version):
            raise Wrong(f"{name}: bytes that were never stored there")
        held = self._held.get(name, Held(None, frozenset()))
        if again:
            if version not in {held.current, *held.others}:
                return  # It was cleared while it was leased.
        elif asked is not None and version in {asked.current, *asked.others} - {held.current}:
            pass
        elif held.current is not None:
            if version != held.current:
                raise Wrong(f"{name}: version {version}, not {held.current}")
        elif version not in held.others:
            raise Wrong(f"{name}: version {version}, not one of {sorted(held.others)}")
        else:
            self._held[name] = Held(version, held.others - {version})
        self.seen["hits"] += 1

    def _in_use(self) -> set[bytes]:
        """Stored keys of blocks on NVMe, or on their way there, that somebody uses."""
        nvme = self._store._planner.residency.nvme
        assert nvme is not None
        return {r.block.stored_key for r in nvme.replicas() if r.pins or r.state is not State.READY}

    def _stored_key(self, name: Name) -> bytes:
        secret = self._store._planner.catalog.secret(name[0])
        return namer(secret, SPECS[name[1]].layout_id)(name[2])

    async def _clear(self, tenant: str) -> None:
        """All of the tenant's that is not in use goes, for ever once that is answered,
        unless the disk was failing or said that it had done what it had not."""
        self._meanwhile("cleared")
        mine = {name: held for name, held in self._held.items() if name[0] == tenant}
        before = self._versions
        in_flight = set(self._in_flight)
        in_use = self._in_use()
        await self._in_time(self._store.clear(tenant), PATIENCE_S)
        in_use |= self._in_use()
        honest = not self._wild and self._store._planner.residency.nvme_on
        for name, held in mine.items():
            now = self._held[name]
            known = {v for v in (held.current, *held.others) if v is not None}
            versions = {v for v in (now.current, *now.others) if v is not None}
            newer = {v for v in versions if v > before or v in in_flight}
            gone = honest and self._stored_key(name) not in in_use
            keep = newer if gone else newer | known
            current = now.current if now.current is not None and now.current in newer else None
            self._held[name] = Held(current, frozenset(keep - {current}))

    # The end

    async def _all_leave(self) -> None:
        """Nobody is there any more, and nothing of theirs."""
        for gpu in self._gpus:
            gpu.recover()
        for worker in self._workers:
            worker.die()
        # Long before any of it would end by itself.
        await self._until(held_by_nobody, LEASE_S / 10)
        await self._until(used_by_nobody, PATIENCE_S)
        self.seen["ends"] += 1
        if self._luck.random() < 0.3:
            for tenant in self._tenants:
                await self._clear(tenant)
            await self._until(left_in_tiers, PATIENCE_S)
            self.seen["empty_ends"] += 1

    async def _until(self, left: Callable[[Store], list[str]], seconds: float) -> None:
        until_s = self._loop.time() + seconds
        while what := left(self._store):
            if self._loop.time() > until_s:
                raise Wrong(f"left behind: {what}")
            await asyncio.sleep(1.0)
        self._store.check_integrity()


def content(tenant: str, layout: int, key: bytes, version: int) -> bytes:
    """What is stored under a name, different for each version."""
    head = version.to_bytes(8, "little")
    seed = xxhash.xxh3_128_digest(head + tenant.encode() + bytes([layout]) + key)
    size = SPECS[layout].block_bytes
    return (head + seed * (size // len(seed) + 1))[:size]


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """What the store draws is drawn again when the seed is run again, and its threads take
    turns on the disk, whose faults come in the order of the calls."""
    rng = random.Random(seed)
    with (
        patch("secrets.token_bytes", rng.randbytes),
        patch("secrets.randbits", rng.getrandbits),
        patch("kvstore.tiers.nvme_recovery.SCANNERS", 1),
    ):
        yield


def run_seed(seed: int, home: Path, operations: int) -> Life:
    """Raises AssertionError for whatever goes wrong, with the seed in it."""
    shutil.rmtree(home, ignore_errors=True)
    life = Life(seed, home, operations)
    try:
        with repeatable(seed):
            life.run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error!r}") from error
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return life


def main() -> int:
    """python -m tests.simulation.crashes FIRST END [OPERATIONS]: what was done, as JSON.
    Ends with the first seed that fails, and its error."""
    warnings.simplefilter("ignore", RuntimeWarning)  # Of what a crash cut short.
    logging.disable(logging.CRITICAL)
    first, end = int(sys.argv[1]), int(sys.argv[2])
    operations = int(sys.argv[3]) if len(sys.argv) > 3 else OPERATIONS
    total: Counter[str] = Counter()
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        for seed in range(first, end):
            life = run_seed(seed, Path(folder) / "data", operations)
            total["seeds"] += 1
            total["operations"] += life.done
            total += life.seen
    sys.stdout.write(json.dumps(total) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
