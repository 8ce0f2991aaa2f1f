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

Most machines have a GPU, which blocks are read into straight. What a lease says is there only,
and is not, is a miss; what is there is right.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import xxhash

from kvstore.config import StoreConfig
from kvstore.core.lifecycle import State
from kvstore.errors import DataUnusable, KVStoreError
from kvstore.naming import namer
from kvstore.store import Session, Store
from kvstore.tiers.faulty import Crash, FaultyDisk, MemoryDisk, SeededFaults
from kvstore.tiers.memory import HeapMemory
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_index import Index
from kvstore.tiers.nvme_segment import Geometry
from kvstore.types import (
    GPU_ONLY,
    ChainQuery,
    CommitOutcome,
    LayoutSpec,
    LeaseGrant,
    Segment,
    Tier,
)
from tests.simulation.crashing_gpu import READER, CrashingGpu
from tests.simulation.virtual import NoExecutor, VirtualLoop

OPERATIONS = 2000
"""Blocks put and asked for in the lives of one seed, at least."""

EXTENT = 64 << 10
CAPACITY = 4 << 20
DRAM_SLOTS = 24
DRAM_EXTENT = 4 * 12288
VRAM = 16 * DRAM_EXTENT
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


COUNTED = (
    "seeds", "operations", "hits", "restarts", "damage_found", "memory_damage_found",
    "gpu_hits", "gpu_misses",
)  # fmt: skip


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
        if op in ("copy", "task") and not errno_name.startswith("Device"):
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
        self.hits = 0
        self.restarts = 0
        self.damage_found = 0
        self.memory_damage_found = 0
        self.gpu_hits = 0
        """Blocks that were read in a GPU's memory and are not in DRAM."""
        self.gpu_misses = 0
        """Those that were not there any more."""
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
        # Apart, so that a life is the same with a GPU or without.
        self._luck = random.Random(seed)
        self._gpu: CrashingGpu | None = None
        self._store: Store
        self._tier: NvmeTier
        self._loop: VirtualLoop

    def run(self) -> None:
        while self.done < self.operations:
            self.restarts += 1
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
        self._budget = min(self.operations, self.done + int(rng.expovariate(1 / 500)) + 1)
        if not self._open(faults):
            self._crash()
            return
        gpu = self._gpu = None
        if self._luck.random() < 0.7:
            path = self._home.with_name("gpu.json")
            gpu = self._gpu = CrashingGpu(path, self._luck, VRAM)
        loop = self._loop = VirtualLoop(rng)
        asyncio.set_event_loop(loop)
        seen = Seen()
        self._store = Store(
            config=StoreConfig(
                dram_capacity_bytes=0,
                lease_ms=60_000,
                max_blocks=MAX_BLOCKS,
                vram_capacity_bytes=VRAM // 2,
                vram_reserve_bytes=DRAM_EXTENT,
                vram_gpudirect=True,
            ),
            clock=loop,
            dram=HeapMemory(DRAM_EXTENT, DRAM_SLOTS * 4096),
            nvme=self._tier,
            tenant_key=lambda tenant: tenant.encode(),
            executor=NoExecutor(),  # type: ignore[arg-type]
            observer=seen,
            vram=[] if gpu is None else [gpu.vram],
        )
        try:
            loop.run(self._serve(ends))
            if seen.faults:
                raise Wrong(f"a fault of the store itself: {seen.faults}")
            self.damage_found += seen.corrupt_blocks[Tier.NVME.label]
            self.memory_damage_found += seen.corrupt_blocks[Tier.DRAM.label]
            self.memory_damage_found += self._store.stats().mismatched_blocks
        except Crash:
            loop.crashed = True  # While the store was closed, which it does by itself.
        finally:
            died = loop.crashed
            loop.abandon()
            asyncio.set_event_loop(None)
            if gpu is not None:
                gpu.leave()
            if not self._tier._closed:
                self._store._listing.close()
                self._abandon_tier()
                if gpu is not None:
                    gpu.abandon(self._store)
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
        await store.start()
        self._tier.check_integrity()
        await asyncio.gather(*(self._client(number) for number in range(CLIENTS)))
        store.check_integrity()
        self._tier.check_integrity()
        room = sum(Geometry(EXTENT).file_bytes for _ in self._disk.files)
        if room + self._tier._index._env.info()["map_size"] > CAPACITY:
            raise Wrong("more room is taken than the capacity")
        if ends == "clean":
            if self.rng.random() < 0.7:
                await store.drain(5)
            await store.close()

    async def _client(self, number: int) -> None:
        rng = self.rng
        session = self._store.open_session(self._tenants[number % len(self._tenants)], local=True)
        ids = [self._store.register_layout(session.tenant, spec) for spec in self._specs]
        if self._gpu is not None:
            self._gpu.is_read_by(self._store, session, ids)
        while self.done < self._budget:
            if self._gpu is not None and self._luck.random() < 0.01:
                self._gpu.whim()
            layout = rng.randrange(len(ids))
            base, length = rng.randrange(CHAINS), rng.randint(1, CHAIN)
            keys = [bytes([base, i]) + bytes(30) for i in range(length)]
            what = rng.random()
            if what < 0.45:
                await self._put(session, layout, ids[layout], keys)
            elif what < 0.95:
                await self._get(session, layout, ids[layout], keys)
            elif what < 0.97:
                await asyncio.sleep(rng.expovariate(1 / 0.5))
            elif what < 0.99:
                await self._quietly(self._store.flush(session.tenant, rng.random() < 0.5))
            elif rng.random() < 0.5:
                await self._clear(session)

    async def _quietly(self, call: Any) -> None:
        try:
            await call
        except KVStoreError:
            return

    async def _put(
        self, session: Session, layout: int, layout_id: bytes, keys: list[bytes]
    ) -> None:
        store, rng = self._store, self.rng
        self.done += len(keys)
        grant = await store.reserve(session, layout_id, len(keys), rng.choice([0, 1000]))
        taken = keys[: len(grant.addresses)]
        if not taken:
            return
        slots = range(grant.first_slot, grant.first_slot + len(taken))
        versions, sums = [], []
        for slot, key in zip(slots, taken, strict=True):
            self._versions += 1
            data = content(session.tenant, layout, key, self._versions)
            store.slot_view(session, slot)[:] = data
            versions.append(self._versions)
            sums.append(xxhash.xxh3_64_intdigest(data))
        self._in_flight.update(versions)
        answer = await store.commit(session, layout_id, [Segment(b"", taken, slots, sums)], 0)
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

    async def _get(
        self, session: Session, layout: int, layout_id: bytes, keys: list[bytes]
    ) -> None:
        store = self._store
        self.done += len(keys)
        wait_ms = self.rng.choice([0, 50, 5000])
        dropped = frozenset(self._dropped)
        names = [(session.tenant, layout, key) for key in keys]
        asked = [self._held.get(name) for name in names]
        reader = b"" if self._gpu is None else self._luck.choice([b"", READER, READER])
        grants = await store.acquire(
            session, [ChainQuery([layout_id], keys)], wait_ms, reader=reader
        )
        grant = grants[0]
        for index in range(grant.held):
            # It may tell of any moment of the call: others clear and store meanwhile.
            meanwhile = self._held.get(names[index]) != asked[index]
            data = self._data(session, layout, grant, index)
            if data is not None and self._is_right(data, grant, index, dropped):
                held = asked[index] if meanwhile else None
                self._check(names[index], data, asked=held)
        if grant.held:
            if self.rng.random() < 0.2:
                await asyncio.sleep(self.rng.expovariate(1 / 0.01))
                for index in range(grant.held):
                    data = self._data(session, layout, grant, index)
                    if data is not None and self._is_right(data, grant, index, frozenset()):
                        self._check(names[index], data, again=True)
            await self._let_memory_fail(session, layout, grant)
            store.release(session, [grant.lease_id])

    def _data(self, session: Session, layout: int, grant: LeaseGrant, index: int) -> bytes | None:
        """What is read of a block that is leased; None where a GPU has it no more."""
        if grant.addresses[index] < GPU_ONLY:
            return bytes(self._store.lease_view(session, grant.lease_id, index))
        assert self._gpu is not None
        data = self._gpu.read(session, grant, index, self._specs[layout].block_bytes)
        self.gpu_hits += data is not None
        self.gpu_misses += data is None
        return data

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

    async def _let_memory_fail(self, session: Session, layout: int, grant: LeaseGrant) -> None:
        """At times a bit flips, at times somebody says which blocks are damaged."""
        rng, store = self.rng, self._store
        blocks = list(zip(grant.addresses, grant.checksums, strict=True))
        if rng.random() < 0.05:
            address, _ = block = rng.choice(blocks)
            if block not in self._flipped and address < GPU_ONLY:
                self._flipped.add(block)
                bit = rng.randrange(8 * self._specs[layout].block_bytes)
                store.dram.view(address, (bit >> 3) + 1)[bit >> 3] ^= 1 << (bit & 7)
        damaged = []
        if self._flipped:
            read = [self._data(session, layout, grant, i) for i in range(grant.held)]
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
        self.hits += 1

    def _in_use(self) -> set[bytes]:
        """Stored keys of blocks on NVMe, or on their way there, that somebody uses."""
        nvme = self._store._planner.residency.nvme
        assert nvme is not None
        return {r.block.stored_key for r in nvme.replicas() if r.pins or r.state is not State.READY}

    def _stored_key(self, session: Session, name: Name) -> bytes:
        secret = self._store.tenant_secret(session)
        return namer(secret, SPECS[name[1]].layout_id)(name[2])

    async def _clear(self, session: Session) -> None:
        """All of the tenant's that is not in use goes, for ever once that is answered,
        unless the disk was failing or said that it had done what it had not."""
        mine = {name: held for name, held in self._held.items() if name[0] == session.tenant}
        before = self._versions
        in_flight = set(self._in_flight)
        in_use = self._in_use()
        await self._store.clear(session.tenant)
        in_use |= self._in_use()
        honest = not self._wild and self._store._planner.residency.nvme_on
        for name, held in mine.items():
            now = self._held[name]
            known = {v for v in (held.current, *held.others) if v is not None}
            versions = {v for v in (now.current, *now.others) if v is not None}
            newer = {v for v in versions if v > before or v in in_flight}
            gone = honest and self._stored_key(session, name) not in in_use
            keep = newer if gone else newer | known
            current = now.current if now.current is not None and now.current in newer else None
            self._held[name] = Held(current, frozenset(keep - {current}))


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
    total = dict.fromkeys(COUNTED, 0)
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        for seed in range(first, end):
            life = run_seed(seed, Path(folder) / "data", operations)
            total["seeds"] += 1
            total["operations"] += life.done
            total["hits"] += life.hits
            total["restarts"] += life.restarts
            total["damage_found"] += life.damage_found
            total["memory_damage_found"] += life.memory_damage_found
            total["gpu_hits"] += life.gpu_hits
            total["gpu_misses"] += life.gpu_misses
    sys.stdout.write(json.dumps(total) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
